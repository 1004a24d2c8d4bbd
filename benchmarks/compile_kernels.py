# SPDX-License-Identifier: Apache-2.0
"""Cross-compile every kernel as it is launched for every supported GPU, with none at hand, and
bound its resources.

    python benchmarks/compile_kernels.py [--targets sm80,gfx942] [--only TEXT] [--json FILE]

What is compiled is what engines launch to warm up, recorded on a GPU that is not here: types,
constants, divisibility and options are those of the launch, by Triton's own rules. Prints
registers, spilled bytes per lane, shared memory and, where a kernel walks keys, the instructions
that all warps of a program execute for each of them. Fails when a kernel does not compile, does not
fit the device, spills or executes more than its budget, leaves matrix units unused, is an empty
stub, names an fp8 type, or is launched by nobody. That something compiles is no proof that it
loads: Triton checks shared and tensor memory only on the GPU, so both are checked here.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    sys.exit("unset TRITON_INTERPRET: it replaces the compiler")
os.environ["DSV4_OPS"] = "triton"

import torch
import triton
from generated_code import Code, Program, read_amdgcn, read_sass
from triton import knobs

from dsv4.model.config import V4Config
from dsv4.model.kv_layout import CacheFormats, StateMapping
from dsv4.ops import attention, moe
from dsv4.ops.kernels import KERNEL_MODULES, launched_kernels
from dsv4.ops.launches import Variant, recorded
from dsv4.ops.warm_up import ServedModel, allocate, warm_up

KIB = 1 << 10
# Shared memory one block may use: CUDA programming guide, table of compute capabilities; LDS of a
# workgroup for AMD.
SHARED_LIMIT = {
    "sm80": 163 * KIB, "sm86": 99 * KIB, "sm89": 99 * KIB, "sm90": 227 * KIB, "sm100": 227 * KIB, "sm103": 227 * KIB,
    "sm120": 99 * KIB, "gfx942": 64 * KIB, "gfx950": 160 * KIB,
}  # fmt: skip
LIKE = {"sm89": "sm86", "sm103": "sm100"}  # they compile alike, but for some registers; budgets are the second's
TENSOR_MEMORY_COLUMNS = 512
STUB_INSTRUCTIONS = 24  # Triton emits a stub of about 16 instead of a kernel that overflows tensor memory

# Bytes a lane may spill, by kernel and target; what was measured, not a wish.
SPILLS: dict[str, dict[str, int]] = {
    "compress_store": {"sm86": 4},
    "summary": {"sm80": 16},
}

# The most instructions of a loop, times the warps that execute it, for each of its keys, by kernel
# and what its heads and keys are; prefill_logits: for each token as well. Those of NVIDIA targets.
INSTRUCTIONS_PER_KEY = {
    "attend fp8 H8": 135, "attend fp8 H16": 135, "attend bf16 H16": 135, "attend fp8 H64": 215,
    "decode_logits fp8-keys": 45, "decode_logits mxfp4-keys": 60, "decode_logits bf16": 45,
    "prefill_logits fp8-keys": 30, "prefill_logits mxfp4-keys": 32, "prefill_logits bf16": 25,
}  # fmt: skip
MORE_FROM_SM100 = 5  # instructions per key
# On sm100 and sm103 the products of scores pass through tensor memory, whose loads and waits count;
# both have native V4 in the engines.
MORE_IN_TENSOR_MEMORY = {"decode_logits": 12, "prefill_logits": 21}
LOADS_AHEAD = {"attend fp8 H8", "attend fp8 H16", "attend bf16 H16"}  # by asynchronous copies, in the loop

CONFIGS = Path(__file__).parents[1] / "recipes" / "configs"


@dataclass(frozen=True)
class Deployment:
    """A released model as one rank of an engine serves it."""

    checkpoint: str
    tp: int
    mapping: StateMapping
    formats: CacheFormats
    drafted: int = 0

    def served(self) -> ServedModel:
        return ServedModel(
            config=V4Config.from_path(CONFIGS / f"DeepSeek-V4-{self.checkpoint}.json"),
            tp=self.tp,
            dtype=torch.bfloat16,
            device=torch.device("cpu"),
            mapping=self.mapping,
            index_format=self.formats.index,
            max_context=1 << 20,
            routed_ids=torch.int64 if self.mapping is StateMapping.RING else None,
            drafted=self.drafted,
        )


FP8, MXFP4, BF16 = CacheFormats.packed(2, False), CacheFormats.packed(2, True), CacheFormats.plain(2)
DEPLOYMENTS = (
    Deployment("Flash", 1, StateMapping.SUMMARY, FP8),
    Deployment("Flash", 8, StateMapping.PAGED, FP8),
    Deployment("Flash", 4, StateMapping.PAGED, FP8),
    Deployment("Pro", 8, StateMapping.RING, BF16),
    Deployment("Pro", 2, StateMapping.SUMMARY, MXFP4),
    Deployment("Flash", 8, StateMapping.SUMMARY, FP8, drafted=3),
)


@dataclass
class Row:
    """What one configuration costs on one target. spill: bytes per lane stored to local memory."""

    kernel: str
    target: str
    registers: int = 0
    spill: int = 0
    shared: int = 0
    instructions: int = 0
    warps: int = 0
    keys: int | None = None
    code: Program | None = None
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)

    def loops(self) -> list[Code]:
        """Those that walk keys: where there are matrix products, they have some."""
        assert self.code is not None
        return [loop for loop in self.code.loops if loop.matrix] or [*self.code.loops]

    def per_key(self) -> int | None:
        """Instructions that a program's warps execute for each key of its longest loop."""
        if not self.keys or not self.loops():
            return None
        return round(max(loop.instructions for loop in self.loops()) * self.warps / self.keys)


