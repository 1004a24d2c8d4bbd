# SPDX-License-Identifier: Apache-2.0
"""Native vLLM's KV mapping against dsv4's own, by vLLM's own KV planner, in one run, for the real
geometries.

    python benchmarks/bench_kv_mapping.py --json benchmarks/results/kv_mapping.json --plot
    docs/kv-mapping.svg

No GPU and no weights are needed: the planner's groups, blocks and admission are host arithmetic.
Native cache specs are those that vLLM's V4 layers declare, ours those that dsv4_vllm declares.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from dsv4.machine.hardware import GIB
from dsv4.model.kv_layout import IndexFormat, KvFormat, StateMapping
from dsv4.planning.recipe.question import KvQuestion

POINTS = ((86_016, 16_384), (800_000, 8_192), (1_048_576, 4_096), (32_768, 8_192), (4_096, 8_192))
MAPPINGS = {"native": "paged", "summary": "summary"}
# KV pool of one rank of 8x H200 as `dsv4 plan` derives it (the low end): TP8 for both checkpoints.
POOL_GIB = {"flash": 100, "pro": 22}


def question(checkpoint: Any, state: str, max_model_len: int, tokens: int, is_async: bool) -> KvQuestion:
    """What to ask vLLM's planner about `checkpoint` with fp8_ds_mla pages and fp8 index keys, on
    one rank."""
    config = checkpoint.config
    return KvQuestion(
        checkpoint=checkpoint.id,
        state=StateMapping(state),
        compress_ratios=tuple(layer.compress_ratio for layer in config.layers),
        num_draft_layers=0,
        speculative="none",
        draft_tokens=0,
        stages=((0, config.num_hidden_layers),),
        kv_dtype=KvFormat.FP8_DS_MLA,
        index_dtype=IndexFormat.FP8,
        head_dim=config.head_dim,
        rope_dim=config.qk_rope_head_dim,
        index_head_dim=config.index_head_dim,
        sliding_window=config.sliding_window,
        max_model_len=max_model_len,
        max_num_batched_tokens=tokens,
        max_num_seqs=1,
        async_scheduling=is_async,
        dp=1,
        swa_full_tokens_ratio=None,
        # Holds one request by any mapping, so that the planner answers; admission scales from it.
        pool_bytes=(64 * GIB,),
    )


def measure(
    planner: Any, checkpoint: Any, pool_bytes: int, points: tuple[tuple[int, int], ...] = POINTS
) -> list[dict[str, Any]]:
    """A row per point and scheduling mode: bytes of one request and requests admitted, by
    mapping."""
    rows = []
    for max_model_len, tokens in points:
        for is_async in (False, True):
            row: dict[str, Any] = {
                "max_model_len": max_model_len,
                "max_num_batched_tokens": tokens,
                "async_scheduling": is_async,
            }
            for name, state in MAPPINGS.items():
                stage = planner.kv(question(checkpoint, state, max_model_len, tokens, is_async)).stages[0]
                blocks = pool_bytes // stage.block_bytes
                per_request = stage.request_bytes // stage.block_bytes
                row[name] = {
                    "block_bytes": stage.block_bytes,
                    "request_gib": round(stage.request_bytes / GIB, 3),
                    "requests": round(blocks / per_request, 2),
                }
            row["times_the_requests"] = round(row["summary"]["requests"] / row["native"]["requests"], 2)
            row["reserve_mib"] = reserve_mib(row)
            rows.append(row)
    return rows


def reserve_mib(row: Mapping[str, Any]) -> dict[str, float]:
    """Per request, beyond the context's own pages and the window's pages: what compressor state
    costs, by mapping."""
    length, batches = row["max_model_len"], 2 if row["async_scheduling"] else 1
    in_flight = batches * row["max_num_batched_tokens"]
    windows = 2 * (-(-min(127 + in_flight, length) // 64) + 1)
    out = {}
    for name in ("native", "summary"):
        block = row[name]["block_bytes"]
        blocks = round(row[name]["request_gib"] * GIB / block)
        out[name] = round((blocks - -(-length // 256) - windows) * block / 2**20, 1)
    return out


def plot(record: Mapping[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=False)
    for axis, (name, curves) in zip(axes, record["curves"].items(), strict=True):
        for mapping, colour in (("native", "tab:gray"), ("summary", "tab:blue")):
            for tokens, style in ((16_384, "-"), (4_096, "--")):
                points = [
                    (c["max_model_len"], c[mapping]["requests"])
                    for c in curves
                    if c["max_num_batched_tokens"] == tokens
                ]
                axis.loglog(
                    *zip(*points, strict=True), style, color=colour, label=f"{mapping}, {tokens:,} tokens a step"
                )
        axis.set(
            title=f"V4-{name.capitalize()}, {POOL_GIB[name]} GiB of KV a rank, async",
            xlabel="context (tokens)",
            ylabel="requests admitted",
        )
        axis.grid(True, which="both", alpha=0.3)
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


@click.command()
@click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path), help="Write the record here.")
@click.option(
    "--plot",
    "plot_path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Draw context against admitted requests (needs matplotlib).",
)
def main(path: Path | None, plot_path: Path | None) -> None:
    out, sys.stdout = sys.stdout, sys.stderr
    from dsv4.machine.compat import installed_version
    from dsv4.planning.deployment import find_checkpoint

    # Planning needs a platform to import vLLM, not to run it.
    os.environ.setdefault("VLLM_TARGET_DEVICE", "cpu")
    from dsv4.probe.vllm import VllmProbe

    planner = VllmProbe()
    record: dict[str, Any] = {
        "what": "vLLM's own KV planner: native mapping against dsv4's summaries, fp8_ds_mla pages, fp8 index keys, one rank",
        "vllm": installed_version("vllm"),
        "pool_gib": POOL_GIB,
        "points": {},
        "curves": {},
    }
    lengths = [1 << n for n in range(12, 21)]
    for name, pool in POOL_GIB.items():
        checkpoint = find_checkpoint(name)
        record["points"][name] = measure(planner, checkpoint, pool * GIB)
        curve = measure(
            planner, checkpoint, pool * GIB, tuple((length, tokens) for tokens in (16_384, 4_096) for length in lengths)
        )
        record["curves"][name] = [row for row in curve if row["async_scheduling"]]
    text = json.dumps(record, indent=1)
    if path:
        path.write_text(text + "\n")
    if plot_path:
        plot(record, plot_path)
    print(text, file=out)


if __name__ == "__main__":
    main()
