# SPDX-License-Identifier: Apache-2.0
"""Pooling, and what makes a pooled row an entry, in plain PyTorch. Source: docs/model.md, 3.4."""

from __future__ import annotations

from torch import Tensor

from dsv4.model.kv_layout import IndexFormat
from dsv4.ops.norm import rms_norm
from dsv4.ops.pages import SlotMapping, store_rows
from dsv4.ops.quant.reference import hadamard
from dsv4.ops.rope import apply_rope


def pool(kv: Tensor, score: Tensor) -> Tensor:
    """Per-channel softmax pooling: fp32 [N, D].

    kv, score: [N, rows, D] fp32; a missing row has score -inf
    """
    return (score.softmax(1) * kv).sum(1)


def store_entries(pooled: Tensor, norm_weight: Tensor, eps: float, cos_sin: Tensor, entries: SlotMapping) -> None:
    """Normalise, rotate, quantise and store pooled rows.

    Keys of packed index formats are rotated by the Hadamard matrix.

    pooled: [N, D] fp32
    norm_weight: [D]
    cos_sin: [N, rope_dim] fp32
    entries: where each row goes
    """
    entry = apply_rope(rms_norm(pooled, norm_weight, eps), cos_sin)
    if entries.pages.format in (IndexFormat.FP8, IndexFormat.MXFP4):
        entry = hadamard(entry.bfloat16())
    store_rows(entries.pages, entries.slots, entry, cos_sin.shape[-1])
