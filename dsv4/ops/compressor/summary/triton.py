# SPDX-License-Identifier: Apache-2.0
"""Triton kernel of the compressor on summaries; its reference is `summary/reference.py`.

No program may read what another of the same launch writes. A request's kept state is read and
written by the program of its first token alone, which also pools the entries that need it, or rows
before the step; other entries lie wholly in the step's rows. Page-end tails are written by a launch
of their own, before anything reads one. A step of one token per request does without it: an entry
that needs a tail ends RATIO tokens behind the page end, thus in a later step than the one that
wrote it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl

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
from dsv4.ops.compressor.projected import EntryStep
from dsv4.ops.compressor.summary.state import SummaryState
from dsv4.ops.pages import BatchView


class SummaryGroup(NamedTuple):
    """A `SummaryState`, but for what Triton would compile anew for every class of. Without tails
    `tail` is any pointer. ring, since: None where DRAFTED, the rows to take back, is 0."""

    projected: ProjectedGroup
    summaries: Any
    summaries_stride: Any
    num_summaries: Any
    ring: Any
    since: Any
    since_stride: Any
    DRAFTED: Any
    state_page: Any
    tail: Any
    tail_stride: Any
    num_tails: Any
    block_table: Any
    entries: EntryGroup


class Summary(NamedTuple):
    """Some rows' largest score, sum of exponentials and weighted sum, per channel: [D] fp32
    each."""

    top: Any
    weight: Any
    total: Any


@triton.jit
def _merge(a, b):
    """The summary of both."""
    top = tl.maximum(a.top, b.top)
    finite = tl.where(top == float("-inf"), 0.0, top)
    scale_a, scale_b = tl.exp(a.top - finite), tl.exp(b.top - finite)
    return Summary(top, a.weight * scale_a + b.weight * scale_b, a.total * scale_a + b.total * scale_b)


@triton.jit
def _load_summary(at, use, D: tl.constexpr):
    """The summary at the pointer `at` where `use`, the empty one elsewhere."""
    d = tl.arange(0, D)
    mask = use & (d < D)
    top = tl.load(at + d, mask=mask, other=float("-inf"))
    return Summary(top, tl.load(at + D + d, mask=mask, other=0.0), tl.load(at + 2 * D + d, mask=mask, other=0.0))


@triton.jit
def _store_summary(at, summary, D: tl.constexpr):
    d = tl.arange(0, D)
    tl.store(at + d, summary.top)
    tl.store(at + D + d, summary.weight)
    tl.store(at + 2 * D + d, summary.total)


@triton.jit
def _pool_rows(
    cache, ring, token_of_0, start, first, last, window, RATIO: tl.constexpr, OVERLAP: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Summary of the rows at positions first .. last: columns A before `window`, then B.

    ring: of the request, which has the rows before the step's `start`
    token_of_0: the token that position 0 would be.
    """
    projected = cache.projected
    D: tl.constexpr = cache.projected.D
    d = tl.arange(0, D)
    rows = Summary(tl.full([D], float("-inf"), tl.float32), tl.zeros([D], tl.float32), tl.zeros([D], tl.float32))
    for block in range(first, last + 1, BR):
        at = block + tl.arange(0, BR)
        here = (at <= last) & (at >= start)
        token = (token_of_0 + at).to(tl.int64)
        column = tl.where(at < window, 0, (OVERLAP - 1) * D)
        kv = projected.kv + (token * projected.kv_stride + column)[:, None] + d[None, :]
        gate = projected.gate + (token * projected.gate_stride + column)[:, None] + d[None, :]
        bias = projected.ape + ((at % RATIO) * (OVERLAP * D) + column)[:, None] + d[None, :]
        here = here[:, None] & (d < D)[None, :]
        values = tl.load(kv, mask=here, other=0.0)  # [BR, D]
        score = tl.load(gate, mask=here, other=float("-inf"))
        score += tl.load(bias, mask=here, other=0.0)
        if cache.DRAFTED > 0:
            kept = ((at < start) & (at <= last))[:, None] & (d < D)[None, :]
            row = ring + ((at % cache.DRAFTED) * (2 * OVERLAP * D) + column)[:, None] + d[None, :]
            values = tl.where(kept, tl.load(row, mask=kept, other=0.0), values)
            score = tl.where(kept, tl.load(row + OVERLAP * D, mask=kept, other=0.0), score)
        top = tl.max(score, 0)
        finite = tl.where(top == float("-inf"), 0.0, top)
        p = tl.exp(score - finite[None, :])
        rows = _merge(rows, Summary(top, tl.sum(p, 0), tl.sum(p * values, 0)))
    return rows


