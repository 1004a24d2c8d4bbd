# SPDX-License-Identifier: Apache-2.0
"""Rewrites the comparison table of docs/planner.md from memory_points.yaml: `python
tests/golden/memory_table.py`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from dsv4.machine.hardware import find_gpu
from dsv4.model.config import LayerKind, V4Config
from dsv4.model.kv_layout import (
    PAGE_TOKENS,
    CacheFormats,
    CacheRole,
    IndexFormat,
    KvFormat,
    StateMapping,
    index_row,
    kv_row,
    layer_caches,
    state_ring_rows,
    state_row,
)
from dsv4.planning.deployment import Deployment, Speculation, find_checkpoint
from dsv4.planning.memory.proof import prove
from dsv4.planning.memory.vllm import KvGroup, VllmPool, vllm_pool
from dsv4.planning.memory.weights import stage_weights

GIB = 1 << 30
FP8 = CacheFormats(KvFormat.FP8_DS_MLA, IndexFormat.FP8)
PAGE = Path(__file__).parents[2] / "docs" / "planner.md"
BEGIN, END = (
    "<!-- memory points: python tests/golden/memory_table.py rewrites this -->",
    "<!-- end of memory points -->",
)


def pool(point: dict[str, Any]) -> VllmPool:
    """The pool as the vLLM of the point's log laid it out."""
    assert point["packing"] == "common_slots"
    formats = CacheFormats(KvFormat.FP8_DS_MLA, IndexFormat(point.get("index", "fp8")))
    return common_slots_pool(find_checkpoint(point["model"]).config, formats, point.get("draft_layers", 0))


def common_slots_pool(config: V4Config, formats: CacheFormats, num_draft_layers: int) -> VllmPool:
    """How vLLM 0.21 to 0.27 prices "KV cache is needed": a block has as many (KV + index + HCA)
    slots as the longest group has layers. "Maximum concurrency" is by the widest group in every
    version: 0.27.1 prints one each way in the same run.
    """
    groups = vllm_pool(config, formats, num_draft_layers).groups
    return VllmPool(groups, common_slots_bytes(config, formats, groups))


def common_slots_bytes(config: V4Config, formats: CacheFormats, groups: Sequence[KvGroup]) -> int:
    wanted = (CacheRole.COMPRESSED, CacheRole.INDEX_KEY)
    pages = {
        (spec.role, spec.tokens_per_row): spec.page_bytes
        for layer in config.layers
        for spec in layer_caches(config, layer, formats)
        if spec.role in wanted
    }
    return max(g.max_layers_per_page_size for g in groups) * sum(pages.values())


def printed_concurrency(point: dict[str, Any]) -> float:
    """vLLM's start-up line from the pool that the same log prints."""
    widest = vllm_pool(find_checkpoint(point["model"]).config, FP8, point.get("draft_layers", 0))
    pool_bytes = int(point["pool_gib"] * GIB)
    return widest.printed_concurrency(pool_bytes, point["max_model_len"], point["in_flight_tokens"])


def concurrency(point: dict[str, Any]) -> tuple[float, float]:
    """What the planner predicts of all replicas' start-up lines for a deployment whose pool no log
    prints: with the high and the low overheads."""
    checkpoint = find_checkpoint(point["model"])
    d = Deployment(
        checkpoint=checkpoint,
        engine="vllm",
        gpu=find_gpu(point["gpu"]),
        count=point["tp"] * point["dp"],
        nodes=1,
        tp=point["tp"],
        dp=point["dp"],
        ep=True,
        pp=1,
        max_model_len=point["max_model_len"],
        max_num_batched_tokens=point["max_num_batched_tokens"],
        max_num_seqs=point["max_num_seqs"],
        memory_fraction=point["fraction"],
        async_scheduling=False,
        index=IndexFormat.FP8,
        speculation=Speculation(method="dspark", num_tokens=5),
        state=StateMapping.PAGED,
    )
    proof = prove(d)
    assert proof.printed_low is not None
    assert proof.printed_high is not None
    return proof.printed_low * d.dp, proof.printed_high * d.dp


