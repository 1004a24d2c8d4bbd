# SPDX-License-Identifier: Apache-2.0
"""`make kernels` fails on what a GPU would refuse, or would run as something else. The compiler
needs a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from dsv4.ops.kernels import KERNEL_MODULES, launched_kernels

ROOT = Path(__file__).parents[2]
SCRIPT = """
import json, sys
sys.path[:0] = [{root!r}, {root!r} + "/benchmarks"]
import compile_kernels as gate
import torch
import triton
import triton.language as tl
from dataclasses import replace
from dsv4.ops.launches import recorded

@triton.jit
def narrow(x, y, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at).to(tl.float8e4nv, bitcast=True).to(tl.float32))

@triton.jit
def broken(x, y, BLOCK: tl.constexpr):
    tl.store(x + tl.arange(0, BLOCK), nothing)

def problems(kernel, target):
    with recorded(target) as found:
        kernel[(1,)](torch.zeros(128, dtype=torch.uint8), torch.zeros(128), BLOCK=128)
    return gate.compile_one(found[0], kernel.__name__, target).problems

def attend(name, target, **constants):
    variants = gate.launched(target)
    found = dict(zip(gate.names(variants), variants, strict=True))["attend " + name]
    changed = {{(found.kernel.arg_names.index(c),): value for c, value in constants.items()}}
    return gate.compile_one(replace(found, constants=found.constants | changed), name, target).problems

found = {{
    "fp8": problems(narrow, "sm90"),
    "fp8 below sm89": problems(narrow, "sm80"),
    "broken": problems(broken, "sm80"),
    "tensor memory": attend("fp8 csa H64 split", "sm100", HB=64, BN=16),
    "shared memory": attend("bf16 csa H16 split", "sm86", BN=128),
}}
gate.SPILLS = {{}}
found["spill"] = attend("fp8 csa H64 split", "sm120")
json.dump(found, sys.stdout)
"""


MOST_PARAMETERS = 25  # of a kernel, constants included; more want a NamedTuple


def test_no_kernel_takes_more_parameters_than_a_reader_can() -> None:
    kernels = [k for k in launched_kernels(KERNEL_MODULES) if "compressor" not in k.fn.__module__]
    assert {k.__name__: len(k.arg_names) for k in kernels if len(k.arg_names) > MOST_PARAMETERS} == {}


def test_the_gate_names_every_kind_of_failure(tmp_path: Path) -> None:
    script = tmp_path / "gate.py"
    script.write_text(SCRIPT.format(root=str(ROOT)))
    env = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")} | {
        "TRITON_CACHE_DIR": str(tmp_path / "cache")
    }
    done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    problems = {name: " ".join(said) for name, said in json.loads(done.stdout).items()}
    assert "uses f8E4M3FN" in problems["fp8"]
    assert "does not compile" in problems["fp8 below sm89"]
    assert "does not compile" in problems["broken"]
    assert "nothing" in problems["broken"]
    assert "columns of tensor memory" in problems["tensor memory"]
    assert "a stub" in problems["tensor memory"]
    assert "KiB of shared memory, the device has 99" in problems["shared memory"]
    assert "the kernel's budget is 0" in problems["spill"]
