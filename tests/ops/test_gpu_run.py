# SPDX-License-Identifier: Apache-2.0
"""`make gpu` without a GPU: it refuses in one line, and all its stages run over a stand-in
(`stand_in_gpu`) and over engines on the CPU, so that none runs for the first time on a card."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.stand_in_gpu import NAME

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu_engines  # noqa: E402
import gpu_record  # noqa: E402


def run(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_", "DSV4_", "STAND_IN"))}
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), *args]
    path = os.pathsep.join((str(ROOT), str(BENCHMARKS)))
    variables = clean | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | env
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=900)


def stand_in(results: Path, cases: str, *args: str, **env: str) -> tuple[subprocess.CompletedProcess[str], dict]:
    env = {"TRITON_INTERPRET": "1", "STAND_IN_CASES": cases} | env
    done = run("--source", "tests.support.stand_in_gpu", "--results", str(results), *args, **env)
    (file,) = results.glob("*.json")
    return done, json.loads(file.read_text())


@pytest.fixture
def without_engines(tmp_path: Path) -> dict[str, str]:
    """Variables under which no engine counts as installed."""
    (tmp_path / "sitecustomize.py").write_text(
        "from importlib import metadata\n"
        "real = metadata.version\n"
        "def version(name):\n"
        "    if name in ('vllm', 'sglang'):\n"
        "        raise metadata.PackageNotFoundError(name)\n"
        "    return real(name)\n"
        "metadata.version = version\n"
    )
    return {"PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT), str(BENCHMARKS)))}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_what_to_do() -> None:
    done = run()
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(r"gpu: torch \S+ (is a CPU build: install|sees no GPU: see) .*\n", done.stderr), done.stderr


@pytest.mark.parametrize("package", ["torch", "triton", "rich"])
def test_a_package_that_is_missing_is_named(package: str, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util\n"
        "find = importlib.util.find_spec\n"
        f"importlib.util.find_spec = lambda name, *rest: None if name == {package!r} else find(name, *rest)\n"
    )
    done = run(PYTHONPATH=str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.startswith(f"gpu: no {package} in {sys.executable}: pip install {package}, or ")
    assert done.stderr.count("\n") == 1


def test_every_stage_runs_on_a_stand_in(tmp_path: Path, without_engines: dict[str, str]) -> None:
    """Kernels in the interpreter, graphs on tapes that are replayed with other values, times by a
    clock; and a kernel that repeats what was captured is wrong."""
    options = {"STAND_IN_BROKEN": "1", **without_engines}
    done, record = stand_in(tmp_path / "results", "swiglu,topk", "--jobs", "1", **options)
    assert done.returncode == 1, done.stdout + done.stderr
    gpu_record.check(record)
    assert record["gpu"] == NAME
    assert list(record["stages"]) == ["kernels", "times", "engines"]
    cases = {row["kernel"]: row for row in record["cases"]}
    broken = cases.pop("repeats")
    assert broken["wrong"].startswith("from a graph: output 0: ")
    assert record["stages"]["kernels"]["wrong"] == [f"repeats none : {broken['wrong']}"]
    assert "us" not in broken, "what is wrong is not timed"
    assert set(cases) == {"swiglu", "topk", "route_topk"}
    for row in cases.values():
        assert (row["failed"], row["wrong"], row["replayed"]) == (None, None, True)
        assert row["graph_us"] > 0
    # The case with more targets is timed first; its peer is there.
    assert cases["topk"]["peers"]["torch.topk"]["ratio"] > 0
    assert sum(record["judged"].values()) == 4
    assert "engines: none is installed here, none was asked" in done.stdout
    assert max(map(len, done.stdout.splitlines()[-8:-1])) <= 80
    (row,) = gpu_record.readme_rows(tmp_path / "results")
    assert row.startswith("| Stand-in GPU, driver unknown | 3 of 4 kernel cases right, ")


def test_what_the_time_does_not_reach_is_named_and_fails_nothing(
    tmp_path: Path, without_engines: dict[str, str]
) -> None:
    done, record = stand_in(tmp_path / "results", "swiglu,mhc.head", "--minutes", "0", **without_engines)
    assert done.returncode == 0, done.stdout + done.stderr
    assert record["stages"]["kernels"]["dropped"] == ["mhc.head tiny T=2", "swiglu tiny T=2"]
    assert "not reached: swiglu tiny T=2" in done.stdout
    gpu_record.check(record)


@pytest.mark.long
@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_an_engine_with_a_tiny_checkpoint_is_held_against_the_reference(engine: str, tmp_path: Path) -> None:
    """Through the stage's own code, on a CPU, in fp32."""
    folder, reference = gpu_engines.prepare(tmp_path, "cpu")
    row = gpu_engines.ask(engine, folder, reference, "cpu", 240.0)
    assert row["wrong"] is None, row
    assert row["compared"] == sum(gpu_engines.PROMPTS) - 3 + 3 * gpu_engines.NEW_TOKENS


