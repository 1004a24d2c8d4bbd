# SPDX-License-Identifier: Apache-2.0
"""The first thing to run wherever there is a GPU: `make gpu`, or

    python benchmarks/gpu.py [--peers FOLDER] [--minutes 9.5] [--only TEXT]

1. checks   everything the rest needs is there, or one line says what is missing, and what to do
2. kernels  every kernel equals its reference at full size, as called and out of a CUDA graph that
            is replayed with other values than it was captured with
3. times    of what was right, those with targets first (`op_targets`)
4. engines  where vLLM or SGLang are installed: a tiny checkpoint through the real server with its
            default flags, graphs on, against the fp32 reference

Needs torch, triton, numpy and a C compiler; no engine, no installed dsv4, no network. Each stage
has its share of the time; what it did not reach is named and does not fail the run. The record,
benchmarks/results/gpu-<card>.json, is written as results come; README's table is made of the
records in that folder. Exit status: 0 when everything that ran was right, 1 otherwise, 2 when the
checks refuse. Missed targets do not change it.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "examples")]

COLUMNS = 80
# Shares of the whole time: kernels are compiled and compared in several processes at a time, times
# are taken alone. What a stage leaves is the next one's.
KERNELS_SHARE, TIMES_SHARE = 0.5, 0.3
CASE_S = 120.0
PEERS = {"flash_mla": "_flashmla_C*.so", "deep_gemm": "third_party/deep_gemm", "marlin": "_moe_C_stable_libtorch*.so"}
ENGINES = ("vllm", "sglang")


class Refusal(Exception):  # noqa: N818
    """What is missing, and what to do, in one line."""


# ---- checks --------------------------------------------------------------------------------


def check_machine() -> dict[str, str]:
    """What is there, by name. Raises Refusal for the first thing that is not."""
    for package in ("torch", "triton", "numpy", "rich", "yaml"):
        if not _installed(package):
            wanted = {"yaml": "PyYAML"}.get(package, package)
            raise Refusal(f"no {wanted} in {sys.executable}: pip install {wanted}, or name the Python that has it")
    import torch
    import triton

    if torch.version.cuda is None and torch.version.hip is None:
        raise Refusal(f"torch {torch.__version__} is a CPU build: install the CUDA build of it on a machine with a GPU")
    if not torch.cuda.is_available():
        raise Refusal(f"torch {torch.__version__} sees no GPU: see that nvidia-smi lists one, and CUDA_VISIBLE_DEVICES")
    if not any(map(shutil.which, filter(None, (os.environ.get("CC"), "gcc", "clang")))):
        raise Refusal("no C compiler, with which Triton builds its launchers: install gcc, or set CC")
    major, minor = torch.cuda.get_device_capability()
    free, total = torch.cuda.mem_get_info()
    found = {
        "card": f"{torch.cuda.get_device_name()}, sm{major}{minor}, {free >> 30} of {total >> 30} GiB free",
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda}",
        "triton": triton.__version__,
    }
    for engine in ENGINES:
        found[engine] = version_of(engine) or f"not installed here: no server of {engine}'s will be asked"
    return found | {"peers": _peers()}


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def version_of(package: str) -> str | None:
    """Of an installed package."""
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _peers() -> str:
    """Which peers are on the path, and what becomes of the others."""
    spec = importlib.util.find_spec("vllm")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ()) if folder] if spec else []
    there = [name for name, pattern in PEERS.items() if any(any(folder.glob(pattern)) for folder in folders)]
    missing = [name for name in PEERS if name not in there]
    if not missing:
        return ", ".join(there)
    return f"{', '.join(there) or 'none'}; not measured: {', '.join(missing)} (--peers, docs/kernels.md)"


# ---- stages --------------------------------------------------------------------------------


@dataclass
class Run:
    """One run: what it was asked, and the record that it fills."""

    source: str
    console: Console
    record: dict[str, Any]
    path: Path
    started: float
    seconds: float
    jobs: int

    def save(self) -> None:
        import gpu_record

        self.record["judged"] = gpu_record.judged(self.record["cases"])
        gpu_record.write(self.path, self.record)

    def until(self, share: float) -> float:
        """The end of a stage that has this share of the whole time from now on, on the monotonic
        clock."""
        now, end = time.monotonic(), self.started + self.seconds
        return min(now + share * self.seconds, end)

    def stage(self, name: str, began: float, dropped: Sequence[str], wrong: Sequence[str]) -> None:
        """Enter a finished stage in the record, and say what it did not reach and what was
        wrong."""
        seconds = time.monotonic() - began
        self.record["stages"][name] = {"seconds": round(seconds, 1), "dropped": list(dropped), "wrong": list(wrong)}
        self.save()
        verdict = f"{len(wrong)} wrong" if wrong else "right"
        left = f", {len(dropped)} not reached in the time" if dropped else ""
        self.console.print(f"{name}: {verdict}{left}, {seconds:.0f} s")
        for line in (*wrong, *(f"not reached: {each}" for each in dropped)):
            self.console.print(f"  {line}")


def kernels(run: Run, rows: dict[str, dict[str, Any]]) -> None:
    """Compare every case, several at a time."""
    import bench_ops

    began, until = time.monotonic(), run.until(KERNELS_SHARE)
    phase = bench_ops.Phase(run.source, "cuda", False, until, CASE_S, run.jobs)
    show(run, "kernels", rows, phase.run(rows, run.record["ceilings"]))
    dropped = [name for name, row in rows.items() if row["failed"] == f"not run: {bench_ops.TIME_IS_OVER}"]
    wrong = [f"{name}: {row['failed'] or row['wrong']}" for name, row in rows.items() if name not in dropped
             and (row["failed"] or row["wrong"])]  # fmt: skip
    run.stage("kernels", began, dropped, wrong)


def times(run: Run, rows: dict[str, dict[str, Any]]) -> None:
    """Time what was right; cases with more targets come first."""
    import bench_ops
    import op_targets

    began, until = time.monotonic(), run.until(TIMES_SHARE)
    right = {name: row for name, row in rows.items() if not (row["failed"] or row["wrong"])}
    ordered = dict(sorted(right.items(), key=lambda item: -op_targets.asked(item[1])))
    phase = bench_ops.Phase(run.source, "cuda", True, until, CASE_S)
    show(run, "times", ordered, phase.run(ordered, run.record["ceilings"]))
    dropped = [name for name, row in ordered.items() if row.get("not_timed")]
    run.stage("times", began, dropped, [f"{name}: {row['failed']}" for name, row in ordered.items() if row["failed"]])


def show(run: Run, what: str, rows: dict[str, Any], done: Iterable[dict[str, Any]]) -> None:
    """Follow a phase with a bar; the record is written after every case."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:40.40}"), BarColumn(14), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=run.console, transient=True) as progress:
        task = progress.add_task(what, total=len(rows))
        for row in done:
            sizes = " ".join(f"{k}={v}" for k, v in row["sizes"].items())
            progress.update(task, advance=1, description=f"{what}: {row['kernel']} {row['model']} {sizes}")
            run.save()