def compile_one(variant: Variant, name: str, target: str) -> Row:
    """Compile one kernel as it is launched on one target, and judge it."""
    row, start = Row(name, target), time.monotonic()
    nvidia = target.startswith("sm")
    capability = int(target[2:]) if nvidia else 0
    try:
        compiled = variant.compile(target)
    except Exception as error:
        e: BaseException = error
        while e.__cause__ is not None:
            e = e.__cause__
        row.problems.append(f"does not compile: {type(e).__name__}: {' '.join(str(e).split())[-300:]}")
        return row
    row.shared, row.warps = compiled.metadata.shared, variant.options.num_warps
    row.keys = _constants(variant).get("BN")
    if nvidia:
        _read_cubin(row, compiled.asm["cubin"], compiled.asm["ptx"], capability)
        tensor_memory = getattr(compiled.metadata, "tmem_size", None) or 0
        if tensor_memory > TENSOR_MEMORY_COLUMNS:
            row.problems.append(f"{tensor_memory} columns of tensor memory, the device has {TENSOR_MEMORY_COLUMNS}")
    else:
        _read_amdgcn(row, compiled.asm["amdgcn"])
    _judge(row, variant, compiled.asm["ttir"])
    row.seconds = round(time.monotonic() - start, 1)
    return row


def _judge(row: Row, variant: Variant, ttir: str) -> None:
    if row.shared > SHARED_LIMIT[row.target]:
        row.problems.append(
            f"{row.shared / KIB:.0f} KiB of shared memory, the device has {SHARED_LIMIT[row.target] / KIB:.0f}"
        )
    if 0 < row.instructions < STUB_INSTRUCTIONS:
        row.problems.append(f"a stub of {row.instructions} instructions, not a kernel")
    _judge_loop(row)
    budget = SPILLS.get(variant.name.removesuffix("_kernel"), {}).get(LIKE.get(row.target, row.target), 0)
    if row.spill > budget:
        row.problems.append(f"spills {row.spill} bytes a lane, the kernel's budget is {budget}")
    fp8 = set(re.findall(r"f8E\d\w+", ttir))
    if fp8:
        row.problems.append(f"uses {', '.join(sorted(fp8))}, which sm80 and sm86 do not have")


def _judge_loop(row: Row) -> None:
    """Only NVIDIA's instructions have budgets."""
    budget = next((name for name in INSTRUCTIONS_PER_KEY if set(name.split()) <= set(row.kernel.split())), None)
    per_key = row.per_key()
    if budget is None or per_key is None or not row.target.startswith("sm"):
        return
    more = MORE_FROM_SM100 if int(row.target[2:]) >= 100 else 0
    if LIKE.get(row.target, row.target) == "sm100":
        more = MORE_IN_TENSOR_MEMORY.get(budget.split()[0], more)
    most = INSTRUCTIONS_PER_KEY[budget] + more
    if per_key > most:
        row.problems.append(f"{per_key} instructions per key, the budget is {most}")
    if not all(loop.matrix for loop in row.loops()):
        row.problems.append("a loop over keys without matrix products")
    if budget in LOADS_AHEAD and not all(loop.async_copies for loop in row.loops()):
        row.problems.append("a loop over keys that loads nothing ahead")