SERVED: dict[str, Any] = {
    "model_class": "M", "worst": 9.0, "mean": 0.01, "mean_decoded": 0.02, "limit": 0.1, "graphs": True, "operators": ["triton"]
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "served", "wrong"),
    [
        ({}, True, None),
        ({}, False, "served by M, not by dsv4"),
        ({"mean": 0.2}, True, "mean difference 0.2 from the fp32 reference, at most 0.1 is right"),
        ({"mean": float("nan")}, True, "mean difference nan from the fp32 reference, at most 0.1 is right"),
        ({"mean_decoded": 0.3}, True, "mean_decoded difference 0.3 from the fp32 reference, at most 0.1 is right"),
        ({"graphs": False}, True, "no graph was captured"),
        ({"operators": ["reference", "triton"]}, True, "operators are served by reference, triton"),
    ],
)
def test_a_server_is_judged(change: dict[str, Any], served: bool, wrong: str | None) -> None:
    assert gpu_engines.judge(SERVED | change, served, "cuda") == wrong


class StandInServer:
    """Answers as a server of dsv4 on a GPU."""

    ready_s = 12.34

    def __init__(self, command: list[str], env: dict[str, str], ready_timeout_s: float) -> None:
        assert command[1:3] == ["serve", "FOLDER"]
        assert env["DSV4_MODE"] == "on"

    def __enter__(self) -> StandInServer:
        return self

    def __exit__(self, *exc: object) -> None: ...

    def get(self, path: str) -> dict[str, Any]:
        ops = {"topk": {"impl": "triton"}}
        return {"workers": [{"served_by_dsv4": True, "model_class": "M", "kv_format": "fp8_ds_mla", "ops": ops}]}

    def log(self) -> str:
        return "Graph capturing finished in 3 secs"


def test_a_servers_answers_become_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was decoded is judged apart from the many more tokens of prompts."""
    from served import Engine

    def prompt_logprobs(server: Any, ids: list[int]) -> list[float]:
        return [-1.0] * (len(ids) - 1)

    def generate(server: Any, prompts: list[list[int]], new: int) -> list[tuple[list[int], list[float]]]:
        return [([7] * new, [-1.5] * new) for _ in prompts]

    engine = Engine("vllm", lambda *args: [], prompt_logprobs, generate)
    monkeypatch.setattr(gpu_engines, "Server", StandInServer)
    monkeypatch.setitem(gpu_engines.BY_NAME, "vllm", engine)
    row = gpu_engines.ask("vllm", Path("FOLDER"), lambda ids: torch.full((len(ids) - 1,), -1.0), "cuda", 60.0)
    assert (row["mean"], row["mean_decoded"], row["worst"], row["graphs"]) == (0.0, 0.5, 0.5, True)
    assert row["compared"] == sum(gpu_engines.PROMPTS) - 3 + 3 * gpu_engines.NEW_TOKENS
    assert row["wrong"] == "mean_decoded difference 0.5 from the fp32 reference, at most 0.18 is right"


def test_a_server_that_does_not_start_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_engines, "command", lambda *args: [sys.executable, "-c", "raise SystemExit('no card')"])
    row = gpu_engines.ask("vllm", tmp_path, lambda ids: torch.zeros(0), "cuda", 30.0)
    assert row["wrong"] == "the server ended with exit code 1: no card"


def test_readmes_table_is_made_of_the_records() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = gpu_record.readme_rows()
    told = [line for line in text.splitlines() if "](benchmarks/results/gpu-" in line]
    assert told == rows, "run python benchmarks/gpu_record.py"
    assert (gpu_record.NOTHING_MEASURED in text.replace("\n", " ")) == (not rows)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schema_version": 0}, "schema_version 0, not 1: run `make gpu` again"),
        ({"more": 1}, r"other keys: \['more'\]"),
        ({"cases": {}}, "cases is dict, not list"),
        ({"judged": {"met": 3, "missed": 0, "not_measured": 0}}, "judged does not follow from the cases"),
    ],
)
def test_a_record_that_is_none_is_refused_by_name(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    machine = dict.fromkeys(("gpu", "driver", "torch", "triton", "python", "commit", "command"), "x")
    record = gpu_record.empty(machine, {"vllm": None, "sglang": None}, "none")
    gpu_record.check(record)
    gpu_record.write(tmp_path / "gpu-x.json", record | change)
    with pytest.raises(ValueError, match=f"^gpu-x.json: {said}"):
        gpu_record.readme_rows(tmp_path)
