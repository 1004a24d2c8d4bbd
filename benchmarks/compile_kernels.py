# SPDX-License-Identifier: Apache-2.0
"""Cross-compile every shipped kernel configuration for every supported GPU, with none at hand, and
bound its resources.

    python benchmarks/compile_kernels.py [--targets sm80,gfx942] [--only TEXT] [--json FILE]

Prints registers, spilled bytes per lane and shared memory. Fails when a configuration does not
compile, does not fit the device, spills more than the budget beside the kernel, is an empty stub,
or names an fp8 type. That something compiles is no proof that it loads: Triton checks shared and
tensor memory only on the GPU, so both are checked here.
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
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path

if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    sys.exit("unset TRITON_INTERPRET: it replaces the compiler")

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dsv4.ops.kernels import KERNEL_MODULES, Shipped, import_kernels

KIB = 1 << 10
# Shared memory one block may use: CUDA programming guide, table of compute capabilities; LDS of a
# workgroup for AMD.
SHARED_LIMIT = {
    "sm80": 163 * KIB, "sm86": 99 * KIB, "sm89": 99 * KIB, "sm90": 227 * KIB, "sm100": 227 * KIB, "sm103": 227 * KIB,
    "sm120": 99 * KIB, "gfx942": 64 * KIB, "gfx950": 160 * KIB,
}  # fmt: skip
LIKE = {"sm89": "sm86", "sm103": "sm100"}  # they compile alike, but for some registers; budgets are the second's
TENSOR_MEMORY_COLUMNS = 512
# Triton makes a constant of every integer argument that is 1, as the number of tokens often is:
# another kernel, which must compile too. Once per configuration is enough, since that fails in
# Triton's front end.
ONES_ON = "sm80"
STUB_INSTRUCTIONS = 24  # Triton emits a stub of about 16 instead of a kernel that overflows tensor memory


@dataclass
class Row:
    """What one configuration costs on one target. spill: bytes per lane stored to local memory."""

    kernel: str
    target: str
    registers: int = 0
    spill: int = 0
    shared: int = 0
    instructions: int = 0
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)


def compile_one(shipped: Shipped, target: str, ones: bool = False) -> Row:
    """Compile one configuration for one target and judge it. ones: with every integer as 1, see
    `ONES_ON`."""
    row, start = Row(shipped.name + (" ones" if ones else ""), target), time.monotonic()
    nvidia = target.startswith("sm")
    capability = int(target[2:]) if nvidia else 0
    options = {"num_warps": shipped.num_warps, "num_stages": shipped.num_stages, "enable_fp_fusion": True}
    if nvidia:
        # Without it ptxas settles on 128 registers or fewer once a kernel spills, although 255 are
        # allowed.
        options["maxnreg"] = min(255, 65536 // (32 * shipped.num_warps))
    arguments = shipped.arguments(target, ones)
    source = ASTSource(
        fn=shipped.kernel,
        signature=shipped.signature(arguments),
        constexprs={a.path: a.value for a in arguments if a.type == "constexpr"},
        attrs={a.path: [["tt.divisibility", 16]] for a in arguments if a.aligned},
    )
    gpu = GPUTarget("cuda", capability, 32) if nvidia else GPUTarget("hip", target, 64)
    try:
        compiled = triton.compile(source, target=gpu, options=options)
    except Exception as error:
        e: BaseException = error
        while e.__cause__ is not None:
            e = e.__cause__
        row.problems.append(f"does not compile: {type(e).__name__}: {' '.join(str(e).split())[-300:]}")
        return row
    row.shared = compiled.metadata.shared
    if nvidia:
        _read_cubin(row, compiled.asm["cubin"], compiled.asm["ptx"], capability)
        tensor_memory = getattr(compiled.metadata, "tmem_size", None) or 0
        if tensor_memory > TENSOR_MEMORY_COLUMNS:
            row.problems.append(f"{tensor_memory} columns of tensor memory, the device has {TENSOR_MEMORY_COLUMNS}")
    else:
        _read_amdgcn(row, compiled.asm["amdgcn"])
    if not ones:  # with lengths of 1, some kernels have next to nothing left to do
        _judge(row, shipped, compiled.asm["ttir"])
    row.seconds = round(time.monotonic() - start, 1)
    return row


def _judge(row: Row, shipped: Shipped, ttir: str) -> None:
    if row.shared > SHARED_LIMIT[row.target]:
        row.problems.append(
            f"{row.shared / KIB:.0f} KiB of shared memory, the device has {SHARED_LIMIT[row.target] / KIB:.0f}"
        )
    if 0 < row.instructions < STUB_INSTRUCTIONS:
        row.problems.append(f"a stub of {row.instructions} instructions, not a kernel")
    budget = shipped.spill.get(LIKE.get(row.target, row.target), 0)
    if row.spill > budget:
        row.problems.append(f"spills {row.spill} bytes a lane, the budget beside the kernel is {budget}")
    fp8 = set(re.findall(r"f8E\d\w+", ttir))
    if fp8:
        row.problems.append(f"uses {', '.join(sorted(fp8))}, which sm80 and sm86 do not have")


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
    row.instructions = len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+\S", sass, re.MULTILINE))


def _read_amdgcn(row: Row, text: str) -> None:
    row.registers = _number(r"\.vgpr_count:\s+(\d+)", text)
    row.spill = 4 * _number(r"\.vgpr_spill_count:\s+(\d+)", text)
    row.instructions = len(re.findall(r"^\s+[a-z][a-z0-9]*_\w+ ", text, re.MULTILINE))


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else 0


def shipped_kernels(only: str = "") -> Iterator[Shipped]:
    """Every configuration that a kernel module lists in SHIPPED."""
    for module in import_kernels(KERNEL_MODULES):
        yield from (s for s in getattr(module, "SHIPPED", ()) if only in s.name)


_queue: list[Shipped] = []  # what forked workers compile from: kernels cannot be pickled


def _compile_queued(index: int, target: str, ones: bool) -> Row:
    return compile_one(_queue[index], target, ones)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default=",".join(SHARED_LIMIT), help="comma-separated; default: %(default)s")
    parser.add_argument("--only", default="", help="configurations whose name contains this")
    parser.add_argument("--jobs", type=int, default=1, help="compilations at a time")
    parser.add_argument("--json", type=Path, help="write the table here")
    args = parser.parse_args()
    targets = args.targets.split(",")
    unknown = set(targets) - set(SHARED_LIMIT)
    if unknown:
        parser.error(f"unknown targets {', '.join(sorted(unknown))}; known are {', '.join(SHARED_LIMIT)}")
    start, rows = time.monotonic(), []
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        print(f"triton {triton.__version__}; registers / spilled bytes per lane / shared KiB", flush=True)
        _queue.extend(shipped_kernels(args.only))
        pool = ProcessPoolExecutor(args.jobs, mp_context=get_context("fork"))
        for index, shipped in enumerate(_queue):
            wanted = [(target, False) for target in targets if shipped.serves(target)]
            if ONES_ON in targets and shipped.serves(ONES_ON):
                wanted.append((ONES_ON, True))
            found = list(pool.map(_compile_queued, *zip(*((index, *w) for w in wanted), strict=True))) if wanted else []
            rows += found
            cells = (
                f"{r.target}{r.kernel[len(shipped.name) :]} {r.registers}/{r.spill}/{r.shared / KIB:.0f}{' FAIL' if r.problems else ''}"
                for r in found
            )
            print(f"{shipped.name:34s} {'  '.join(cells)}", flush=True)
    pool.shutdown()
    failures = [f"{r.kernel} on {r.target}: {problem}" for r in rows for problem in r.problems]
    if args.json:
        args.json.write_text(
            json.dumps({"triton": triton.__version__, "rows": [asdict(r) for r in rows]}, indent=1) + "\n"
        )
    print(f"{len(rows)} compilations in {time.monotonic() - start:.0f} s, {len(failures)} failures")
    print("".join(f"{failure}\n" for failure in failures), end="", file=sys.stderr)
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
