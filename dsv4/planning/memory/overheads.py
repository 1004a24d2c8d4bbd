# SPDX-License-Identifier: Apache-2.0
"""Memory that no formula gives: contexts, communicators, activations, graphs. Each is a range with
its public sources.

A plan counts as fitting only with the high ends. Measured on real GPUs by others; dsv4's own
records will narrow them.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsv4.machine.hardware import GIB, MIB
from dsv4.model.config import CSA_RATIO, FP4_BLOCK, V4Config
from dsv4.model.kv_layout import INDEX_SCORES_BYTES

_FLASH_HIDDEN = 4096
# Bytes of a token in a captured step beside its streams (four of them, four times over) and heads:
# projections of the compressors and the indexer, weights; in decode steps also what the top-k
# chooses from.
_SMALL_TENSORS = 17_408
_CANDIDATES = 32_768


@dataclass(frozen=True)
class Range:
    """Bytes between `low` and `high`, and where that is known from."""

    low: int
    high: int
    source: str


def non_torch(world: int) -> Range:
    """vLLM: communicators and workspaces outside PyTorch's allocator, on one of `world` ranks."""
    high = 0.6 if world == 1 else 2.0
    return Range(
        round(0.2 * GIB),
        round(high * GIB),
        "0.3-0.4 GiB over the inventory at TP4 (https://github.com/wtdcode/vllm-backport/issues/34); NCCL on NVLink takes more",
    )


def context(world: int) -> Range:
    """SGLang: what is gone before weights load (CUDA context, NCCL), so outside its memory
    fraction.
    """
    high = 0.9 if world == 1 else 1.8
    return Range(
        round(0.5 * GIB),
        round(high * GIB),
        "137.9 of 139.8 GiB on H200 (https://github.com/SemiAnalysisAI/InferenceX/issues/2128); 93.58 of 95.0 GiB on an H20-class GPU",
    )


def activation(config: V4Config, max_num_batched_tokens: int) -> Range:
    """Peak of one step of `max_num_batched_tokens` tokens, and the indexer's logits workspace."""
    width = config.hidden_size / _FLASH_HIDDEN
    per_token = width * max_num_batched_tokens * MIB
    return Range(
        round(0.3 * per_token),
        round(0.65 * per_token + 0.5 * GIB),
        "Flash: 1.39 GiB at 2048 and 5.30 at 8224 tokens on GB10 (https://github.com/MiaAI-Lab/DeepSeek-v4-Flash-One-DGX-Spark/pull/3),"
        " 0.6 at 1024 on TP4 3090; scaled by hidden size; plus vLLM's 512 MiB VLLM_SPARSE_INDEXER_MAX_LOGITS_MB",
    )


def plugin_graphs(config: V4Config, tp: int, context: int, decodes: int, mixed_tokens: int) -> Range:
    """CUDA graphs of dsv4's plugin. decodes: tokens of the largest captured decode step;
    mixed_tokens: of the largest other one, 0 where only decode steps are captured.

    Nothing that a capture made stays alive, so the low end is what the largest holds at once, from
    its shapes (benchmarks/graph_memory.py). The high end adds what vLLM has estimated for others,
    the driver's own part among it.
    """
    heads = 2 * config.num_attention_heads // tp * config.head_dim  # bytes of all heads of a token
    per_token = 2 * heads + 32 * config.hidden_size + _SMALL_TENSORS
    scores = min(INDEX_SCORES_BYTES, decodes * -(-context // CSA_RATIO) * 4)
    held = max(decodes * (per_token + heads + _CANDIDATES) + scores, mixed_tokens * per_token)
    estimated = graphs(decodes, decode_only=True)
    source = "what the largest capture holds (benchmarks/graph_memory.py); at most, on top of it, what vLLM has"
    return Range(held, held + estimated.high, f"{source} {estimated.source}")


def graphs(max_num_seqs: int, decode_only: bool) -> Range:
    """CUDA graphs as vLLM estimates them before the pool is sized."""
    high = 0.6 if max_num_seqs <= 16 else 1.5 if decode_only or max_num_seqs <= 64 else 2.3
    return Range(
        round(0.1 * GIB),
        round(high * GIB),
        "estimated 0.58 (real 0.10) on 8x RTX 3090, 1.46 (0.07) on sm86, real 2.24 on 16x RTX PRO 6000 Pro,"
        " with the default VLLM_MEMORY_PROFILER_ESTIMATE_CUDAGRAPHS=1",
    )


def all_to_all(config: V4Config, backend: str, max_num_batched_tokens: int, ranks: int) -> Range | None:
    """Buffers of the expert exchange on one of `ranks` ranks; None where there are none of their
    own.

    backend: MoE or all-to-all backend. Mega MoE keeps `max_num_batched_tokens` inputs, top-k + 1
    results of each, and a ring whose length is chosen at run time: at most every token that all
    ranks can send.
    """
    if backend == "deepep":
        return Range(round(0.5 * GIB), round(2.0 * GIB), "SGLang sets 2 GiB aside for DeepEP (memory_hook.py)")
    if "mega" not in backend:
        return None
    tokens, d = max_num_batched_tokens, config.hidden_size
    scaled = 1 + 1 / FP4_BLOCK  # one scale byte per 32 values
    fixed = tokens * d * scaled + (config.num_experts_per_tok + 1) * tokens * d * 2
    ring = ranks * tokens * config.num_experts_per_tok * (d + config.moe_intermediate_size) * scaled
    return Range(
        round(fixed),
        round(fixed + ring),
        "DeepGEMM's symmetric buffer (layout/mega_moe.cuh): fixed part, and with the longest ring",
    )


def draft_load_overhead(config: V4Config) -> Range:
    """vLLM with DSpark: the draft's embedding and head in bf16, which vLLM builds before the draft
    shares the target's.
    """
    return Range(
        0,
        2 * config.vocab_size * config.hidden_size * 2,
        "TP2 DSpark on 2x RTX PRO 6000 logs 80.99 GiB: the inventory's 78.36, wo_a in bf16, and 1.9 that both tables"
        " would take unsharded",
    )


def load_overhead(wo_a_bytes: int) -> Range:
    """Weights an engine may widen while loading: wo_a from FP8 to bf16, one more byte per
    element.
    """
    return Range(0, wo_a_bytes, "TP2 Flash logs 75.62 GiB: the inventory's 74.96 plus wo_a in bf16")
