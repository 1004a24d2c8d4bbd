# SPDX-License-Identifier: Apache-2.0
"""Launches of a decode step of one request, in its CUDA graph and before it, counted on the tape in
both engines: see `tests/support/tape.py`.

    python benchmarks/step_launches.py --label now --json benchmarks/results/step_launches.json

vLLM runs our kernels in the interpreter over packed pages and summaries, SGLang the references over
plain pages. The engine's own launches are those of a CPU.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).parents[1]))


@click.command()
@click.option("--label", default="now", show_default=True, help="What the figures are kept under in the record.")
@click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path), help="Add to this record.")
def main(label: str, path: Path | None) -> None:
    from dsv4.reference.tiny import write_tiny

    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_tiny(Path(folder) / "tiny", "flash")
        found = {"vllm": described(vllm(checkpoint)), "sglang": described(sglang(checkpoint))}
    for engine, counts in found.items():
        print(f"{engine}: {counts['inside']} in the graph, {counts['outside']} before it")
    if path is not None:
        record = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(record | {label: found}, indent=1) + "\n")


def vllm(checkpoint: Path) -> dict[str, Any]:
    from tests.support.vllm_engine import RUNNER_V2, engine_args, request, run

    engine = engine_args(
        checkpoint,
        max_model_len=640,
        max_num_batched_tokens=16,
        max_num_seqs=2,
        kv_cache_memory_bytes=64 << 20,
        kv_cache_dtype="fp8_ds_mla",
    )
    env = RUNNER_V2 | {"VLLM_USE_BREAKABLE_CUDAGRAPH": "1", "DSV4_OPS": "triton", "DSV4_STATE": "summary"}
    phase = [request([5, 6, 7], 3, prompt_logprobs=False)]
    graphs: dict[str, Any] = run(engine, [[*phase]], env=env, graphs={"sizes": [1], "mode": "FULL_DECODE_ONLY"})[
        "graphs"
    ]
    return graphs


def sglang(checkpoint: Path) -> dict[str, Any]:
    from tests.support.comparison import request
    from tests.support.sglang_engine import engine_args, run

    phase = [request([5, 6, 7], 4, prompt_logprobs=False)]
    graphs: dict[str, Any] = run(engine_args(checkpoint, max_running_requests=2), [phase], graphs=[1, 2])["counts"][
        "graphs"
    ]
    return graphs


def described(graphs: dict[str, Any]) -> dict[str, Any]:
    """inside, outside: launches; of: those in the graph, by name."""
    assert graphs["different"] == [], graphs["different"]
    of = Counter(graphs["inside"])
    return {"inside": len(graphs["inside"]), "outside": graphs["outside"], "of": dict(of.most_common())}


if __name__ == "__main__":
    main()