def historic_bytes_per_full_token(
    config: V4Config,
    swa_full_tokens_ratio: float,
    speculative: bool,
    extra_layers: int = 0,
    hca_state_in_window: bool = False,
) -> float:
    """bytes_per_full_token of SGLang's builds before 0.5.22, which public logs print.

    They priced rows without page padding and did not inflate for a draft.

    extra_layers: draft layers counted as window layers
    hca_state_in_window: builds of May 2026 priced the ratio-128 state per window page too
    """
    formats = CacheFormats(KvFormat.FP8_DS_MLA, IndexFormat.FP8)
    row = kv_row(config, formats).row_bytes
    window = float(row * (config.num_hidden_layers + extra_layers))
    full = 0.0
    for layer in config.layers:
        if layer.kind is LayerKind.SWA:
            continue
        full += row / layer.compress_ratio
        state = state_row(layer, config.head_dim).row_bytes
        if layer.kind is LayerKind.CSA:
            full += index_row(config, formats).row_bytes / layer.compress_ratio
            state += state_row(layer, config.index_head_dim).row_bytes
        elif not hca_state_in_window:
            continue
        window += state * state_ring_rows(layer, speculative) / PAGE_TOKENS
    return swa_full_tokens_ratio * window + full


def rows() -> list[tuple[str, str, float, float, str]]:
    """(what, quantity, printed, computed, source)."""
    points = yaml.safe_load((Path(__file__).parent / "memory_points.yaml").read_text())
    found = []
    for name in ("flash", "flash-0731", "pro", "pro-0813"):
        c = find_checkpoint(name)
        total = sum(s.total_bytes for s in stage_weights(c.config, tp=1, dp=1, ep=False, pp=1, with_draft=True))
        found.append((c.repo.split("/")[1], "bytes of all tensors", c.total_bytes, total, "released checkpoint"))
    (rank,) = stage_weights(find_checkpoint("flash").config, tp=8, dp=1, ep=False, pp=1, with_draft=True)
    found.append(
        ("V4-Flash, TP8", "GiB per rank", 20.06, (rank.total_bytes + rank.wo_a_bytes) / GIB, "public start-up log")
    )
    for p in points["need"]:
        need = pool(p).request_bytes(p["max_model_len"], p["in_flight_tokens"]) / GIB
        found.append((p["what"], "GiB KV needed", p["printed_gib"], need, p["source"]))
    for p in points["vllm_concurrency_of_pool"]:
        found.append((p["what"], '"Maximum concurrency"', p["printed"], printed_concurrency(p), p["source"]))
    for p in points["vllm_concurrency"]:
        low, high = concurrency(p)
        what = f"{p['what']}; middle of {low:.1f} to {high:.1f}"
        found.append((what, '"Maximum concurrency"', p["printed_concurrency"], (low + high) / 2, p["source"]))
    (p,) = points["vllm_budget"]
    found.append(
        (
            p["what"],
            "GiB",
            p["printed_available_gib"],
            p["fraction"] * p["total_gib"] - p["loaded_gib"] - p["activation_gib"],
            p["source"],
        )
    )
    for p in points["sglang_bytes_per_full_token"]:
        config = find_checkpoint(p["model"]).config
        got = historic_bytes_per_full_token(
            config, p["swa_full_tokens_ratio"], p["speculative"], p["extra_layers"], p["hca_state_in_window"]
        )
        found.append((p["source"], "bytes per full token", p["printed"], got, p["source"]))
    for p in points["sglang_pool"]:
        tokens = (p["pool_gib"] - p["fixed_gib"]) * GIB / p["bytes_per_full_token"] // 256 * 256
        found.append((p["source"], "tokens in the pool", p["printed_tokens"], tokens, p["source"]))
    (p,) = points["sglang_minimum_fraction"]
    found.append(
        (
            p["what"],
            "smallest mem_fraction_static",
            p["printed"],
            1 - p["left_gib"] / (p["loaded_gib"] + p["left_gib"]),
            p["source"],
        )
    )
    return found


def table() -> str:
    """The rows in Markdown."""
    lines = ["| log | quantity | printed | computed | off by | source |", "|---|---|---|---|---|---|"]
    for what, quantity, printed, computed, source in rows():
        digits = 0 if printed > 20_000 else 4 if printed < 1 else 2
        off = abs(computed / printed - 1) * 100
        link = (
            f"[{source.rsplit('/', 3)[1]} {source.rsplit('/', 1)[1]}]({source})"
            if source.startswith("http")
            else source
        )
        what = what if what != source else what.removeprefix("public report, ").removeprefix("public start-up log, ")
        lines.append(f"| {what} | {quantity} | {printed:,.{digits}f} | {computed:,.{digits}f} | {off:.2f} % | {link} |")
    return "\n".join(lines)


def page(text: str) -> str:
    """`text` with the table replaced."""
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
