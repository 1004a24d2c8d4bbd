# SPDX-License-Identifier: Apache-2.0
"""The record of a card (`gpu.py`), and README's rows that are made of such records.

python benchmarks/gpu_record.py    # the rows of the records in benchmarks/results
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SCHEMA_VERSION = 1
NOTHING_MEASURED = "No GPU has been measured yet."
STAGES = ("kernels", "times", "engines")
# Every key of a record, and what its value is.
SCHEMA: dict[str, type] = {
    "schema_version": int,
    "gpu": str,
    "driver": str,
    "versions": dict,  # of torch, triton, python, vllm, sglang; None where it is not installed
    "commit": str,
    "command": str,
    "peers": str,
    "ceilings": dict,  # copy_gb_per_s, bf16_tflops
    "stages": dict,  # of each that has run: seconds, dropped, wrong
    "cases": list,  # rows of bench_ops.py
    "engines": list,  # rows of gpu_engines.py
    "judged": dict,  # how many targets were met, missed, not measured
}


def empty(machine: Mapping[str, str], engines: Mapping[str, str | None], peers: str) -> dict[str, Any]:
    """A record in which nothing has run."""
    versions = {name: machine[name] for name in ("torch", "triton", "python")}
    return {
        "schema_version": SCHEMA_VERSION,
        "gpu": machine["gpu"],
        "driver": machine["driver"],
        "versions": versions | dict(engines),
        "commit": machine["commit"],
        "command": machine["command"],
        "peers": peers,
        "ceilings": {},
        "stages": {},
        "cases": [],
        "engines": [],
        "judged": judged([]),
    }


def judged(cases: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """How many targets were met, missed and not measured."""
    met = [target["met"] for row in cases for target in row.get("targets", ())]
    return {"met": met.count(True), "missed": met.count(False), "not_measured": met.count(None)}


def path_of(folder: Path, gpu: str) -> Path:
    """The record of this card."""
    return folder / f"gpu-{re.sub('[^a-z0-9]+', '-', gpu.lower()).strip('-')}.json"


def write(path: Path, record: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def check(record: Mapping[str, Any]) -> None:
    """Raises ValueError for what `gpu.py` does not write."""
    if record.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(f"schema_version {record.get('schema_version')}, not {SCHEMA_VERSION}: run `make gpu` again")
    if record.keys() != SCHEMA.keys():
        raise ValueError(f"other keys: {sorted(record.keys() ^ SCHEMA.keys())}")
    for key, kind in SCHEMA.items():
        if not isinstance(record[key], kind):
            raise ValueError(f"{key} is {type(record[key]).__name__}, not {kind.__name__}")
    for name, stage in record["stages"].items():
        if name not in STAGES or stage.keys() != {"seconds", "dropped", "wrong"}:
            raise ValueError(f"stage {name}: {sorted(stage)}")
    if record["judged"] != judged(record["cases"]):
        raise ValueError("judged does not follow from the cases")


def summary(record: Mapping[str, Any]) -> list[str]:
    """Every target that was missed or not measured, and how many there are."""
    lines = []
    for row in record["cases"]:
        for target in row.get("targets", ()):
            if target["met"] is not True:
                value = "not measured" if target["value"] is None else f"{target['value']:.3g}"
                bound = "at least" if target["at_least"] else "at most"
                sizes = " ".join(f"{k}={v}" for k, v in row["sizes"].items())
                lines.append(f"{row['kernel']} {row['model']} {sizes}")
                lines.append(f"  {target['what']} {bound} {target['limit']}: {value}")
    count = record["judged"]
    return [*lines, f"targets: {count['met']} met, {count['missed']} missed, {count['not_measured']} not measured"]


def readme_row(record: Mapping[str, Any], name: str) -> str:
    """What a record says, as a row of README's table. name: of its file."""
    compared = [row for row in record["cases"] if not str(row["failed"]).startswith("not run")]
    right = sum(not (row["failed"] or row["wrong"]) for row in compared)
    said = [f"{right} of {len(compared)} kernel cases right, as called and from replayed graphs"]
    count = record["judged"]
    said.append(f"{count['met']} of {sum(count.values())} speed targets met, {count['not_measured']} not measured")
    for row in record["engines"]:
        verdict = row["wrong"] or f"log-probabilities within {row['limit']:g} (mean) of the fp32 reference, graphs on"
        said.append(f"{row['engine']} {row['version']}: {verdict}")
    return f"| {record['gpu']}, driver {record['driver']} | {'. '.join(said)} | [{name}](benchmarks/results/{name}) |"


def readme_rows(folder: Path = RESULTS) -> list[str]:
    """A row for each record in `folder`. Raises ValueError naming a file that is none."""
    rows = []
    for file in sorted(folder.glob("gpu-*.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        try:
            check(record)
        except ValueError as error:
            raise ValueError(f"{file.name}: {error}") from None
        rows.append(readme_row(record, file.name))
    return rows


if __name__ == "__main__":
    print("\n".join(readme_rows()) or NOTHING_MEASURED)
