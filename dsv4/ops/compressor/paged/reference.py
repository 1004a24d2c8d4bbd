# SPDX-License-Identifier: Apache-2.0
"""The compressor on raw rows in pages, in plain PyTorch. Source: docs/model.md, 3.4."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsv4.ops.compressor.entry import pool, store_entries
from dsv4.ops.compressor.paged.state import PagedState
from dsv4.ops.compressor.projected import EntryStep, Projected
from dsv4.ops.pages import SlotMapping, store_rows


def save_state(projected: Projected, positions: Tensor, rows: SlotMapping) -> None:
    """Write each token's row [kv | gate + ape[position % ratio]].

    positions: [T] int64
    rows: where each token's goes, in fp32 rows [P, rows, 2 * overlap * D]
    """
    score = projected.gate + projected.ape[positions % projected.ape.shape[0]]
    store_rows(rows.pages, rows.slots, torch.cat([projected.kv, score], -1), rope_dim=0)


def compress_store(states: Sequence[PagedState], step: EntryStep) -> None:
    """Pool the windows that end at this step's tokens into entries, and store these in each cache.

    The rows are saved already: kv and gate are not read.
    """
    for state in states:
        _compress_store(state, step)


def _compress_store(state: PagedState, step: EntryStep) -> None:
    tokens = (state.entries.slots >= 0).nonzero().squeeze(-1)
    if tokens.numel() == 0:
        return
    ratio, overlap, page_rows = step.ratio, step.overlap, state.rows.pages.rows
    back = torch.arange(overlap * ratio - 1, -1, -1, device=step.device)
    rows_at = step.positions[tokens, None] - back  # [N, overlap * m], oldest first
    table = state.block_table[step.request_of_token[tokens]]  # [N, n]
    page = table.gather(1, (rows_at.clamp(min=0) // page_rows).long())
    rows = state.rows.pages.data[page.long(), rows_at.clamp(min=0) % page_rows]  # [N, overlap * m, 2 * overlap * D]
    missing = rows_at < 0
    if overlap == 2:
        rows = torch.where(
            (back >= ratio)[None, :, None],
            rows.unflatten(-1, (2, 2, -1))[..., 0, :].flatten(-2),
            rows.unflatten(-1, (2, 2, -1))[..., 1, :].flatten(-2),
        )
    kv, score = rows.chunk(2, -1)
    # Rows before the first token do not exist: whatever memory holds there, NaN included, must not
    # enter.
    kv = kv.masked_fill(missing[..., None], 0.0)
    pooled = pool(kv, score.masked_fill(missing[..., None], float("-inf")))
    entries = SlotMapping(state.entries.pages, state.entries.slots[tokens])
    store_entries(pooled, state.projected.norm_weight, step.eps, step.entry_cos_sin[tokens], entries)


def update(states: Sequence[PagedState], step: EntryStep, *, shared: bool = False) -> None:
    """`save_state`, then `compress_store`, of the same tokens, for each of the caches, one or two.

    shared: whether an entry may read a row that another request writes in this step, as where vLLM
    lets a request hit the pages of one that it scheduled in the same step. Where none can, a kernel
    may do both at once. No token may be given a slot that an entry of the same step still reads as
    that of an earlier position: a ring must have room for the step beside the windows.
    """
    for state in states:
        save_state(state.projected, step.positions, state.rows)
    compress_store(states, step)