def engines(run: Run, device: str) -> None:
    """Ask each installed engine's server, one after the other."""
    import gpu_engines

    began, dropped, wrong = time.monotonic(), [], []
    asked = [engine for engine in ENGINES if version_of(engine)]
    if not asked:
        run.record["stages"]["engines"] = {"seconds": 0.0, "dropped": [], "wrong": []}
        run.save()
        run.console.print("engines: none is installed here, none was asked")
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder, reference = gpu_engines.prepare(Path(scratch), device)
        for number, engine in enumerate(asked):
            left = (run.until(1.0) - time.monotonic()) / (len(asked) - number)
            if left < gpu_engines.LEAST_S:
                dropped.append(engine)
                continue
            with run.console.status(f"engines: {engine} serve"):
                row = gpu_engines.ask(engine, folder, reference, device, left)
            row = {"engine": engine, "version": version_of(engine)} | row
            run.record["engines"].append(row)
            wrong += [f"{engine}: {row['wrong']}"] if row["wrong"] else []
    run.stage("engines", began, dropped, wrong)


# ---- the run -------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.5, help="the whole run (default: %(default)s)")
    parser.add_argument("--only", default="", help="cases whose name, model and sizes contain this")
    parser.add_argument("--jobs", type=int, default=4, help="processes that compare at a time (default: %(default)s)")
    parser.add_argument("--peers", type=Path, help="a folder that holds vllm/ with the peers' libraries")
    parser.add_argument("--commit", default="", help="what to record as the commit, where git cannot say")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="where the record goes")
    parser.add_argument("--source", default="op_cases", help=argparse.SUPPRESS)
    parser.add_argument("--engine-device", default="cuda", choices=("cuda", "cpu"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.minutes < 0 or args.jobs < 1:
        parser.error("--minutes and --jobs must be positive")
    started = time.monotonic()
    if args.peers:
        sys.path.insert(0, str(args.peers.resolve()))
    try:
        if args.source != "op_cases":  # a stand-in for a GPU
            importlib.import_module(args.source)
        found = check_machine()
    except Refusal as refusal:
        print(f"gpu: {refusal}", file=sys.stderr)
        return 2

    import bench_ops
    import gpu_record
    from rich.console import Console

    console = Console(highlight=False, markup=False, width=COLUMNS)
    for name, what in found.items():
        console.print(f"{name:8} {what}", soft_wrap=True)
    plans = [plan for plan in importlib.import_module(args.source).plans("cuda", False) if args.only in str(plan)]
    if not plans:
        parser.error(f"no case contains {args.only!r}")
    rows = bench_ops.rows_of(plans)
    record = gpu_record.empty(bench_ops.machine(args.commit), {e: version_of(e) for e in ENGINES}, found["peers"])
    record["cases"] = list(rows.values())
    path = gpu_record.path_of(args.results, record["gpu"])
    run = Run(
        source=args.source,
        console=console,
        record=record,
        path=path,
        started=started,
        seconds=60 * args.minutes,
        jobs=args.jobs,
    )
    kernels(run, rows)
    times(run, rows)
    engines(run, args.engine_device)
    for line in gpu_record.summary(record):
        console.print(line)
    console.print(f"record: {path}", soft_wrap=True)
    return int(any(stage["wrong"] for stage in record["stages"].values()))


if __name__ == "__main__":
    sys.exit(main())
