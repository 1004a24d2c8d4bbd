# SPDX-License-Identifier: Apache-2.0
"""`make kernels` fails on what a GPU would refuse, or would run as something else. The compiler
needs a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from dsv4.ops.kernels import KERNEL_MODULES, import_kernels

ROOT = Path(__file__).parents[2]
SCRIPT = """
import json, sys
sys.path[:0] = [{root!r}, {root!r} + "/benchmarks"]
import compile_kernels as gate
import triton
import triton.language as tl
from dataclasses import replace
from dsv4.ops.kernels import Shipped
from dsv4.ops.attention import split_kv

@triton.jit
def narrow(x, y, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at).to(tl.float8e4nv, bitcast=True).to(tl.float32))

@triton.jit
def broken(x, BLOCK: tl.constexpr):
    tl.store(x + tl.arange(0, BLOCK), nothing)

attend = next(s for s in split_kv.SHIPPED if s.name == "attend csa fp8 H64 split" and s.vendor == "nvidia")
big = replace(attend, constants={{**attend.constants, "HB": 64, "BN": 16}})
plain = next(s for s in split_kv.SHIPPED if "bf16 H128" in s.name and s.vendor == "nvidia")
wide = replace(plain, constants={{**plain.constants, "BN": 64}})
found = {{
    "fp8": gate.compile_one(Shipped("fp8", narrow, {{"x": "*u8", "y": "*fp32"}}, {{"BLOCK": 128}}, 4), "sm90"),
    "fp8 below sm89": gate.compile_one(Shipped("fp8", narrow, {{"x": "*u8", "y": "*fp32"}}, {{"BLOCK": 128}}, 4), "sm80"),
    "broken": gate.compile_one(Shipped("broken", broken, {{"x": "*fp32"}}, {{"BLOCK": 128}}, 4), "sm80"),
    "tensor memory": gate.compile_one(big, "sm100"),
    "shared memory": gate.compile_one(wide, "sm86"),
    "spill": gate.compile_one(replace(attend, spill={{}}), "sm120"),
}}
json.dump({{name: row.problems for name, row in found.items()}}, sys.stdout)
"""


MOST_PARAMETERS = 25  # of a kernel, constants included; more want a NamedTuple


def test_no_kernel_takes_more_parameters_than_a_reader_can() -> None:
    shipped = [
        s for m in import_kernels(KERNEL_MODULES) if "compressor" not in m.__name__ for s in getattr(m, "SHIPPED", ())
    ]
    assert {s.name: len(s.kernel.arg_names) for s in shipped if len(s.kernel.arg_names) > MOST_PARAMETERS} == {}


def test_the_gate_names_every_kind_of_failure(tmp_path: Path) -> None:
    script = tmp_path / "gate.py"
    script.write_text(SCRIPT.format(root=str(ROOT)))
    env = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")} | {
        "TRITON_CACHE_DIR": str(tmp_path / "cache")
    }
    done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    problems = {name: " ".join(found) for name, found in json.loads(done.stdout).items()}
    assert "uses f8E4M3FN" in problems["fp8"]
    assert "does not compile" in problems["fp8 below sm89"]
    assert "does not compile" in problems["broken"]
    assert "nothing" in problems["broken"]
    assert "columns of tensor memory" in problems["tensor memory"]
    assert "a stub" in problems["tensor memory"]
    assert "KiB of shared memory, the device has 99" in problems["shared memory"]
    assert "the budget beside the kernel is 0" in problems["spill"]
