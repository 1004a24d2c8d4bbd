# SPDX-License-Identifier: Apache-2.0
"""Raw contributions are kept, and windows pooled into entries, as the reference does it."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from dsv4.model.kv_layout import IndexFormat, KvFormat
from dsv4.ops.compressor import paged as compressor
from dsv4.ops.compressor.paged import PagedState, reference
from dsv4.ops.compressor.projected import EntryStep, Projected
from dsv4.ops.norm import rms_norm
from dsv4.ops.pages import Pages, RowsFormat, SlotMapping, load_rows, row_widths
from dsv4.ops.quant.reference import hadamard
from dsv4.ops.rope import apply_rope, cos_sin
from tests.support.kernel_cases import (
    assert_bytes_equal,
    assert_encodes,
    assert_within,
    clone_pages,
    make_pages,
    memory,
)

EPS = 1e-6
FREQ = 1.6e5 ** (-torch.arange(0, 64, 2) / 64)


def state_pages(num_tokens: int, rows: int, overlap: int, dim: int) -> tuple[Pages, Tensor]:
    """Pages for num_tokens tokens of two requests, and their shuffled block table [2, n]."""
    n = -(-num_tokens // rows)
    pages = make_pages(KvFormat.PLAIN, 2 * n + 1, rows, 2 * overlap * dim, torch.float32)
    return pages, (torch.randperm(2 * n) + 1).int().view(2, n)


@pytest.mark.parametrize(
    ("num_tokens", "ratio", "overlap", "dim"),
    [(1, 4, 2, 512), (2, 4, 2, 128), (63, 128, 1, 512), (257, 4, 2, 128)],
)
def test_state_rows_are_the_references_bit_for_bit(num_tokens: int, ratio: int, overlap: int, dim: int) -> None:
    rows = 4 if ratio == 4 else 8
    pages, table = state_pages(num_tokens, rows, overlap, dim)
    positions = torch.arange(num_tokens) + 5
    slots = table[0, torch.arange(num_tokens) // rows] * rows + torch.arange(num_tokens).int() % rows
    slots[1::5] = -1
    # Views with a stride, as the fused projection gives.
    kv, gate = torch.randn(num_tokens, 2 * overlap * dim).chunk(2, -1)
    ape = torch.randn(ratio, overlap * dim)
    expected = clone_pages(pages)
    projected = Projected(kv, gate, ape, torch.ones(dim))
    compressor.save_state(projected, positions, SlotMapping(pages, slots))
    reference.save_state(projected, positions, SlotMapping(expected, slots))
    assert_bytes_equal(pages, expected)


def cloned(mapping: SlotMapping) -> SlotMapping:
    return SlotMapping(clone_pages(mapping.pages), mapping.slots)


def saved(pages: Pages, table: Tensor, weight: Tensor, entry_slots: Tensor, entries: Pages) -> PagedState:
    """State whose rows are in their pages already: neither kv, gate nor where they would go may be
    read."""
    nothing = torch.zeros(0, 0)
    projected, rows = Projected(nothing, nothing, nothing, weight), SlotMapping(pages, nothing)
    return PagedState(projected, rows, table, SlotMapping(entries, entry_slots))


class EntryCase(NamedTuple):
    """rows: entries of a page."""

    ratio: int
    overlap: int
    dim: int
    row_format: RowsFormat
    rows: int


CASES = {
    "csa-plain": EntryCase(4, 2, 512, KvFormat.PLAIN, rows=64),
    "csa-fp8": EntryCase(4, 2, 512, KvFormat.FP8_DS_MLA, rows=64),
    "hca-plain": EntryCase(128, 1, 512, KvFormat.PLAIN, rows=2),
    "hca-fp8": EntryCase(128, 1, 512, KvFormat.FP8_DS_MLA, rows=2),
    "index-plain": EntryCase(4, 2, 128, IndexFormat.PLAIN, rows=64),
    "index-fp8": EntryCase(4, 2, 128, IndexFormat.FP8, rows=64),
    "index-mxfp4": EntryCase(4, 2, 128, IndexFormat.MXFP4, rows=64),
}


def bytes_of(pages: Pages, slots: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Value bytes and scale bytes of rows."""
    width, scale_width = row_widths(pages, dim, 64)
    page, row = slots.long() // pages.rows, slots.long() % pages.rows
    values = pages.data[page[:, None], row[:, None] * width + torch.arange(width)]
    scales = pages.rows * width + row[:, None] * scale_width + torch.arange(scale_width)
    return values, pages.data[page[:, None], scales]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_entries_are_pooled_normalised_rotated_and_stored_as_by_the_reference(case: EntryCase) -> None:
    """Two requests: one from position 0, whose first CSA entry has half its rows, one in the middle
    of its life."""
    ratio, overlap, dim, row_format, rows = case
    state_rows = 4 if ratio == 4 else 8
    total = 3 * ratio + 3
    state, table = state_pages(total, state_rows, overlap, dim)
    for r in range(2):
        at = torch.arange(total)
        slots = table[r, at // state_rows] * state_rows + (at % state_rows).int()
        first = 0 if r == 0 else ratio  # what the second request no longer owns stays NaN
        row = torch.randn(total, 2 * overlap * dim)
        reference.store_rows(state, slots[first:], row[first:], 0)
    completes = {0: [ratio - 1, 2 * ratio - 1], 1: [3 * ratio - 1]}
    request, positions = [], []
    for r, ends in completes.items():
        for end in ends:
            request += [r, r]
            positions += [end - 1, end]
    request_of_token, positions_t = torch.tensor(request, dtype=torch.int32), torch.tensor(positions)
    entry_slots = torch.full((len(positions),), -1, dtype=torch.int32)
    entry_slots[1::2] = torch.tensor([0, rows - 1, 3 * rows - 1], dtype=torch.int32)  # exact page ends
    cache = make_pages(row_format, 4, rows, dim)
    expected = clone_pages(cache)
    weight = torch.rand(dim) + 0.5
    entry_table = cos_sin(positions_t // ratio * ratio, FREQ)
    step = EntryStep(
        positions=positions_t,
        request_of_token=request_of_token,
        ratio=ratio,
        overlap=overlap,
        eps=EPS,
        entry_cos_sin=entry_table,
    )
    compressor.compress_store([saved(state, table, weight, entry_slots, cache)], step)
    reference.compress_store([saved(state, table, weight, entry_slots, expected)], step)

    kept = entry_slots >= 0
    where = entry_slots[kept]
    exact = exact_entries(
        state, table, request_of_token[kept], positions_t[kept], ratio=ratio, overlap=overlap, dim=dim
    )
    exact = apply_rope(rms_norm(exact, weight, EPS), entry_table[kept])
    if row_format in (KvFormat.PLAIN, IndexFormat.PLAIN):
        assert_within(load_rows(cache, where, dim, 64).bfloat16(), exact, load_rows(expected, where, dim, 64))
        for p in (cache, expected):
            p.data[where.long() // rows, where.long() % rows] = 0
    else:
        source = hadamard(exact.bfloat16()) if row_format in (IndexFormat.FP8, IndexFormat.MXFP4) else exact
        # fp32 softmax, pooling and norm differ in some last bits, which may flip one bf16 rounding
        # of an element; behind the Hadamard sum that is one of 128 addends.
        slack = 2.0**-8 if source is exact else 2.0**-9
        assert_encodes(*bytes_of(cache, where, dim), source, row_format, 64, slack=slack)
        width, scale_width = row_widths(cache, dim, 64)
        for p in (cache, expected):
            for page, row in zip(where.long() // rows, where.long() % rows, strict=True):
                p.data[page, row * width : (row + 1) * width] = 0
                p.data[page, rows * width + row * scale_width : rows * width + (row + 1) * scale_width] = 0
    assert_bytes_equal(cache, expected)  # nothing else was touched


def exact_entries(
    state: Pages,
    table: Tensor,
    request: Tensor,
    positions: Tensor,
    *,
    ratio: int,
    overlap: int,
    dim: int,
) -> Tensor:
    """Pooled entries straight from docs/model.md, 3.4, one row at a time: fp32 [N, dim]."""
    out = []
    for r, end in zip(request.tolist(), positions.tolist(), strict=True):
        kv, score = [], []
        for i, at in enumerate(range(end - overlap * ratio + 1, end + 1)):
            if at < 0:
                continue
            row = state.data[table[r, at // state.rows], at % state.rows]
            a, b = row.chunk(2)
            part = slice(0, dim) if overlap == 1 or i < ratio else slice(dim, 2 * dim)
            kv.append(a[part])
            score.append(b[part])
        p = torch.stack(score).double().softmax(0)
        out.append((p * torch.stack(kv).double()).sum(0).float())
    return torch.stack(out)


def test_slots_and_pages_out_of_range_touch_nothing() -> None:
    state, _ = state_pages(8, 4, 2, 128)
    cache = make_pages(IndexFormat.FP8, 2, 64, 128)
    before = memory(cache).clone(), memory(state).clone()
    ones = torch.zeros(2, dtype=torch.int32)
    kv, positions = torch.randn(2, 256), torch.tensor([3, 7])
    projected = Projected(kv, kv, torch.randn(4, 256), torch.ones(128))
    compressor.save_state(projected, positions, SlotMapping(state, torch.tensor([10_000, -1], dtype=torch.int32)))
    slots = torch.tensor([128, -1], dtype=torch.int32)
    table = torch.full((1, 2), 1 << 20, dtype=torch.int32)
    step = EntryStep(
        positions=positions,
        request_of_token=ones,
        ratio=4,
        overlap=2,
        eps=EPS,
        entry_cos_sin=torch.zeros(2, 64),
    )
    compressor.compress_store([saved(state, table, torch.ones(128), slots, cache)], step)
    assert torch.equal(memory(cache), before[0])
    assert torch.equal(memory(state), before[1])


@pytest.mark.parametrize(
    ("ratio", "caches"),
    [
        (4, [(512, KvFormat.FP8_DS_MLA), (128, IndexFormat.FP8)]),
        (4, [(128, IndexFormat.MXFP4), (512, KvFormat.PLAIN)]),
        (4, [(512, KvFormat.FP8_DS_MLA)]),
        (128, [(512, KvFormat.PLAIN)]),
    ],
    ids=["csa-pair", "pair-the-other-way", "csa", "hca"],
)
@pytest.mark.parametrize("already", [0, 3, 130], ids=["whole", "open-window", "later"])
def test_one_launch_writes_the_bytes_of_all(ratio: int, caches: list[tuple[int, RowsFormat]], already: int) -> None:
    """Two requests and a padding token in one step; entries pool rows of this step, of earlier
    ones, and of both."""
    overlap, state_rows, new = 2 if ratio == 4 else 1, 4 if ratio == 4 else 8, ratio + 2
    total, rows = already + new, 256 // ratio
    at = torch.arange(total)
    positions = torch.cat([at[already:], at[already:], torch.zeros(1, dtype=torch.int64)])
    request = torch.tensor([0] * new + [1] * new + [1], dtype=torch.int32)
    entry_slots = torch.where((positions + 1) % ratio == 0, request * rows + positions // ratio % rows, -1).int()
    entry_slots[-1] = -1
    entry_table = cos_sin(positions // ratio * ratio, FREQ)
    step = EntryStep(
        positions=positions,
        request_of_token=request,
        ratio=ratio,
        overlap=overlap,
        eps=EPS,
        entry_cos_sin=entry_table,
    )
    states = []
    for dim, row_format in caches:
        pages, table = state_pages(total, state_rows, overlap, dim)
        for r in range(2):
            slots = table[r, at[:already] // state_rows] * state_rows + (at[:already] % state_rows).int()
            reference.store_rows(pages, slots, torch.randn(already, 2 * overlap * dim), 0)
        slot_mapping = (table[request.long(), positions // state_rows] * state_rows + positions % state_rows).int()
        slot_mapping[-1] = -1
        kv, gate = torch.randn(2 * new + 1, 2 * overlap * dim).chunk(2, -1)
        projected = Projected(kv, gate, torch.randn(ratio, overlap * dim), torch.rand(dim) + 0.5)
        entries = SlotMapping(make_pages(row_format, 2, rows, dim), entry_slots)
        states.append(PagedState(projected, SlotMapping(pages, slot_mapping), table, entries))
    apart = [replace(state, rows=cloned(state.rows), entries=cloned(state.entries)) for state in states]
    compressor.update(states, step)
    for one, two in zip(states, apart, strict=True):
        compressor.save_state(two.projected, positions, two.rows)
        compressor.compress_store([two], step)
        assert_bytes_equal(one.rows.pages, two.rows.pages)
        assert_bytes_equal(one.entries.pages, two.entries.pages)


def test_rows_of_another_request_in_the_step_are_not_taken_for_ones_own() -> None:
    """Request 1 goes on at the position where request 0 stops, so that only the request tells their
    rows apart."""
    state, table = state_pages(16, 4, 2, 128)
    earlier = torch.arange(10)
    reference.store_rows(state, table[1, earlier // 4] * 4 + (earlier % 4).int(), torch.randn(10, 512), 0)
    positions = torch.cat([torch.arange(4, 10), torch.arange(10, 12)])
    request = torch.tensor([0] * 6 + [1] * 2, dtype=torch.int32)
    state_slots = (table[request.long(), positions // 4] * 4 + positions % 4).int()
    entry_slots = torch.tensor([-1] * 7 + [2], dtype=torch.int32)
    projected = Projected(torch.randn(8, 256), torch.randn(8, 256), torch.randn(4, 256), torch.ones(128))
    cache = make_pages(IndexFormat.FP8, 1, 64, 128)
    together = PagedState(projected, SlotMapping(state, state_slots), table, SlotMapping(cache, entry_slots))
    entries = SlotMapping(make_pages(IndexFormat.FP8, 1, 64, 128), entry_slots)
    apart = replace(together, rows=cloned(together.rows), entries=entries)
    step = EntryStep(
        positions=positions,
        request_of_token=request,
        ratio=4,
        overlap=2,
        eps=EPS,
        entry_cos_sin=torch.zeros(8, 64),
    )
    compressor.update([together], step)
    compressor.save_state(projected, positions, apart.rows)
    compressor.compress_store([apart], step)
    assert_bytes_equal(cache, apart.entries.pages)
