# SPDX-License-Identifier: Apache-2.0
"""The benchmark's comparisons run without a GPU, no case ends the run, and its targets are judged
as they are meant."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

HERE = Path(__file__).parent
BENCHMARKS = HERE.parents[1] / "benchmarks"


def run(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "DSV4_OPS")}
    command = [sys.executable, str(BENCHMARKS / "bench_ops.py"), *args]
    return subprocess.run(command, env={**clean, **env}, capture_output=True, text=True, timeout=600)


def test_every_case_equals_its_reference_in_the_interpreter() -> None:
    done = run("--interpret", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].endswith(" cases, 0 wrong, 0 failed")


def test_a_case_that_goes_wrong_is_recorded_and_the_others_run(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    args = ("--interpret", "--source", "broken_cases", "--case-s", "5", "--jobs", "2", "--json", str(record))
    done = run(*args, TRITON_INTERPRET="1", PYTHONPATH=str(HERE))
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "8 cases, 2 wrong, 4 failed"
    rows = {row["kernel"]: row["failed"] or row["wrong"] for row in json.loads(record.read_text())["rows"]}
    assert rows == {
        "first": None,
        "wrong": "output 0: error 1.00e+00 of the largest value",
        "nan": "output 0: NaN or infinity elsewhere",
        "raises": "RuntimeError: no such kernel",
        "unbuilt": "ZeroDivisionError: integer division or modulo by zero",
        "dies": "its process ended with 3",
        "hangs": "nothing came back in 5 s",
        "last": None,
    }


def test_a_process_that_cannot_start_fails_every_case_at_once(tmp_path: Path) -> None:
    (tmp_path / "unstarted_cases.py").write_text(
        "import multiprocessing\nfrom broken_cases import plans\nassert multiprocessing.parent_process() is None\n"
    )
    args = ("--interpret", "--source", "unstarted_cases")
    done = run(*args, TRITON_INTERPRET="1", PYTHONPATH=f"{HERE}:{tmp_path}")
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "8 cases, 0 wrong, 8 failed"
    assert done.stdout.count("could not start: its process ended with 1") == 8


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
def test_without_a_gpu_it_says_so_in_one_line() -> None:
    done = run()
    assert done.returncode == 0
    assert (
        done.stdout == "bench_ops: no GPU here, so nothing was measured; --interpret compares tiny cases without one\n"
    )


def judged(kernel: str, sizes: dict[str, int], **measured: object) -> dict[str, bool | None]:
    sys.path.insert(0, str(BENCHMARKS))
    import op_targets

    row = {
        "kernel": kernel,
        "sizes": sizes,
        "served": True,
        "over_reference": 0.5,
        "of_copy_bandwidth": 0.0,
        "us": 1.0,
        "peers": {},
        **measured,
    }
    return {t.what: t.met for t in op_targets.targets(row)}


class Clock:
    """A stand-in for torch.cuda that counts a call as 8 us, a replay as 2 us, and lets nobody read
    on the host."""

    now_us = 0.0
    strict = False

    def __init__(self, enable_timing: bool = True) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = Clock.now_us

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: Clock) -> float:
        return (end.at - self.at) / 1e3


class Graph:
    def replay(self) -> None:
        Clock.now_us += 2.0


@pytest.fixture
def bench_ops(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark as a module, on a device without a device."""
    sys.path[:0] = [str(BENCHMARKS), str(HERE)]
    import bench_ops
    import triton.testing

    def do_bench(call: Callable[[], object], return_mode: str) -> float:
        assert return_mode == "median"
        before = Clock.now_us
        call()
        return (Clock.now_us - before) / 1e3

    monkeypatch.setattr(triton.testing, "do_bench", do_bench)
    for name, value in {
        "Event": Clock,
        "CUDAGraph": Graph,
        "graph": lambda graph: contextlib.nullcontext(),
        "synchronize": lambda: None,
        "set_sync_debug_mode": lambda mode: setattr(Clock, "strict", mode == "error"),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return bench_ops


def takes(us: float, reads: bool = False) -> Callable[[], torch.Tensor]:
    def call() -> torch.Tensor:
        if reads and Clock.strict:
            raise RuntimeError("called a synchronizing CUDA operation")
        Clock.now_us += us
        return torch.ones(3)

    return call


def test_a_case_is_timed_like_with_like_and_a_peer_may_be_missing_or_wrong(bench_ops: ModuleType) -> None:
    def missing() -> torch.Tensor:
        raise FileNotFoundError("no vllm/_flashmla_C*.so on the path")

    import op_peers
    from op_cases import Case

    peers = {
        "same": op_peers.Peer(takes(16.0, reads=True)),
        "wrong": op_peers.Peer(lambda: torch.zeros(3)),
        "other": op_peers.Peer(lambda: torch.zeros(7), compared=False),
        "missing": op_peers.Peer(missing),
    }
    case = Case(takes(8.0), takes(40.0, reads=True), bytes_moved=4_000, flops=6_000_000, peers=peers)
    row = bench_ops.measure(case, [torch.ones(3)], {"copy_gb_per_s": 4.0, "bf16_tflops": 6.0})
    # The kernel is replayed in 2 us; want and first peer read on the host, so that they are
    # compared as called.
    assert (row["us"], row["eager_us"], row["reference_us"], row["over_reference"]) == pytest.approx(
        (2.0, 8.0, 40.0, 0.2)
    )
    assert (row["gb_per_s"], row["of_copy_bandwidth"], row["of_matmul"]) == pytest.approx((2.0, 0.5, 0.5))
    assert row["peers"]["same"]["ratio"] == pytest.approx(0.5)
    assert row["peers"]["same"]["wrong"] is None
    assert row["peers"]["wrong"]["wrong"] == "output 0: error 1.00e+00 of the largest value"
    assert row["peers"]["other"]["wrong"] is None
    assert row["peers"]["missing"] == {"not_measured": "FileNotFoundError: no vllm/_flashmla_C*.so on the path"}


def test_calls_longer_than_the_cache_matters_are_timed_three_times(bench_ops: ModuleType) -> None:
    before = Clock.now_us
    assert bench_ops.median_us(takes(300_000.0)) == pytest.approx(300_000.0)
    assert Clock.now_us - before == pytest.approx(4 * 300_000.0)


def test_what_was_captured_is_compared_too(bench_ops: ModuleType) -> None:
    """A graph whose replay writes nothing leaves what the capture left."""
    from broken_cases import Case, Plan

    made: list[int] = []

    def kernel() -> torch.Tensor:
        made.append(1)
        return torch.ones(3) if len(made) < 4 else torch.zeros(3)  # called, anew, warm, captured

    row = bench_ops.run_case(Plan("kernel", lambda: Case(kernel)), "cuda", {})
    assert row["wrong"] == "from a graph: output 0: 5.00e-01 of the bytes differ"


def test_the_inputs_of_every_case_are_found_and_overwritten(bench_ops: ModuleType) -> None:
    """A case with another's values at its own addresses computes what the other computes."""
    import op_cases

    for plan in op_cases.plans("cpu", small=True):
        case, other = bench_ops.build(plan), bench_ops.build(plan, seed=1)
        bench_ops.overwrite(case, other)
        ours, theirs = (bench_ops.flat(c.read(c.reference())) for c in (case, other))
        assert bench_ops.not_the_same(ours, theirs) is None, plan


OVER_REFERENCE = "time over the reference's"


@pytest.mark.parametrize(
    ("kernel", "sizes", "measured", "expected"),
    [
        ("swiglu", {"T": 64}, {"over_reference": 1.0}, {OVER_REFERENCE: True}),
        ("swiglu", {"T": 64}, {"over_reference": 1.01}, {OVER_REFERENCE: False}),
        ("experts_mxfp4", {"T": 64}, {"over_reference": 9.0, "served": False}, {}),
        ("index.logits decode", {"T": 8, "N": 32_768}, {}, {OVER_REFERENCE: True}),
        (
            "index.logits decode",
            {"T": 8, "N": 262_144},
            {"of_copy_bandwidth": 0.7, "peers": {"deep_gemm": {"ratio": 1.31, "wrong": None}}},
            {OVER_REFERENCE: True, "share of copy bandwidth": True, "time over DeepGEMM's": False},
        ),
        (
            "index.logits decode",
            {"T": 1, "N": 262_144},
            {"of_copy_bandwidth": 0.69, "peers": {"deep_gemm": {"not_measured": "not there"}}},
            {OVER_REFERENCE: True, "share of copy bandwidth": False, "time over DeepGEMM's": None},
        ),
        (
            "sparse csa",
            {"T": 256, "K": 512},
            {"peers": {"flash_mla": {"ratio": 1.5, "wrong": None}}},
            {OVER_REFERENCE: True, "time over FlashMLA's": True},
        ),
        (
            "sparse csa",
            {"T": 64, "K": 512},
            {"peers": {"flash_mla": {"ratio": 1.5, "wrong": "bad"}}},
            {OVER_REFERENCE: True, "time over FlashMLA's": None},
        ),
        ("sparse csa", {"T": 4096, "K": 512}, {}, {OVER_REFERENCE: True}),
        (
            "topk",
            {"T": 1, "N": 8192},
            {"peers": {"torch.topk": {"ratio": 0.51, "wrong": None}}},
            {OVER_REFERENCE: True, "time over torch.topk's": False},
        ),
        (
            "norm_rope_store",
            {"T": 8192},
            {"of_copy_bandwidth": 0.6},
            {OVER_REFERENCE: True, "share of copy bandwidth": True},
        ),
        (
            "compressor.update csa index",
            {"T": 8192},
            {"of_copy_bandwidth": 0.59},
            {OVER_REFERENCE: True, "share of copy bandwidth": False},
        ),
        ("mhc.post", {"T": 8192}, {"of_copy_bandwidth": 0.61}, {OVER_REFERENCE: True, "share of copy bandwidth": True}),
        ("mhc.post_pre", {"T": 1}, {"us": 10.1}, {OVER_REFERENCE: True, "us": False}),
        ("mhc.post_pre", {"T": 64}, {}, {OVER_REFERENCE: True}),
    ],
)
def test_targets(
    kernel: str, sizes: dict[str, int], measured: dict[str, object], expected: dict[str, bool | None]
) -> None:
    assert judged(kernel, sizes, **measured) == expected


def test_marlins_blocks_hold_every_pair_once_and_one_expert_each() -> None:
    sys.path.insert(0, str(BENCHMARKS))
    import op_peers

    ids = torch.rand(50, 8).argsort(-1)[:, :3]
    pairs, experts, padded = op_peers.aligned_pairs(ids, 8, 16)
    assert padded.tolist() == [pairs.numel()] == [16 * experts.numel()]
    assert experts.numel() == sum(-(-int(n) // 16) for n in torch.bincount(ids.flatten()))
    real = pairs[pairs < 150]
    assert real.sort().values.tolist() == list(range(150))
    owner = experts.repeat_interleave(16)[pairs < 150]
    assert torch.equal(owner.long(), ids.flatten()[real.long()])
