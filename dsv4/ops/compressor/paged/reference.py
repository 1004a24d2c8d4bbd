# SPDX-License-Identifier: Apache-2.0
"""Plain-PyTorch twin of the compressor. Source: spec section 3.4.

A token contributes kv and score (gate + ape), each `overlap * D` wide. With overlap 2 (CSA) the first D columns (A)
belong to the *next* window's entry, the last D (B) to the token's own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsv4.model.kv_layout import IndexFormat
from dsv4.ops.compressor.paged.state import Pooling
from dsv4.ops.norm import rms_norm
from dsv4.ops.pages import Pages, store_rows
from dsv4.ops.quant.reference import hadamard
from dsv4.ops.rope import apply_rope


def save_state(kv: Tensor, gate: Tensor, ape: Tensor, positions: Tensor, state: Pages, slots: Tensor) -> None:
    """Write each token's row [kv | gate + ape[position % m]] into its state slot; slot -1 writes nothing.

    kv, gate: [T, overlap * D] fp32; ape: [m, overlap * D] fp32; positions: [T]; state: fp32 rows [P, rows, 2 * overlap * D].
    """
    score = gate + ape[positions % ape.shape[0]]
    store_rows(state, slots, torch.cat([kv, score], -1), rope_dim=0)


def pool(kv: Tensor, score: Tensor) -> Tensor:
    """Per-channel softmax pooling: kv, score [N, rows, D] fp32 (score -inf for missing rows); fp32 [N, D]."""
    return (score.softmax(1) * kv).sum(1)


def compress_store(
    state: Pages,
    state_block_table: Tensor,
    request_of_token: Tensor,
    positions: Tensor,
    entry_slots: Tensor,
    ratio: int,
    overlap: int,
    norm_weight: Tensor,
    eps: float,
    entry_cos_sin: Tensor,
    cache: Pages,
) -> None:
    """Pool the windows that end at this step's tokens into entries, and store them.

    state: fp32 rows [P, rows, 2 * overlap * D]; state_block_table: [R, n] int32; request_of_token, positions: [T];
    entry_slots: [T], the slot of the entry that token t completes, -1 for the others; entry_cos_sin: [T, rope_dim], at
    position j * m of that entry; norm_weight: [D]. Index keys of packed formats are rotated by the Hadamard matrix.
    """
    tokens = (entry_slots >= 0).nonzero().squeeze(-1)
    if tokens.numel() == 0:
        return
    back = torch.arange(overlap * ratio - 1, -1, -1, device=positions.device)
    rows_at = positions[tokens, None] - back  # [N, overlap * m], oldest first
    table = state_block_table[request_of_token[tokens]]  # [N, n]
    page = table.gather(1, (rows_at.clamp(min=0) // state.rows).long())
    rows = state.data[page.long(), rows_at.clamp(min=0) % state.rows]  # [N, overlap * m, 2 * overlap * D]
    missing = rows_at < 0
    if overlap == 2:
        rows = torch.where(
            (back >= ratio)[None, :, None],
            rows.unflatten(-1, (2, 2, -1))[..., 0, :].flatten(-2),
            rows.unflatten(-1, (2, 2, -1))[..., 1, :].flatten(-2),
        )
    kv, score = rows.chunk(2, -1)
    # Rows before the first token do not exist: whatever memory holds there, NaN included, must not enter.
    kv = kv.masked_fill(missing[..., None], 0.0)
    pooled = pool(kv, score.masked_fill(missing[..., None], float("-inf")))
    finish_entry(pooled, norm_weight, eps, entry_cos_sin[tokens], cache, entry_slots[tokens])


def update(
    poolings: Sequence[Pooling], positions: Tensor, request_of_token: Tensor, overlap: int, eps: float, entry_cos_sin: Tensor
) -> None:
    """`save_state`, then `compress_store`, of the same tokens, for each of the caches, one or two.

    positions, request_of_token: [T]; entry_cos_sin: [T, rope_dim], at the first position of token t's entry.

    A kernel may do both at once, so no token may be given a state slot that an entry completed in the same step still
    reads as another token's: pages never are, a ring must have room for the step beside the windows.
    """
    for to in poolings:
        save_state(to.kv, to.gate, to.ape, positions, to.state, to.state_slots)
        where = (to.state_block_table, request_of_token, positions, to.entry_slots, to.ape.shape[0], overlap)
        compress_store(to.state, *where, to.norm_weight, eps, entry_cos_sin, to.cache)


def finish_entry(pooled: Tensor, norm_weight: Tensor, eps: float, cos_sin: Tensor, cache: Pages, slots: Tensor) -> None:
    """Normalise, rotate, quantise and store pooled entries: pooled [N, D] fp32."""
    entry = apply_rope(rms_norm(pooled, norm_weight, eps), cos_sin)
    if cache.format in (IndexFormat.FP8, IndexFormat.MXFP4):
        entry = hadamard(entry.bfloat16())
    store_rows(cache, slots, entry, cos_sin.shape[-1])
