# SPDX-License-Identifier: Apache-2.0
"""Triton kernel of the compressor on summaries; its twin is `summary/reference.py`.

No program may read what another of the same launch writes. A request's kept state is read and written by the program of
its first token alone, which also pools the entries that need it; other entries lie wholly in the step's rows. Page-end
tails are written by a launch of their own, before anything reads one. A step of one token per request does without it:
an entry that needs a tail ends RATIO tokens behind the page end, thus in a later step than the one that wrote it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl

from dsv4.ops.compressor.paged.triton import ROWS_AT_ONCE, at_most_two, finish_entry
from dsv4.ops.compressor.projected import EntryStep
from dsv4.ops.compressor.summary.state import SummaryState
from dsv4.ops.kernels import Shipped
from dsv4.ops.pages import BatchView
from dsv4.ops.quant.triton import format_code


@triton.jit
def _merge(top, weight, total, other_top, other_weight, other_total):
    """The summary of both; all [D]."""
    merged = tl.maximum(top, other_top)
    finite = tl.where(merged == float("-inf"), 0.0, merged)
    a, b = tl.exp(top - finite), tl.exp(other_top - finite)
    return merged, weight * a + other_weight * b, total * a + other_total * b


@triton.jit
def _load_summary(at, use, D: tl.constexpr):
    """The summary at the pointer `at` where `use`, the empty one elsewhere."""
    d = tl.arange(0, D)
    mask = use & (d < D)
    top = tl.load(at + d, mask=mask, other=float("-inf"))
    return top, tl.load(at + D + d, mask=mask, other=0.0), tl.load(at + 2 * D + d, mask=mask, other=0.0)


@triton.jit
def _store_summary(at, top, weight, total, D: tl.constexpr):
    d = tl.arange(0, D)
    tl.store(at + d, top)
    tl.store(at + D + d, weight)
    tl.store(at + 2 * D + d, total)


@triton.jit
def _pool_rows(
    kv, kv_stride, gate, gate_stride, ape, token_of_0, first, last, window,
    RATIO: tl.constexpr, OVERLAP: tl.constexpr, D: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Summary of the step's rows at positions first .. last: columns A before `window`, B from there on.

    token_of_0: the token that position 0 would be.
    """
    d = tl.arange(0, D)
    top = tl.full([D], float("-inf"), tl.float32)
    weight = tl.zeros([D], tl.float32)
    total = tl.zeros([D], tl.float32)
    for start in range(first, last + 1, BR):
        at = start + tl.arange(0, BR)
        here = (at <= last)[:, None] & (d < D)[None, :]
        token = (token_of_0 + at).to(tl.int64)
        column = tl.where(at < window, 0, (OVERLAP - 1) * D)
        values = tl.load(kv + (token * kv_stride + column)[:, None] + d[None, :], mask=here, other=0.0)  # [BR, D]
        score = tl.load(gate + (token * gate_stride + column)[:, None] + d[None, :], mask=here, other=float("-inf"))
        score += tl.load(ape + ((at % RATIO) * (OVERLAP * D) + column)[:, None] + d[None, :], mask=here, other=0.0)
        block_top = tl.max(score, 0)
        finite = tl.where(block_top == float("-inf"), 0.0, block_top)
        p = tl.exp(score - finite[None, :])
        top, weight, total = _merge(top, weight, total, block_top, tl.sum(p, 0), tl.sum(p * values, 0))
    return top, weight, total


