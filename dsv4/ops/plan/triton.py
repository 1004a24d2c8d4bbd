# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of the plan; their references are `plan/reference.py`.

One launch plans a whole step: some programs for the tokens themselves, then some for each cache.
Each finds out for itself whose tokens it has, so that none waits for another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.model.config import CSA_RATIO, HCA_RATIO
from dsv4.ops.pages import BatchView
from dsv4.ops.plan.caches import BlockCache, EntryPlan, RowCache, WindowCache, WindowPlan
from dsv4.ops.plan.reference import Cache, CachePlan, RopeTables, StepPlan
from dsv4.ops.plan.rings import RingPlan, Rings
from dsv4.ops.plan.tokens import Homes

TOKENS = 16  # of a program
REQUESTS = 64  # looked at together for whose a token is
ENTRIES = 1024  # slots of a request that a program writes
COLUMNS = 256  # of page tables that a program writes
ROWS: tl.constexpr = tl.constexpr(0)
WINDOW: tl.constexpr = tl.constexpr(1)
ENTRY: tl.constexpr = tl.constexpr(2)
RING: tl.constexpr = tl.constexpr(3)
BLOCK: tl.constexpr = tl.constexpr(4)


class CacheGroup(NamedTuple):
    """A cache and its plan. Fields that a kind has not are None; those in capitals are constants.

    table, table_stride, table_width: of pages by request, or of the owners of rings
    PAGE: tokens of a page, or of an owner
    SIZE: tokens of a window, of an entry, or rows of a ring page
    COUNT: of entries that an indexer chooses, of windows that an entry is pooled from, or of tokens
    of a draft's block
    LENGTH: pages of a ring
    """

    KIND: Any
    table: Any
    table_stride: Any
    table_width: Any
    PAGE: Any
    SIZE: Any
    COUNT: Any
    LENGTH: Any
    slot_mapping: Any
    lens: Any
    chosen_lens: Any
    lists: Any
    lists_stride: Any
    positions: Any


@triton.jit
def _page(group, request, column, mask):
    """Pages by request and column of a table; -1 outside it."""
    inside = mask & (column >= 0) & (column < group.table_width)
    return tl.load(group.table + request.to(tl.int64) * group.table_stride + column, mask=inside, other=-1)


@triton.jit
def _slot(page, row, ROWS_OF_PAGE: tl.constexpr):
    return tl.where(page >= 0, page * ROWS_OF_PAGE + row, -1)


