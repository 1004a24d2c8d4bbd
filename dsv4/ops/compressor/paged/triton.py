# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of the compressor on raw rows; their references are in `paged/reference.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch  # noqa: F401  the GPU driver Triton launches through
import triton
import triton.language as tl
from torch import Tensor

from dsv4.ops.compressor.entry_triton import (
    ROWS_AT_ONCE,
    EntryGroup,
    ProjectedGroup,
    at_most_two,
    constant,
    entry_group,
    projected_group,
    store_entry,
    table_shape,
)
from dsv4.ops.compressor.paged.state import PagedState
from dsv4.ops.compressor.projected import EntryStep, Projected
from dsv4.ops.pages import SlotMapping


class RowGroup(NamedTuple):
    """Pages of state rows, and the slot in them of each token's."""

    slot_mapping: Any
    pages: Any
    page_stride: Any
    num_pages: Any
    ROWS: Any


class PagedGroup(NamedTuple):
    """A `PagedState`, but for what changes from step to step: Triton compiles anew for every class
    of an integer in a group."""

    projected: ProjectedGroup
    rows: RowGroup
    block_table: Any
    entries: EntryGroup


@triton.jit
def _save_row(projected, rows, t, positions, WIDTH: tl.constexpr, BLOCK: tl.constexpr, RATIO: tl.constexpr):
    """Write token t's [kv | gate + ape[position % RATIO]].

    projected, rows: a `ProjectedGroup` and a `RowGroup`
    WIDTH: of kv and of gate
    BLOCK: the next power of two
    """
    slot = tl.load(rows.slot_mapping + t)
    if (slot >= 0) & (slot < rows.num_pages * rows.ROWS):
        c = tl.arange(0, BLOCK)
        inside = c < WIDTH
        to = rows.pages + (slot // rows.ROWS).to(tl.int64) * rows.page_stride + (slot % rows.ROWS) * (2 * WIDTH)
        bias = tl.load(projected.ape + (tl.load(positions + t) % RATIO) * WIDTH + c, mask=inside)
        tl.store(to + c, tl.load(projected.kv + t * projected.kv_stride + c, mask=inside), mask=inside)
        score = tl.load(projected.gate + t * projected.gate_stride + c, mask=inside) + bias
        tl.store(to + WIDTH + c, score, mask=inside)


@triton.jit
def save_state_kernel(projected, rows, positions, WIDTH: tl.constexpr, BLOCK: tl.constexpr, RATIO: tl.constexpr):
    """grid (T,)."""
    _save_row(projected, rows, tl.program_id(0).to(tl.int64), positions, WIDTH, BLOCK, RATIO)


def _row_group(rows: SlotMapping) -> RowGroup:
    return RowGroup(
        slot_mapping=rows.slots,
        pages=rows.pages.data,
        page_stride=rows.pages.data.stride(0),
        num_pages=rows.pages.data.shape[0],
        ROWS=constant(rows.pages.rows),
    )


def save_state(projected: Projected, positions: Tensor, rows: SlotMapping) -> None:
    """See `reference.save_state`."""
    num_tokens, width = projected.kv.shape
    if num_tokens == 0:
        return
    save_state_kernel[(num_tokens,)](
        projected_group(projected),
        _row_group(rows),
        positions,
        WIDTH=width,
        BLOCK=triton.next_power_of_2(width),
        RATIO=projected.ape.shape[0],
        num_warps=4,
    )


@triton.jit
def _compress_store(
    cache, table_stride, table_width, t, positions, request_of_token, cos_sin, eps,
    RATIO: tl.constexpr, OVERLAP: tl.constexpr, ROPE: tl.constexpr, BR: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """What the program of token t does for one cache: if it completes an entry, pool OVERLAP *
    RATIO rows, BR at a time.

    SAVE: each token first writes its state, and a row of a token of this step is taken from kv and
    gate, since the program that writes its state may not have run yet.
    """
    D: tl.constexpr = cache.projected.D
    ROWS: tl.constexpr = cache.rows.ROWS
    WIDTH: tl.constexpr = OVERLAP * D
    if SAVE:
        _save_row(cache.projected, cache.rows, t, positions, WIDTH, WIDTH, RATIO)
    entry_slot = tl.load(cache.entries.slot_mapping + t)
    if (entry_slot >= 0) & (entry_slot < cache.entries.num_slots):
        position = tl.load(positions + t).to(tl.int32)
        request = tl.load(request_of_token + t)
        table = cache.block_table + request.to(tl.int64) * table_stride
        d = tl.arange(0, D)
        m = tl.full([D], float("-inf"), tl.float32)
        weight = tl.zeros([D], tl.float32)
        pooled = tl.zeros([D], tl.float32)
        for start in range(0, OVERLAP * RATIO, BR):
            r = start + tl.arange(0, BR)  # oldest first
            back = OVERLAP * RATIO - 1 - r
            at = position - back
            exists = at >= 0
            # Columns A of the window before, columns B of the entry's own.
            column = tl.where(r < (OVERLAP - 1) * RATIO, 0, (OVERLAP - 1) * D)
            at_page = tl.maximum(at, 0) // ROWS
            stored = exists & (at_page < table_width)
            if SAVE:
                i = t - back
                own = exists & (i >= 0)
                # Tokens of one request are neighbours with consecutive positions.
                own = own & (tl.load(request_of_token + i, mask=own, other=-1) == request)
                stored = stored & (own == 0)
            page = tl.load(table + at_page, mask=stored, other=-1)
            stored = stored & (page >= 0) & (page < cache.rows.num_pages)
            row = (tl.maximum(at, 0) % ROWS) * (2 * WIDTH) + column
            row += tl.where(stored, page, 0).to(tl.int64) * cache.rows.page_stride
            cell = cache.rows.pages + row[:, None] + d[None, :]
            values = tl.load(cell, mask=stored[:, None], other=0.0)  # [BR, D]
            score = tl.load(cell + WIDTH, mask=stored[:, None], other=float("-inf"))
            if SAVE:
                kv = cache.projected.kv + (i * cache.projected.kv_stride + column)[:, None] + d[None, :]
                gate = cache.projected.gate + (i * cache.projected.gate_stride + column)[:, None] + d[None, :]
                bias = cache.projected.ape + ((tl.maximum(at, 0) % RATIO) * WIDTH + column)[:, None] + d[None, :]
                from_kv = tl.load(kv, mask=own[:, None], other=0.0)
                from_gate = tl.load(gate, mask=own[:, None], other=0.0)
                values = tl.where(own[:, None], from_kv, values)
                score = tl.where(own[:, None], from_gate + tl.load(bias, mask=own[:, None], other=0.0), score)
            m_next = tl.maximum(m, tl.max(score, 0))
            m_safe = tl.where(m_next == float("-inf"), 0.0, m_next)
            p = tl.exp(score - m_safe[None, :])
            keep = tl.exp(m - m_safe)
            weight = weight * keep + tl.sum(p, 0)
            pooled = pooled * keep + tl.sum(p * values, 0)
            m = m_next
        entry = pooled / weight
        store_entry(entry, cache.projected.norm_weight, eps, cos_sin + t * ROPE, cache.entries, entry_slot, D, ROPE)


@triton.jit(
    do_not_specialize=["first_table_stride", "first_table_width", "second_table_stride", "second_table_width"],
)
def compress_store_kernel(
    first, first_table_stride, first_table_width, second, second_table_stride, second_table_width,
    positions, request_of_token, cos_sin, eps,
    RATIO: tl.constexpr, OVERLAP: tl.constexpr, ROPE: tl.constexpr, BR: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """grid (T, caches). first, second: `PagedGroup`s, with tables of *_table_width columns.

    second: None for a layer with one cache
    """
    t = tl.program_id(0).to(tl.int64)
    if tl.program_id(1) == 0:
        _compress_store(
            first, first_table_stride, first_table_width, t, positions, request_of_token, cos_sin, eps,
            RATIO, OVERLAP, ROPE, BR, SAVE,
        )  # fmt: skip
    elif second is not None:
        _compress_store(
            second, second_table_stride, second_table_width, t, positions, request_of_token, cos_sin, eps,
            RATIO, OVERLAP, ROPE, BR, SAVE,
        )  # fmt: skip


def _group(state: PagedState) -> PagedGroup:
    return PagedGroup(
        projected=projected_group(state.projected),
        rows=_row_group(state.rows),
        block_table=state.block_table,
        entries=entry_group(state.entries),
    )


def _launch(op: str, states: Sequence[PagedState], step: EntryStep, save: bool) -> None:
    if step.positions.numel() == 0:
        return
    first, second = at_most_two(op, [_group(state) for state in states])
    compress_store_kernel[(step.positions.shape[0], len(states))](
        first,
        *table_shape(states[0].block_table),
        second,
        *table_shape(states[-1].block_table),
        step.positions,
        step.request_of_token,
        step.entry_cos_sin,
        step.eps,
        RATIO=step.ratio,
        OVERLAP=step.overlap,
        ROPE=step.entry_cos_sin.shape[1],
        BR=min(ROWS_AT_ONCE, step.overlap * step.ratio),
        SAVE=save,
        num_warps=4,
    )


def compress_store(states: Sequence[PagedState], step: EntryStep) -> None:
    """See `reference.compress_store`. Raises ValueError for more than a CSA layer's two caches."""
    _launch("compressor.compress_store", states, step, save=False)


def update(states: Sequence[PagedState], step: EntryStep, *, shared: bool = False) -> None:
    """See `reference.update`. Raises ValueError for more than a CSA layer's two caches."""
    if shared:  # programs of one launch run in any order: a row must be written in a launch before
        for state in states:
            save_state(state.projected, step.positions, state.rows)
    _launch("compressor.update", states, step, save=not shared)