@triton.jit
def _compress(
    kv, kv_stride, gate, gate_stride, ape, norm_weight, state, state_stride, state_pages, state_page, state_page_stride,
    tail, tail_stride, tail_pages, block_table, block_table_stride, block_table_width, entry_slots, cache, cache_stride, cache_slots,
    t, request, first_token, start, end, cos_sin, eps,
    D: tl.constexpr, ROWS: tl.constexpr, FORMAT: tl.constexpr, PAGE: tl.constexpr, RATIO: tl.constexpr, OVERLAP: tl.constexpr,
    ROPE: tl.constexpr, BR: tl.constexpr, TAILS: tl.constexpr, POOL: tl.constexpr,
):  # fmt: skip
    """What the program of token t does for one cache: up to five jobs, each of which pools a window as far as it has come.

    Job 0 writes the tail of the page that t ends, jobs 1 .. OVERLAP store entries, and the OVERLAP jobs behind them the
    request's state. Only the first token of a request has more than job 1; its entries are those that need the state.
    """
    BEFORE: tl.constexpr = (OVERLAP - 1) * RATIO  # rows of the window before that an entry pools
    RESUME: tl.constexpr = PAGE if OVERLAP == 2 else RATIO  # where nothing is kept, whatever the state page holds
    is_first = t == first_token
    token_of_0 = first_token - start
    position = (t - token_of_0).to(tl.int32)
    page = tl.load(state_page + request * state_page_stride)
    has_state = (page >= 0) & (page < state_pages)
    kept = state + tl.where(has_state, page, 0).to(tl.int64) * state_stride
    table = block_table + request * block_table_stride
    jobs = 1
    if POOL:
        jobs = tl.where(is_first, 1 + 2 * OVERLAP, 2)
    for job in range(0 if TAILS else 1, jobs):
        to_tail = job == 0
        to_state = job > OVERLAP
        window = tl.where(is_first, start // RATIO * RATIO + (job - 1) * RATIO, position - (RATIO - 1))
        window = tl.where(to_state, end // RATIO * RATIO + (job - OVERLAP - 1) * RATIO, window)
        window = tl.where(to_tail, position + 1, window)
        last = tl.where(to_state, end - 1, tl.where(to_tail, position, window + (RATIO - 1)))
        # The window before this one ends a page, whose tail holds columns A; not while they are still being collected.
        from_tail = (OVERLAP == 2) & (window % PAGE == 0) & (job > 0) & (job < 2 * OVERLAP)
        # Where in its page the summary that this job writes, or reads, lies.
        tail_place = tl.where(to_tail, position, window - 1) // PAGE
        wants_tail = (to_tail & (window % PAGE == 0)) | (from_tail & (to_state == 0) & (window > 0))
        wants_tail = wants_tail & (tail_place < block_table_width)
        tail_page = tl.load(table + tail_place, mask=wants_tail, other=-1)
        has_tail = (tail_page >= 0) & (tail_page < tail_pages)
        tail_at = tail + tl.where(has_tail, tail_page, 0).to(tl.int64) * tail_stride
        # An entry that needs the state is the first token's, one that does not is its own last token's.
        ends = (to_tail == 0) & (to_state == 0) & (last < end) & (is_first == (start > window - BEFORE))
        slot = tl.load(entry_slots + token_of_0 + last, mask=ends, other=-1)
        to_entry = (slot >= 0) & (slot < cache_slots)
        if to_entry | (to_state & has_state) | (to_tail & has_tail):
            first = tl.maximum(start, tl.where(from_tail, window, window - BEFORE))
            top, weight, total = _pool_rows(
                kv, kv_stride, gate, gate_stride, ape, token_of_0, first, last, window, RATIO, OVERLAP, D, BR
            )  # fmt: skip
            inside = start >= window
            use = (inside & (start % RESUME != 0)) | ((inside == 0) & (start > window - BEFORE) & (from_tail == 0))
            top_b, weight_b, total_b = _load_summary(kept + tl.where(inside, 0, 3 * D), use & has_state, D)
            top, weight, total = _merge(top, weight, total, top_b, weight_b, total_b)
            if to_tail:
                _store_summary(tail_at, top, weight, total, D)
            elif to_state:
                tl.debug_barrier()  # every thread has read the kept summaries
                _store_summary(kept + (job - OVERLAP - 1) * (3 * D), top, weight, total, D)
            else:
                if POOL:
                    if OVERLAP == 2:
                        top_b, weight_b, total_b = _load_summary(tail_at, has_tail, D)
                        top, weight, total = _merge(top, weight, total, top_b, weight_b, total_b)
                    finish_entry(total / weight, norm_weight, eps, cos_sin + (token_of_0 + last).to(tl.int64) * ROPE, cache, cache_stride, slot, D, ROPE, ROWS, FORMAT)  # fmt: skip


@triton.jit
def summary_kernel(
    kv, kv_stride, gate, gate_stride, ape, norm_weight, state, state_stride, state_pages, state_page, state_page_stride,
    tail, tail_stride, tail_pages, block_table, block_table_stride, block_table_width, entry_slots, cache, cache_stride, cache_slots,
    kv_2, kv_2_stride, gate_2, gate_2_stride, ape_2, norm_weight_2, state_2, state_2_stride, state_2_pages, state_2_page, state_2_page_stride,
    tail_2, tail_2_stride, tail_2_pages, block_table_2, block_table_2_stride, block_table_2_width, entry_slots_2, cache_2, cache_2_stride,
    cache_2_slots, query_start_loc, seq_lens, request_of_token, cos_sin, eps,
    D: tl.constexpr, ROWS: tl.constexpr, FORMAT: tl.constexpr, D_2: tl.constexpr, ROWS_2: tl.constexpr, FORMAT_2: tl.constexpr,
    PAGE: tl.constexpr, RATIO: tl.constexpr, OVERLAP: tl.constexpr, ROPE: tl.constexpr, BR: tl.constexpr, TAILS: tl.constexpr,
    POOL: tl.constexpr,
):  # fmt: skip
    """grid (T, caches). TAILS: write the page-end tails; POOL: store entries and state. Both in one launch only when no
    request has more than one token."""
    t = tl.program_id(0)
    request = tl.load(request_of_token + t).to(tl.int64)
    first_token = tl.load(query_start_loc + request)
    next_token = tl.load(query_start_loc + request + 1)
    if (t >= first_token) & (t < next_token):  # not padding
        end = tl.load(seq_lens + request)
        start = end - (next_token - first_token)
        if tl.program_id(1) == 0:
            _compress(
                kv, kv_stride, gate, gate_stride, ape, norm_weight, state, state_stride, state_pages, state_page, state_page_stride,
                tail, tail_stride, tail_pages, block_table, block_table_stride, block_table_width, entry_slots, cache, cache_stride,
                cache_slots, t, request, first_token, start, end, cos_sin, eps,
                D, ROWS, FORMAT, PAGE, RATIO, OVERLAP, ROPE, BR, TAILS, POOL,
            )  # fmt: skip
        elif D_2 > 0:
            _compress(
                kv_2, kv_2_stride, gate_2, gate_2_stride, ape_2, norm_weight_2, state_2, state_2_stride, state_2_pages, state_2_page,
                state_2_page_stride, tail_2, tail_2_stride, tail_2_pages, block_table_2, block_table_2_stride, block_table_2_width,
                entry_slots_2, cache_2, cache_2_stride, cache_2_slots, t, request, first_token, start, end, cos_sin, eps,
                D_2, ROWS_2, FORMAT_2, PAGE, RATIO, OVERLAP, ROPE, BR, TAILS, POOL,
            )  # fmt: skip


def _arguments(state: SummaryState) -> tuple[Any, ...]:
    given = state.projected
    tail = state.summaries if state.tail is None else state.tail
    return (
        given.kv, given.kv.stride(0), given.gate, given.gate.stride(0), given.ape, given.norm_weight,
        state.summaries, state.summaries.stride(0), state.summaries.shape[0], state.state_page, state.state_page.stride(0),
        tail, tail.stride(0), tail.shape[0], state.block_table, state.block_table.stride(0), state.block_table.shape[1],
        state.entry_slot_mapping, state.entries.data, state.entries.data.stride(0), state.entries.data.shape[0] * state.entries.rows,
    )  # fmt: skip


def _constants(state: SummaryState) -> tuple[int, int, int]:
    return state.projected.norm_weight.shape[0], state.entries.rows, format_code(state.entries.format)


def compress(states: Sequence[SummaryState], step: EntryStep, batch: BatchView) -> None:
    """See `reference.compress`. Raises ValueError for more caches than the two that a CSA layer has."""
    if step.positions.numel() == 0:
        return
    one, two = at_most_two("summary.compress", states)

    def launch(tails: bool, pool: bool) -> None:
        summary_kernel[(step.positions.shape[0], len(states))](
            *_arguments(one), *_arguments(two), batch.query_start_loc, batch.seq_lens, step.request_of_token, step.entry_cos_sin, step.eps,
            *_constants(one), *(_constants(two) if len(states) > 1 else (0, 0, 0)), one.entries.rows * step.ratio, step.ratio, step.overlap,
            step.entry_cos_sin.shape[1], min(ROWS_AT_ONCE, step.overlap * step.ratio), tails, pool, num_warps=4,
        )  # fmt: skip

    has_tails = one.tail is not None
    if has_tails and batch.max_query_len > 1:
        launch(tails=True, pool=False)
        launch(tails=False, pool=True)
    else:
        launch(tails=has_tails, pool=True)


_ONE = {
    "kv": "*fp32", "gate": "*fp32", "ape": "*fp32", "norm_weight": "*bf16", "state": "*fp32", "tail": "*fp32",
    "block_table": "*i32", "entry_slots": "*i32",
}  # fmt: skip
_TYPES = {
    **_ONE, **{f"{name}_2": kind for name, kind in _ONE.items()},
    "state_page": "*i32", "state_2_page": "*i32", "query_start_loc": "*i32", "seq_lens": "*i32", "request_of_token": "*i32", "cos_sin": "*fp32",
}  # fmt: skip


def _shipped(name: str, ratio: int, row_format: int, index_format: int | None, tails: bool, pool: bool = True) -> Shipped:
    cached = {"cache": "*u8" if row_format else "*bf16", "cache_2": "*u8" if index_format else "*bf16"}
    second = (0, 0, 0) if index_format is None else (128, 64, index_format)
    constants = {
        "D": 512, "ROWS": 256 // ratio, "FORMAT": row_format, **dict(zip(("D_2", "ROWS_2", "FORMAT_2"), second, strict=True)),
        "PAGE": 256, "RATIO": ratio, "OVERLAP": 2 if ratio == 4 else 1, "ROPE": 64, "BR": ROWS_AT_ONCE, "TAILS": tails, "POOL": pool,
    }  # fmt: skip
    return Shipped(name, summary_kernel, {**_TYPES, **cached}, constants, 4)


SHIPPED = (
    _shipped("summary tails", 4, 1, 2, tails=True, pool=False),
    _shipped("summary csa fp8 + index fp8", 4, 1, 2, tails=False),
    _shipped("summary csa fp8 + index fp8 decode", 4, 1, 2, tails=True),
    _shipped("summary csa fp8 + index mxfp4 decode", 4, 1, 3, tails=True),
    _shipped("summary csa bf16 + index bf16 decode", 4, 0, 0, tails=True),
    _shipped("summary hca fp8", 128, 1, None, tails=False),
    _shipped("summary hca bf16", 128, 0, None, tails=False),
)
