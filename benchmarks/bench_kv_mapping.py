# SPDX-License-Identifier: Apache-2.0
"""Native vLLM's KV mapping against dsv4's own, by vLLM's own KV planner and block manager, in one
run, for the real geometries.

    python benchmarks/bench_kv_mapping.py --json benchmarks/results/kv_mapping.json --plot
    docs/kv-mapping.svg

No GPU and no weights are needed: groups, blocks and admission are host arithmetic. `points`: bytes
that one request needs to start, by vLLM's planner. `held`: requests that decode together at full
length, by vLLM's KVCacheManager (vllm_capacity.py). `curves`: the same by `dsv4 plan`'s formula,
which tests hold to the manager. Native cache specs are those that vLLM's V4 layers declare, ours
those that dsv4_vllm declares.
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
from dsv4.model.kv_layout import StateMapping
from dsv4.planning.memory.vllm import InFlight, vllm_pool

sys.path.insert(0, str(Path(__file__).parent))
from vllm_capacity import FORMATS, Case, held_by_manager, kv_cache_config, register_managers

POINTS = ((86_016, 16_384), (800_000, 8_192), (1_048_576, 4_096), (32_768, 8_192), (4_096, 8_192))
MAPPINGS = {"native": "paged", "summary": "summary"}
# KV pool of one rank of 8x H200 as `dsv4 plan` derives it (the low end): TP8 for both checkpoints.
POOL_GIB = {"flash": 100, "pro": 22}
# Model, pool (47.43 GiB is what a public log of 8x H100 prints), context, step; async scheduling.
HELD = (
    *(("pro", 22, *point) for point in POINTS),
    *(("flash", 100, *point) for point in POINTS),
    ("flash", 47.43, 65_536, 8_192),
    ("flash", 47.43, 262_144, 2_048),
)


def case(model: str, state: str, pool_bytes: int, max_model_len: int, tokens: int, is_async: bool = True) -> Case:
    """One setting, on one rank."""
    return Case(
        model=model,
        state=state,
        context=max_model_len,
        step=tokens,
        asynchronous=is_async,
        drafts=0,
        pool_bytes=pool_bytes,
        by="manager",
    )


def measure(planner: Any, checkpoint: Any) -> list[dict[str, Any]]:
    """A row per point and scheduling mode: bytes with which one request starts, by mapping."""
    rows = []
    for max_model_len, tokens in POINTS:
        for is_async in (False, True):
            row: dict[str, Any] = {
                "max_model_len": max_model_len,
                "max_num_batched_tokens": tokens,
                "async_scheduling": is_async,
            }
            for name, state in MAPPINGS.items():
                # A pool that holds one request by any mapping, so that the planner answers.
                one = case(checkpoint.id, state, 64 * GIB, max_model_len, tokens, is_async)
                stage = planner.kv(one.question).stages[0]
                row[name] = {
                    "block_bytes": stage.block_bytes,
                    "request_gib": round(stage.request_bytes / GIB, 3),
                }
            row["reserve_mib"] = reserve_mib(row)
            rows.append(row)
    return rows


def held(planner: Any, row: tuple[str, float, int, int]) -> dict[str, Any]:
    """Requests at once in one setting by vLLM's block manager, by mapping."""
    model, pool_gib, max_model_len, tokens = row
    out: dict[str, Any] = {
        "model": model,
        "pool_gib": pool_gib,
        "max_model_len": max_model_len,
        "max_num_batched_tokens": tokens,
    }
    for name, state in MAPPINGS.items():
        one = case(model, state, int(pool_gib * GIB), max_model_len, tokens)
        out[name] = held_by_manager(one, kv_cache_config(planner, one.question))
    out["times"] = round(out["summary"] / out["native"], 2)
    return out


def curve(checkpoint: Any, pool_gib: float) -> list[dict[str, Any]]:
    """Requests at once against the context, by the planner's formula."""
    rows = []
    for tokens in (16_384, 4_096):
        for max_model_len in (1 << n for n in range(12, 21)):
            row: dict[str, Any] = {"max_model_len": max_model_len, "max_num_batched_tokens": tokens}
            for name, state in MAPPINGS.items():
                pool = vllm_pool(checkpoint.config, FORMATS, mapping=StateMapping(state))
                flight = InFlight(2 * tokens, 2)
                row[name] = pool.requests_at_once(int(pool_gib * GIB), max_model_len, flight)
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
                    (c["max_model_len"], c[mapping] or None) for c in curves if c["max_num_batched_tokens"] == tokens
                ]
                axis.loglog(
                    *zip(*points, strict=True), style, color=colour, label=f"{mapping}, {tokens:,} tokens a step"
                )
        axis.set(
            title=f"V4-{name.capitalize()}, {POOL_GIB[name]} GiB of KV a rank, async",
            xlabel="context (tokens)",
            ylabel="requests decoding at once",
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
    help="Draw context against requests at once (needs matplotlib).",
)
@click.option("--no-held", is_flag=True, help="Leave the block manager's minutes out.")
def main(path: Path | None, plot_path: Path | None, no_held: bool) -> None:
    out, sys.stdout = sys.stdout, sys.stderr
    from dsv4.machine.compat import installed_version
    from dsv4.planning.deployment import find_checkpoint

    # Planning needs a platform to import vLLM, not to run it.
    os.environ.setdefault("VLLM_TARGET_DEVICE", "cpu")
    from dsv4.probe.vllm import VllmProbe

    planner = VllmProbe()
    register_managers()
    record: dict[str, Any] = {
        "what": "native mapping against dsv4's summaries, fp8_ds_mla pages, fp8 index keys, one rank: bytes with which one"
        " request starts by vLLM's KV planner, requests decoding at once at full length by its KVCacheManager",
        "vllm": installed_version("vllm"),
        "pool_gib": POOL_GIB,
        "points": {},
        "held": [] if no_held else [held(planner, row) for row in HELD],
        "curves": {},
    }
    for name, pool in POOL_GIB.items():
        checkpoint = find_checkpoint(name)
        record["points"][name] = measure(planner, checkpoint)
        record["curves"][name] = curve(checkpoint, pool)
    text = json.dumps(record, indent=1)
    if path:
        path.write_text(text + "\n")
    if plot_path:
        plot(record, plot_path)
    print(text, file=out)


if __name__ == "__main__":
    main()
