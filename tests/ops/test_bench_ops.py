# SPDX-License-Identifier: Apache-2.0
"""The benchmark's comparisons run without a GPU, and without one it measures nothing and says so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks/bench_ops.py"


def run(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "DSV4_OPS")}
    return subprocess.run([sys.executable, str(SCRIPT), *args], env={**clean, **env}, capture_output=True, text=True, timeout=300)


def test_every_case_equals_its_twin_in_the_interpreter() -> None:
    done = run("--interpret", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].endswith(" cases, 0 wrong")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
def test_without_a_gpu_it_says_so_in_one_line() -> None:
    done = run()
    assert done.returncode == 0
    assert done.stdout == "bench_ops: no GPU here, so nothing was measured; --interpret compares tiny cases without one\n"