@triton.jit
def _ring_page(group, request, position, mask):
    owner = _page(group, request, position // group.PAGE, mask)
    return tl.where(owner >= 0, owner * group.LENGTH + (position // group.SIZE) % group.LENGTH, -1)


@triton.jit
def _tokens(query_start_loc, seq_lens, homes, first_home, index, num_tokens, num_reqs, BR: tl.constexpr):
    """Request and position of tokens, and whether they are anybody's."""
    request = index * 0
    for first in range(0, num_reqs, BR):
        at = first + tl.arange(0, BR)
        ends = tl.load(query_start_loc + 1 + at, mask=at < num_reqs, other=2147483647)
        request += tl.sum((ends[None, :] <= index[:, None]).to(tl.int32), 1)
    request = tl.minimum(request, num_reqs - 1)
    end = tl.load(query_start_loc + 1 + request)
    valid = (index < num_tokens) & (index < tl.load(query_start_loc + num_reqs))
    position = tl.where(valid, tl.load(seq_lens + request).to(tl.int32) - end + index, 0)
    if homes is not None:
        valid = valid & (tl.load(homes + index, mask=index < num_tokens, other=0) >= first_home)
    return request, position, valid


@triton.jit
def _plan(group, index, here, request, position, valid, query_start_loc, seq_lens):
    """What the tokens `here` write and read in one cache."""
    if group.KIND == RING:
        base = tl.maximum(position // group.SIZE - (group.COUNT - 1), 0) * group.SIZE
        tl.store(group.positions + index, (position - base).to(tl.int64), mask=here)
        slot = _slot(_ring_page(group, request, position, valid), position % group.SIZE, group.SIZE)
        tl.store(group.slot_mapping + index, slot, mask=here)
        for n in tl.static_range(group.COUNT):
            page = _ring_page(group, request, tl.minimum(base + n * group.SIZE, position), here)
            tl.store(group.lists + index * group.COUNT + n, page, mask=here)
    elif group.KIND == ENTRY:
        entry = position // group.SIZE
        completes = valid & ((position + 1) % group.SIZE == 0)
        page = _page(group, request, entry // (group.PAGE // group.SIZE), completes)
        slot = _slot(page, entry % (group.PAGE // group.SIZE), group.PAGE // group.SIZE)
        tl.store(group.slot_mapping + index, slot, mask=here)
        lens = tl.where(valid, (position + 1) // group.SIZE, 0)
        tl.store(group.lens + index, lens, mask=here)
        if group.chosen_lens is not None:
            tl.store(group.chosen_lens + index, tl.minimum(lens, group.COUNT), mask=here)
    else:
        page = _page(group, request, position // group.PAGE, valid)
        tl.store(group.slot_mapping + index, _slot(page, position % group.PAGE, group.PAGE), mask=here)
        if group.KIND == WINDOW:
            lens = tl.where(valid, tl.minimum(position + 1, group.SIZE), 0)
            tl.store(group.lens + index, lens, mask=here)
            place = tl.arange(0, group.SIZE)[None, :]
            at = (position + 1 - lens)[:, None] + place
            page = _page(group, request[:, None], at // group.PAGE, place < lens[:, None])
            slots = group.lists + index.to(tl.int64)[:, None] * group.SIZE + place
            tl.store(slots, _slot(page, at % group.PAGE, group.PAGE), mask=here[:, None] & (place >= 0))
        elif group.KIND == BLOCK:
            end = tl.load(seq_lens + request).to(tl.int32)
            new = tl.load(query_start_loc + 1 + request) - tl.load(query_start_loc + request)
            first = tl.maximum(end - new - group.SIZE, 0)
            lens = tl.where(valid, end - first, 0)
            tl.store(group.lens + index, lens, mask=here)
            WIDTH: tl.constexpr = group.SIZE + group.COUNT
            place = tl.arange(0, 2 * group.SIZE)[None, :]
            at = first[:, None] + place
            page = _page(group, request[:, None], at // group.PAGE, place < lens[:, None])
            slots = group.lists + index.to(tl.int64)[:, None] * WIDTH + place
            tl.store(slots, _slot(page, at % group.PAGE, group.PAGE), mask=here[:, None] & (place < WIDTH))


@triton.jit
def _list_entries(group, seq_lens, program, max_entries, BE: tl.constexpr):
    """The slots of a request's entries, as far as it has any."""
    blocks = tl.cdiv(max_entries, BE)
    request = program // blocks
    entry = program % blocks * BE + tl.arange(0, BE)
    have = tl.minimum(tl.load(seq_lens + request).to(tl.int32) // group.SIZE, max_entries)
    page = _page(group, request, entry // (group.PAGE // group.SIZE), entry < have)
    slot = _slot(page, entry % (group.PAGE // group.SIZE), group.PAGE // group.SIZE)
    tl.store(group.lists + request.to(tl.int64) * group.lists_stride + entry, slot, mask=entry < have)


@triton.jit(
    do_not_specialize=[
        "query_start_loc", "seq_lens", "homes", "first_home", "num_tokens", "num_reqs", "max_entries",
    ]
)  # fmt: skip
def step_kernel(
    query_start_loc, seq_lens, homes, first_home, request_of_token, positions, valid_of_token, groups,
    num_tokens, num_reqs, max_entries,
    GROUPS: tl.constexpr, BT: tl.constexpr, BR: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """One program after another: cdiv(T, BT) for the tokens, as many for each of the `CacheGroup`s,
    and R * cdiv(max_entries, BE) behind those of a cache whose entries are listed."""
    blocks = tl.cdiv(num_tokens, BT)
    program = tl.program_id(0)
    if program < blocks * (1 + GROUPS):
        index = program % blocks * BT + tl.arange(0, BT)
        here = index < num_tokens
        request, position, valid = _tokens(
            query_start_loc, seq_lens, homes, first_home, index, num_tokens, num_reqs, BR
        )
        if program < blocks:
            tl.store(request_of_token + index, request, mask=here)
            tl.store(positions + index, position.to(tl.int64), mask=here)
            tl.store(valid_of_token + index, valid.to(tl.uint8), mask=here)
        for at in tl.static_range(GROUPS):
            if program // blocks == at + 1:
                _plan(groups[at], index, here, request, position, valid, query_start_loc, seq_lens)
    else:
        program -= blocks * (1 + GROUPS)
        lists = num_reqs * tl.cdiv(max_entries, BE)
        for at in tl.static_range(GROUPS):
            if groups[at].lists_stride is not None:
                if (program >= 0) & (program < lists):
                    _list_entries(groups[at], seq_lens, program, max_entries, BE)
                program -= lists


NO_GROUP = CacheGroup(*[None] * len(CacheGroup._fields))


def _group(cache: Cache, plan: CachePlan) -> CacheGroup:
    if isinstance(cache, Rings):
        assert isinstance(plan, RingPlan)
        return NO_GROUP._replace(
            KIND=RING,
            PAGE=tl.constexpr(cache.owner_tokens),
            SIZE=tl.constexpr(cache.ratio),
            COUNT=tl.constexpr(cache.windows),
            LENGTH=tl.constexpr(cache.length),
            slot_mapping=plan.slot_mapping,
            lists=plan.block_table,
            positions=plan.positions,
            **_table(cache.owner_table),
        )
    found = NO_GROUP._replace(PAGE=tl.constexpr(cache.page_tokens), **_table(cache.block_table))
    if isinstance(cache, RowCache):
        assert isinstance(plan, Tensor)
        return found._replace(KIND=ROWS, slot_mapping=plan)
    if isinstance(cache, WindowCache | BlockCache):
        assert isinstance(plan, WindowPlan)
        if isinstance(cache, BlockCache):
            if cache.block > cache.window:
                raise ValueError(f"a block of {cache.block} tokens is longer than its window of {cache.window}")
            found = found._replace(COUNT=tl.constexpr(cache.block))
        return found._replace(
            KIND=BLOCK if isinstance(cache, BlockCache) else WINDOW,
            SIZE=tl.constexpr(cache.window),
            slot_mapping=plan.slot_mapping,
            lens=plan.lens,
            lists=plan.slots,
        )
    assert isinstance(plan, EntryPlan)
    found = found._replace(KIND=ENTRY, SIZE=tl.constexpr(cache.ratio), slot_mapping=plan.slot_mapping, lens=plan.lens)
    if plan.request_slots is not None:
        return found._replace(lists=plan.request_slots, lists_stride=plan.request_slots.stride(0))
    return found._replace(COUNT=tl.constexpr(cache.topk), chosen_lens=plan.chosen_lens)


def _table(table: Tensor) -> dict[str, Any]:
    return {"table": table, "table_stride": table.stride(0), "table_width": table.shape[1]}


def step(batch: BatchView, caches: Sequence[Cache], plan: StepPlan, homes: Homes | None = None) -> None:
    """See `reference.step`."""
    if batch.num_tokens == 0:
        return
    listed = [made for made in plan.caches if isinstance(made, EntryPlan) and made.request_slots is not None]
    max_entries = max((made.max_entries for made in listed), default=0)
    lists = len(listed) * batch.num_reqs * triton.cdiv(max_entries, ENTRIES)
    step_kernel[(triton.cdiv(batch.num_tokens, TOKENS) * (1 + len(caches)) + lists,)](
        batch.query_start_loc,
        batch.seq_lens,
        None if homes is None else homes.at,
        0 if homes is None else homes.first,
        plan.tokens.request_of_token,
        plan.tokens.positions,
        plan.tokens.valid.view(torch.uint8),
        tuple(_group(cache, made) for cache, made in zip(caches, plan.caches, strict=True)),
        batch.num_tokens,
        batch.num_reqs,
        max_entries,
        GROUPS=len(caches),
        BT=TOKENS,
        BR=REQUESTS,
        BE=ENTRIES,
        num_warps=4,
    )


@triton.jit(do_not_specialize=["places_stride", "requests", "num_places", "columns"])
def page_tables_kernel(
    places, places_stride, requests, to_window, num_places, full, window, stride, columns,
    PAGE: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """grid (R, cdiv(columns, BC)). stride: of both tables, which have more columns."""
    r = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BC + tl.arange(0, BC)
    here = column < columns
    request = tl.load(requests + r).to(tl.int64)
    place = tl.load(places + request * places_stride + column * PAGE, mask=here, other=0).to(tl.int64)
    known = here & (place >= 0) & (place < num_places)
    to = tl.maximum(tl.load(to_window + place, mask=known, other=0), 0)
    tl.store(full + r * stride + column, (place // PAGE).to(tl.int32), mask=here)
    tl.store(window + r * stride + column, (to // PAGE).to(tl.int32), mask=here)


def page_tables(
    places: Tensor, requests: Tensor, to_window: Tensor, full: Tensor, window: Tensor, *, page_tokens: int, columns: int
) -> None:
    """See `reference.page_tables`. Raises ValueError for tables whose rows do not lie alike."""
    if full.stride() != window.stride():
        raise ValueError(f"page tables of strides {full.stride()} and {window.stride()} are not written together")
    page_tables_kernel[(requests.shape[0], triton.cdiv(columns, COLUMNS))](
        places,
        places.stride(0),
        requests,
        to_window,
        to_window.shape[0],
        full,
        window,
        full.stride(0),
        columns,
        PAGE=page_tokens,
        BC=COLUMNS,
        num_warps=4,
    )


@triton.jit(do_not_specialize=["positions", "num_tokens"])
def rope_tables_kernel(
    positions, window_freq, compressed_freq, tables, num_tokens,
    FIRST: tl.constexpr, SECOND: tl.constexpr, HALF: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """grid (cdiv(T, BT), 4): one table each, of the tokens in windows, in compressed layers, and of
    the entries of FIRST and of SECOND tokens that they belong to."""
    index = tl.program_id(0) * BT + tl.arange(0, BT)
    table = tl.program_id(1)
    here = index < num_tokens
    ratio = tl.where(table == 2, FIRST, tl.where(table == 3, SECOND, 1))
    position = tl.load(positions + index, mask=here, other=0).to(tl.int32) // ratio * ratio
    d = tl.arange(0, HALF)
    is_window = (table == 0) & (d >= 0)
    freq = tl.load(window_freq + d, mask=is_window, other=0.0)
    freq = tl.where(is_window, freq, tl.load(compressed_freq + d, mask=is_window == 0, other=0.0))
    angle = position.to(tl.float32)[:, None] * freq[None, :]
    row = (table * num_tokens + index).to(tl.int64) * (2 * HALF)
    at = tables + row[:, None] + d[None, :]
    tl.store(at, tl.cos(angle), mask=here[:, None])
    tl.store(at + HALF, tl.sin(angle), mask=here[:, None])


def rope_tables(positions: Tensor, window_freq: Tensor, compressed_freq: Tensor) -> RopeTables:
    """See `reference.rope_tables`."""
    num_tokens, half = positions.shape[0], window_freq.shape[0]
    tables = torch.empty(4, num_tokens, 2 * half, dtype=torch.float32, device=positions.device)
    if num_tokens:
        rope_tables_kernel[(triton.cdiv(num_tokens, TOKENS), 4)](
            positions,
            window_freq,
            compressed_freq,
            tables,
            num_tokens,
            FIRST=CSA_RATIO,
            SECOND=HCA_RATIO,
            HALF=half,
            BT=TOKENS,
            num_warps=4,
        )
    return RopeTables(tables[0], tables[1], {CSA_RATIO: tables[2], HCA_RATIO: tables[3]})
