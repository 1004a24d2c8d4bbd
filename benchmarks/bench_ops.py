# SPDX-License-Identifier: Apache-2.0
"""Every kernel on this GPU: first equal to its twin at full size, eagerly and from a captured graph, then timed.

    python benchmarks/bench_ops.py --json benchmarks/results/ops_h200.json [--only TEXT]
    TRITON_INTERPRET=1 python benchmarks/bench_ops.py --interpret     # the same comparisons, tiny, without a GPU

Times are medians of triton's do_bench, which clears the L2 cache before every run. Ceilings (copy bandwidth, bf16 matrix
product) and peers (FlashMLA, DeepGEMM, torch.topk, the twin) are measured in the same run; a peer that is not there is
recorded with the reason.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]

# A kernel's bf16 output may differ from the twin's by what one rounding at bf16 does to values and to probabilities.
CLOSE = 2.0**-6
SAME_BYTES = 0.995  # fp32 sums in another order flip roundings of single elements


def flat(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [x for x in result if isinstance(x, Tensor)]


def disagreement(case: Any, got: Iterable[Tensor], expected: Iterable[Tensor]) -> str | None:
    """How the kernel's result is not the twin's, or None."""
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        if case.compare == "sets":
            if not torch.equal(a.sort(-1).values, b.sort(-1).values):
                return f"output {i}: another set"
        elif a.dtype is torch.uint8:
            same = (a == b).float().mean().item()
            if same < SAME_BYTES:
                return f"output {i}: {same:.4f} of the bytes agree"
        elif not a.is_floating_point():
            same = (a == b).float().mean().item()
            if same < SAME_BYTES:
                return f"output {i}: {same:.4f} of the integers agree"
        else:
            if not torch.equal(a.isfinite(), b.isfinite()):
                return f"output {i}: NaN or infinity elsewhere"
            worst = (
                (a.double() - b.double()).abs().nan_to_num(0, 0, 0).amax() / b.double().abs().nan_to_num(0, 0, 0).amax().clamp(min=1e-30)
            ).item()
            if worst > CLOSE:
                return f"output {i}: error {worst:.2e} of the largest value"
    return None


def measure(case: Any, ceilings: dict[str, float]) -> dict[str, Any]:
    from triton.testing import do_bench

    def median_us(call: Any) -> float:
        return do_bench(call, return_mode="median") * 1e3

    kernel_us, twin_us = median_us(case.timed or case.kernel), median_us(case.twin)
    row: dict[str, Any] = {"us": kernel_us, "twin_us": twin_us, "bytes": case.bytes_moved, "flops": case.flops, "peers": {}}
    row["gb_per_s"] = case.bytes_moved / kernel_us / 1e3
    row["of_copy_bandwidth"] = row["gb_per_s"] / ceilings["copy_gb_per_s"]
    row["of_matmul"] = case.flops / kernel_us / 1e6 / ceilings["bf16_tflops"]
    for name, peer in case.peers.items():
        try:
            peer()
            row["peers"][name] = {"us": median_us(peer)}
            row["peers"][name]["ratio"] = kernel_us / row["peers"][name]["us"]
        except (ImportError, OSError, RuntimeError, AttributeError, ValueError, AssertionError) as e:
            row["peers"][name] = {"absent": f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"[:200]}
    return row


def measure_ceilings() -> dict[str, float]:
    from triton.testing import do_bench

    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    a = torch.randn(8192, 8192, device="cuda").bfloat16()
    copy_ms = do_bench(lambda: target.copy_(source), return_mode="median")
    product_ms = do_bench(lambda: a @ a, return_mode="median")
    return {"copy_gb_per_s": 2 * source.numel() / copy_ms / 1e6, "bf16_tflops": 2 * 8192**3 / product_ms / 1e9}


def replay(case: Any) -> list[Tensor]:
    """The kernel's result out of a captured and replayed CUDA graph."""
    case.kernel()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = flat(case.kernel())
    graph.replay()
    torch.cuda.synchronize()
    return result


def machine() -> dict[str, str]:
    driver = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    import triton

    return {
        "gpu": torch.cuda.get_device_name(), "driver": driver.stdout.strip().splitlines()[0] if driver.stdout else "unknown",
        "commit": commit.stdout.strip(), "torch": torch.__version__, "triton": triton.__version__,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the record here")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--interpret", action="store_true", help="compare tiny cases in Triton's interpreter, time nothing")
    args = parser.parse_args()
    if args.interpret:
        if os.environ.get("TRITON_INTERPRET") != "1":
            parser.error("set TRITON_INTERPRET=1: Triton reads it when kernels are defined")
        import interpreter_bf16

        interpreter_bf16.install()
    elif not torch.cuda.is_available():
        print("bench_ops: no GPU here, so nothing was measured; --interpret compares tiny cases without one")
        return 0
    import op_cases

    device = torch.device("cpu" if args.interpret else "cuda")
    models = [op_cases.TINY] if args.interpret else [op_cases.FLASH, op_cases.PRO]
    torch.manual_seed(0)
    ceilings = {} if args.interpret else measure_ceilings()
    rows, wrong = [], 0
    for build in op_cases.cases(models, device, small=args.interpret):
        case = build()
        if args.only not in case.name:
            continue
        expected = [x.clone() for x in flat(case.twin())]
        problem = disagreement(case, flat(case.kernel()), expected)
        if problem is None and not args.interpret:
            problem = disagreement(case, replay(case), expected)
            problem = f"from a graph: {problem}" if problem else None
        row = {"kernel": case.name, "model": case.model, "size": case.size, "wrong": problem}
        wrong += problem is not None
        if problem is None and not args.interpret:
            row |= measure(case, ceilings)
        rows.append(row)
        timing = (
            f"{row['us']:9.1f} us  {row['of_copy_bandwidth']:5.0%} of copy  twin {row['twin_us']:9.1f} us  {row['peers']}"
            if "us" in row
            else ""
        )
        print(f"{case.name:24s} {case.model:6s} {case.size:24s} {problem or 'equal'}  {timing}", flush=True)
        del case, expected
    record = {"what": "dsv4 kernels against their twins, ceilings and peers", "ceilings": ceilings, "rows": rows}
    if args.json and not args.interpret:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({**machine(), **record}, indent=1) + "\n")
    print(f"{len(rows)} cases, {wrong} wrong")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