def _read_cubin(row: Row, cubin: bytes, ptx: str, capability: int) -> None:
    """Registers and spills from ptxas, instructions from the object that would be loaded."""
    arch = re.search(r"\.target\s+(sm_\w+)", ptx)
    assert arch is not None
    ptxas = knobs.nvidia.ptxas_blackwell.path if capability >= 100 else knobs.nvidia.ptxas.path
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [ptxas, "-v", f"--gpu-name={arch[1]}", str(source), "-o", f"{folder}/kernel.cubin"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        Path(folder, "loaded.cubin").write_bytes(cubin)
        sass = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "-sass", f"{folder}/loaded.cubin"], capture_output=True, text=True
        ).stdout
    row.registers = _number(r"Used (\d+) registers", said)
    row.spill = _number(r"(\d+) bytes spill stores", said)
    row.code = read_sass(sass)
    row.instructions = row.code.whole.instructions


def _read_amdgcn(row: Row, text: str) -> None:
    row.registers = _number(r"\.vgpr_count:\s+(\d+)", text)
    row.spill = 4 * _number(r"\.vgpr_spill_count:\s+(\d+)", text)
    row.code = read_amdgcn(text)
    row.instructions = row.code.whole.instructions


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else 0


# ---- what is launched ----------------------------------------------------------------------


def launched(target: str) -> list[Variant]:
    """Every variant that the deployments launch on a target, and what only the library offers."""
    with recorded(target) as found:
        for deployment in DEPLOYMENTS:
            model = deployment.served()
            warm_up(model, allocate(model, deployment.formats))
        attention.output_a(
            torch.zeros(1, 64, 512, dtype=torch.bfloat16),
            torch.zeros(1, 64),
            torch.zeros(8, 1024, 4096, dtype=torch.bfloat16),
        )
        if target.startswith("gfx"):
            experts(1)
            experts(1024)
    return list({variant.key: variant for variant in found}.values())


def experts(tokens: int) -> None:
    """Flash's, with no token routed to any; on NVIDIA GPUs the engines have kernels of their
    own."""
    w13, s13, w2, s2 = (torch.zeros(1, dtype=torch.uint8).expand(256, *shape) for shape in EXPERT_SHAPES)
    x, weights = torch.zeros(tokens, 4096, dtype=torch.bfloat16), torch.zeros(tokens, 6)
    nobody = torch.full((tokens, 6), -1, dtype=torch.int32)
    moe.experts_mxfp4(x, w13, s13, w2, s2, weights=weights, ids=nobody, limit=10.0)


EXPERT_SHAPES = ((4096, 2048), (4096, 128), (4096, 1024), (4096, 64))  # of w1|w3, their scales, w2, its scales


# What a reader calls a constant of a kernel; those of neither list go without saying.
WORDS = {
    ("entries.pages", None): "window", ("entries.page_rows", 64): "csa", ("entries.page_rows", 2): "hca",
    ("window.format", 0): "bf16", ("window.format", 1): "fp8", ("ONE_SPLIT", True): "whole", ("ONE_SPLIT", False): "split",
    ("FORMAT", 0): "bf16", ("FORMAT", 1): "fp8", ("FORMAT", 2): "fp8-keys", ("FORMAT", 3): "mxfp4-keys",
    ("first.entries.FORMAT", 0): "bf16", ("first.entries.FORMAT", 1): "fp8",
    ("second.entries.FORMAT", 0): "bf16-keys", ("second.entries.FORMAT", 2): "fp8-keys",
    ("second.entries.FORMAT", 3): "mxfp4-keys", ("RATIO", 4): "csa", ("RATIO", 128): "hca",
    ("first.DRAFTED", 3): "k3", ("SAVE", True): "saving", ("SAVE", False): "saved", ("FINAL", True): "last", ("FINAL", False): "first",
}  # fmt: skip
SHOWN = {"H": "H", "BD": "D", "N": "N", "CHUNK": "", "WIDTH": "W", "BM": "M", "LEVEL": "level", "GROUPS": "caches"}
PARTS = {(True, False): "tails", (False, True): "entries", (True, True): "decode"}  # TAILS, POOL of `summary`