@triton.jit
def _keep_rows(
    cache, ring, token_of_0, first, end, RATIO: tl.constexpr, OVERLAP: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Put the step's rows at positions first .. end - 1, at most DRAFTED, in the request's ring."""
    projected = cache.projected
    D: tl.constexpr = cache.projected.D
    d = tl.arange(0, D)
    for block in range(first, end, BR):
        at = block + tl.arange(0, BR)
        here = (at < end)[:, None] & (d < D)[None, :]
        token, row = (token_of_0 + at).to(tl.int64), (at % cache.DRAFTED) * (2 * OVERLAP * D)
        for half in tl.static_range(OVERLAP):
            column = half * D + d[None, :]
            kv = tl.load(projected.kv + (token * projected.kv_stride)[:, None] + column, mask=here, other=0.0)
            gate = tl.load(projected.gate + (token * projected.gate_stride)[:, None] + column, mask=here, other=0.0)
            bias = tl.load(projected.ape + ((at % RATIO) * (OVERLAP * D))[:, None] + column, mask=here, other=0.0)
            tl.store(ring + row[:, None] + column, kv, mask=here)
            tl.store(ring + row[:, None] + OVERLAP * D + column, gate + bias, mask=here)


@triton.jit
def _compress(
    cache, state_page_stride, table_stride, table_width, t, request, first_token, start, end, cos_sin, eps,
    RATIO: tl.constexpr, OVERLAP: tl.constexpr, ROPE: tl.constexpr, BR: tl.constexpr,
    TAILS: tl.constexpr, POOL: tl.constexpr,
):  # fmt: skip
    """What the program of token t does for one cache: up to five jobs, each of which pools a window
    as far as it has come.

    Job 0 writes the tail of the page that t ends, jobs 1 .. OVERLAP store entries, and the OVERLAP
    jobs behind them the request's state. Only the first token of a request has more than job 1; its
    entries are those that need the state.
    """
    D: tl.constexpr = cache.projected.D
    PAGE: tl.constexpr = cache.entries.ROWS * RATIO  # tokens of a page
    BEFORE: tl.constexpr = (OVERLAP - 1) * RATIO  # rows of the window before that an entry pools
    RESUME: tl.constexpr = PAGE if OVERLAP == 2 else RATIO  # where nothing is kept, whatever the state page holds
    is_first = t == first_token
    token_of_0 = first_token - start
    position = (t - token_of_0).to(tl.int32)
    page = tl.load(cache.state_page + request * state_page_stride)
    has_state = (page >= 0) & (page < cache.num_summaries)
    kept_at = tl.where(has_state, page, 0).to(tl.int64) * cache.summaries_stride
    kept, ring = cache.summaries + kept_at, cache.summaries
    # The summaries are of the rows before `since`, and the ring has those from there to `start`;
    # the step keeps them as of `keeps`. Without drafts these are its start and end.
    since, keeps = start, end
    if cache.DRAFTED > 0:
        ring = cache.ring + kept_at
        reads = (is_first | (POOL == 0)) & (start % RESUME != 0) & has_state
        since_at = cache.since + tl.where(has_state, page, 0).to(tl.int64) * cache.since_stride
        since = tl.where(reads, tl.load(since_at, mask=reads, other=0), start)
        keeps = tl.maximum(start + 1, end - cache.DRAFTED)
    table = cache.block_table + request * table_stride
    jobs = 1
    if POOL:
        jobs = tl.where(is_first, 1 + 2 * OVERLAP, 2)
    for job in range(0 if TAILS else 1, jobs):
        to_tail = job == 0
        to_state = job > OVERLAP
        window = tl.where(is_first, start // RATIO * RATIO + (job - 1) * RATIO, position - (RATIO - 1))
        window = tl.where(to_state, keeps // RATIO * RATIO + (job - OVERLAP - 1) * RATIO, window)
        window = tl.where(to_tail, position + 1, window)
        last = tl.where(to_state, keeps - 1, tl.where(to_tail, position, window + (RATIO - 1)))
        # The window before this one ends a page, whose tail holds columns A; not while they are
        # still being collected.
        from_tail = (OVERLAP == 2) & (window % PAGE == 0) & (job > 0) & (job < 2 * OVERLAP)
        # Where in its page the summary that this job writes, or reads, lies.
        tail_place = tl.where(to_tail, position, window - 1) // PAGE
        wants_tail = (to_tail & (window % PAGE == 0)) | (from_tail & (to_state == 0) & (window > 0))
        wants_tail = wants_tail & (tail_place < table_width)
        tail_page = tl.load(table + tail_place, mask=wants_tail, other=-1)
        has_tail = (tail_page >= 0) & (tail_page < cache.num_tails)
        tail_at = cache.tail + tl.where(has_tail, tail_page, 0).to(tl.int64) * cache.tail_stride
        # An entry that needs the state is the first token's, one that does not is its own last
        # token's.
        ends = (to_tail == 0) & (to_state == 0) & (last < end) & (is_first == (start > window - BEFORE))
        slot = tl.load(cache.entries.slot_mapping + token_of_0 + last, mask=ends, other=-1)
        to_entry = (slot >= 0) & (slot < cache.entries.num_slots)
        if to_entry | (to_state & has_state) | (to_tail & has_tail):
            first = tl.maximum(since, tl.where(from_tail, window, window - BEFORE))
            summary = _pool_rows(cache, ring, token_of_0, start, first, last, window, RATIO, OVERLAP, BR)
            inside = since >= window
            use = (inside & (since % RESUME != 0)) | ((inside == 0) & (since > window - BEFORE) & (from_tail == 0))
            summary = _merge(summary, _load_summary(kept + tl.where(inside, 0, 3 * D), use & has_state, D))
            if to_tail:
                _store_summary(tail_at, summary, D)
            elif to_state:
                tl.debug_barrier()  # every thread has read the kept summaries
                _store_summary(kept + (job - OVERLAP - 1) * (3 * D), summary, D)
            else:
                if POOL:
                    if OVERLAP == 2:
                        summary = _merge(summary, _load_summary(tail_at, has_tail, D))
                    pooled, row = summary.total / summary.weight, cos_sin + (token_of_0 + last).to(tl.int64) * ROPE
                    store_entry(pooled, cache.projected.norm_weight, eps, row, cache.entries, slot, D, ROPE)
    if POOL and cache.DRAFTED > 0:  # noqa: SIM102 (decided when it is compiled)
        if is_first & has_state:
            tl.debug_barrier()  # every thread has read the kept rows
            _keep_rows(cache, ring, token_of_0, keeps, end, RATIO, OVERLAP, BR)
            tl.store(since_at, keeps.to(tl.int32))


@triton.jit(
    do_not_specialize=[
        "first_state_stride",
        "first_table_stride",
        "first_table_width",
        "second_state_stride",
        "second_table_stride",
        "second_table_width",
    ],
)
def summary_kernel(
    first, first_state_stride, first_table_stride, first_table_width,
    second, second_state_stride, second_table_stride, second_table_width, query_start_loc, seq_lens, request_of_token, cos_sin, eps,
    RATIO: tl.constexpr, OVERLAP: tl.constexpr, ROPE: tl.constexpr, BR: tl.constexpr,
    TAILS: tl.constexpr, POOL: tl.constexpr,
):  # fmt: skip
    """grid (T, caches). first, second: `SummaryGroup`s.

    second: None for a layer with one cache
    *_state_stride: how far a group's state pages lie apart
    *_table_width: columns of its block table

    TAILS: write the page-end tails
    POOL: store entries and state; both in one launch only when no request has more than one token
    """
    t = tl.program_id(0)
    request = tl.load(request_of_token + t).to(tl.int64)
    first_token = tl.load(query_start_loc + request)
    next_token = tl.load(query_start_loc + request + 1)
    if (t >= first_token) & (t < next_token):  # not padding
        end = tl.load(seq_lens + request)
        start = end - (next_token - first_token)
        if tl.program_id(1) == 0:
            _compress(
                first, first_state_stride, first_table_stride, first_table_width, t, request, first_token, start, end,
                cos_sin, eps, RATIO, OVERLAP, ROPE, BR, TAILS, POOL,
            )  # fmt: skip
        elif second is not None:
            _compress(
                second, second_state_stride, second_table_stride, second_table_width, t, request, first_token, start,
                end, cos_sin, eps, RATIO, OVERLAP, ROPE, BR, TAILS, POOL,
            )  # fmt: skip


def _group(state: SummaryState) -> SummaryGroup:
    kept = state.kept
    tail = kept.summaries if state.tail is None else state.tail
    return SummaryGroup(
        projected=projected_group(state.projected),
        summaries=kept.summaries,
        summaries_stride=kept.summaries.stride(0),
        num_summaries=kept.summaries.shape[0],
        ring=kept.ring,
        since=kept.since,
        since_stride=None if kept.since is None else kept.since.stride(0),
        DRAFTED=constant(kept.drafted),
        state_page=state.state_page,
        tail=tail,
        tail_stride=tail.stride(0),
        num_tails=tail.shape[0],
        block_table=state.block_table,
        entries=entry_group(state.entries),
    )


def compress(states: Sequence[SummaryState], step: EntryStep, batch: BatchView) -> None:
    """See `reference.compress`. Raises ValueError for more than a CSA layer's two caches."""
    if step.positions.numel() == 0:
        return
    first, second = at_most_two("summary.compress", [_group(state) for state in states])

    def launch(tails: bool, pool: bool) -> None:
        summary_kernel[(step.positions.shape[0], len(states))](
            first,
            states[0].state_page.stride(0),
            *table_shape(states[0].block_table),
            second,
            states[-1].state_page.stride(0),
            *table_shape(states[-1].block_table),
            batch.query_start_loc,
            batch.seq_lens,
            step.request_of_token,
            step.entry_cos_sin,
            step.eps,
            RATIO=step.ratio,
            OVERLAP=step.overlap,
            ROPE=step.entry_cos_sin.shape[1],
            BR=ROWS_AT_ONCE // 2 if states[0].kept.drafted else ROWS_AT_ONCE,  # two sources take more registers
            TAILS=tails,
            POOL=pool,
            num_warps=4,
        )

    has_tails = states[0].tail is not None
    if has_tails and batch.max_query_len > 1:
        launch(tails=True, pool=False)
        launch(tails=False, pool=True)
    else:
        launch(tails=has_tails, pool=True)
