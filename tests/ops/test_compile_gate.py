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

def attend(name, target, stages=None, **constants):
    variants = gate.launched(target)
    found = dict(zip(gate.names(variants), variants, strict=True))["attend " + name]
    changed = {{(found.kernel.arg_names.index(c),): value for c, value in constants.items()}}
    options = replace(found.options, num_stages=stages) if stages else found.options
    changed = replace(found, constants=found.constants | changed, options=options)
    return gate.compile_one(changed, "attend " + name, target).problems

found = {{
    "fp8": problems(narrow, "sm90"),
    "fp8 below sm89": problems(narrow, "sm80"),
    "broken": problems(broken, "sm80"),
    "tensor memory": attend("fp8 csa H64 split", "sm100", HB=64, BN=16),
    "shared memory": attend("bf16 csa H16 split", "sm86", BN=128),
    "spill": attend("fp8 csa H64 split", "sm80", HB=64, BN=16),
    "portable decode": attend("fp8 csa H64 split", "sm80", PTX=False),
    "nothing ahead": attend("fp8 csa H8 split", "sm80", stages=1),
    "as launched": attend("fp8 csa H8 split", "sm80"),
}}
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
    assert "instructions per key, the budget is 215" in problems["portable decode"]
    assert "loads nothing ahead" in problems["nothing ahead"]
    assert problems["as launched"] == ""


SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;                 /* 0x00000a0000017a02 */
        /*0010*/                   LDGSTS.E.BYPASS.128 [R2], [R4.64] ;    /* 0x0000000004027fae */
        /*0020*/                   STS.U8 [R2], R3 ;                      /* 0x0000000302007388 */
        /*0030*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;          /* 0x0000000000007b1d */
        /*0040*/                   HMMA.16816.F32 R4, R8, R12, R4 ;       /* 0x0000000c0804723c */
        /*0050*/              @!P0 BRA 0x40 ;                             /* 0xfffffff000008947 */
        /*0060*/               @P1 BRA 0x10 ;                             /* 0xffffffa000001947 */
        /*0070*/                   LDS.64 R2, [R3] ;                      /* 0x0000000003027984 */
        /*0080*/               @P2 BRA 0x70 ;                             /* 0xffffffe000002947 */
        /*0090*/                   EXIT ;                                 /* 0x000000000000794d */
        /*00a0*/                   BRA 0xa0;                              /* 0xfffffff000007947 */
        /*00b0*/                   NOP;                                   /* 0x0000000000007918 */
"""

GCN = """
	s_load_dword s0, s[4:5], 0x0
.LBB0_1:
	ds_write_b8 v0, v1
	s_barrier
	v_mfma_f32_16x16x16_bf16_1k a[0:3], v[0:1], v[2:3], a[0:3]
	s_cbranch_scc1 .LBB0_1
	s_endpgm
"""


def test_the_innermost_loops_are_counted() -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from generated_code import Code, read_amdgcn, read_sass

    program = read_sass(SASS)
    assert program.whole == Code(11, barriers=1, matrix=1, async_copies=1, narrow_shared=1)
    assert program.loops == (Code(2, matrix=1), Code(2))  # that around the first is not one, nor the trap
    program = read_amdgcn(GCN)
    assert program.whole == Code(6, barriers=1, matrix=1, narrow_shared=1)
    assert program.loops == (Code(4, barriers=1, matrix=1, narrow_shared=1),)