def names(variants: list[Variant]) -> list[str]:
    """A name for each, by its kernel and its constants; a number tells apart those that differ in
    what Triton knows of their arguments."""
    found: list[str] = []
    for variant in variants:
        constants = _constants(variant)
        words = [
            WORDS.get((c, v)) or (f"{SHOWN[c]}{v}" if c in SHOWN else "")
            for c, v in constants.items()
            if c in SHOWN or (c, v) in WORDS
        ]
        words += [PARTS[constants["TAILS"], constants["POOL"]]] if "TAILS" in constants else []
        found.append(" ".join([variant.name.removesuffix("_kernel"), *words]))
    return [f"{n} {found[: i + 1].count(n)}" if n in found[:i] else n for i, n in enumerate(found)]


def _constants(variant: Variant) -> dict[str, Any]:
    """By name, those of groups as group.element, of several groups as groups.1.element."""
    found = {}
    for path, value in variant.constants.items():
        name, signature = variant.kernel.arg_names[path[0]], list(variant.signature.values())[path[0]]
        for at in path[1:]:
            name, signature = f"{name}.{getattr(type(signature), '_fields', range(at + 1))[at]}", signature[at]
        found[name] = getattr(value, "value", value)
    return found


def _loop(row: Row) -> str:
    """What its longest loop over keys has: instructions per key, barriers, matrix products,
    asynchronous copies, narrow accesses of shared memory."""
    if row.code is None or row.per_key() is None:
        return ""
    loop = max(row.loops(), key=lambda each: each.instructions)
    return f" [{row.per_key()} {loop.barriers} {loop.matrix} {loop.async_copies} {loop.narrow_shared}]"


_queue: dict[str, list[tuple[str, Variant]]] = {}  # what forked workers compile from: kernels cannot be pickled


def _compile_queued(target: str, index: int) -> Row:
    name, variant = _queue[target][index]
    return compile_one(variant, name, target)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default=",".join(SHARED_LIMIT), help="comma-separated; default: %(default)s")
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--jobs", type=int, default=1, help="compilations at a time")
    parser.add_argument("--json", type=Path, help="write the table here")
    args = parser.parse_args()
    targets = args.targets.split(",")
    unknown = set(targets) - set(SHARED_LIMIT)
    if unknown:
        parser.error(f"unknown targets {', '.join(sorted(unknown))}; known are {', '.join(SHARED_LIMIT)}")
    start, rows, failures = time.monotonic(), [], []
    for target in targets:
        variants = launched(target)
        missing = {k.__name__ for k in launched_kernels(KERNEL_MODULES)} - {v.name for v in variants}
        missing -= set() if target.startswith("gfx") else {"gate_up_kernel", "down_kernel"}
        failures += [f"{name} on {target}: nothing launches it, so it was not compiled" for name in sorted(missing)]
        _queue[target] = [entry for entry in zip(names(variants), variants, strict=True) if args.only in entry[0]]
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        print(f"triton {triton.__version__}; registers / spilled bytes per lane / shared KiB", flush=True)
        print("[instructions per key, in its loop: barriers, matrix products, async copies, narrow shared]", flush=True)
        pool = ProcessPoolExecutor(args.jobs, mp_context=get_context("fork"))
        for name in sorted({name for queue in _queue.values() for name, _ in queue}):
            wanted = [(t, i) for t in targets for i, (queued, _) in enumerate(_queue[t]) if queued == name]
            found = list(pool.map(_compile_queued, *zip(*wanted, strict=True)))
            rows += found
            cells = (
                f"{r.target} {r.registers}/{r.spill}/{r.shared / KIB:.0f}{_loop(r)}{' FAIL' if r.problems else ''}"
                for r in found
            )
            print(f"{name:34s} {'  '.join(cells)}", flush=True)
    pool.shutdown()
    failures += [f"{r.kernel} on {r.target}: {problem}" for r in rows for problem in r.problems]
    if args.json:
        args.json.write_text(
            json.dumps({"triton": triton.__version__, "rows": [asdict(r) for r in rows]}, indent=1) + "\n"
        )
    print(f"{len(rows)} compilations in {time.monotonic() - start:.0f} s, {len(failures)} failures")
    print("".join(f"{failure}\n" for failure in failures), end="", file=sys.stderr)
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
