# SPDX-License-Identifier: Apache-2.0
"""Compressor state in rings gives the entries that paged state gives, whatever the steps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dsv4.model.kv_layout import KvFormat
from dsv4.ops import plan
from dsv4.ops.compressor.paged import PagedState
from dsv4.ops.compressor.paged.reference import compress_store, save_state
from dsv4.ops.compressor.projected import EntryStep, Projected
from dsv4.ops.compressor.ring import RingState, compress_step
from dsv4.ops.pages import BatchView, Pages, SlotMapping
from dsv4.ops.plan import RingPlan, Rings
from dsv4.ops.plan.caches import entry_slot_mapping

PAGE, DIM, ROPE = 256, 8, 4


def plain(pages: int, rows: int, width: int) -> Pages:
    """Memory that starts as NaN, as reused pages may."""
    return Pages(torch.full((pages, rows, width), float("nan")), rows, KvFormat.PLAIN)


def entry_step(positions: Tensor, request_of_token: Tensor, ratio: int, overlap: int) -> EntryStep:
    """A step whose entries are not rotated."""
    cos_sin = torch.cat([torch.ones(len(positions), ROPE // 2), torch.zeros(len(positions), ROPE // 2)], 1)
    return EntryStep(
        positions=positions,
        request_of_token=request_of_token,
        ratio=ratio,
        overlap=overlap,
        eps=1e-6,
        entry_cos_sin=cos_sin,
    )


def entries_of_whole_sequence(projected: Projected, ratio: int, overlap: int) -> Tensor:
    """Entries pooled from paged state in one step: [T // ratio, DIM]."""
    num_tokens, width = projected.kv.shape
    positions = torch.arange(num_tokens)
    pages, cache = plain(1, num_tokens, 2 * width), plain(1, num_tokens, DIM)
    rows = SlotMapping(pages, positions)
    save_state(projected, positions, rows)
    slots = torch.where((positions + 1) % ratio == 0, positions // ratio, -1)
    zero = torch.zeros_like(positions)
    state = PagedState(projected, rows, zero[:1, None], SlotMapping(cache, slots))
    compress_store([state], entry_step(positions, zero, ratio, overlap))
    return cache.data[0, : num_tokens // ratio]


@pytest.mark.parametrize("ratio", [4, 128])
@pytest.mark.parametrize("seed", range(2))
def test_any_split_into_steps_gives_the_entries_of_the_whole(ratio: int, seed: int) -> None:
    """Three requests, some of them in each step, with one token or many; the third begins at a page
    that the first filled."""
    rng = torch.Generator().manual_seed(seed)
    overlap = windows = 2 if ratio == 4 else 1
    total, width = (700, 600, 640), overlap * DIM
    kv, gate = torch.randn(2, 3, 700, width, generator=rng)
    kv[2, :PAGE], gate[2, :PAGE] = kv[0, :PAGE], gate[0, :PAGE]
    ape, norm = torch.randn(ratio, width, generator=rng), torch.rand(DIM, generator=rng) + 0.5
    table = torch.tensor([[1, 2, 3], [4, 5, 6], [1, 8, 9]], dtype=torch.int32)  # the third shares page 1
    rings = plain(20, ratio, 2 * width)
    cache = plain(10, PAGE // ratio, DIM)
    done = [0, 0, PAGE]
    while done != list(total):
        ready = [r for r in range(3) if done[r] < total[r] and (r != 2 or done[0] >= PAGE)]
        chosen = [r for r in ready if torch.rand((), generator=rng) < 0.7] or ready
        single = bool(torch.rand((), generator=rng) < 0.5)
        sizes = [
            1 if single else min(int(torch.randint(1, 300, (), generator=rng)), total[r] - done[r]) for r in chosen
        ]
        seq_lens = torch.tensor([done[r] + n for r, n in zip(chosen, sizes, strict=True)], dtype=torch.int32)
        starts = torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()], dtype=torch.int32)
        batch = BatchView(starts, seq_lens, sum(sizes), len(chosen), int(seq_lens.max()), max(sizes))
        tokens = plan.plan_tokens(batch)
        # CSA rings hang on pages, HCA rings on requests; the places of the two do not meet here.
        owners = table[chosen] if ratio == 4 else torch.tensor(chosen, dtype=torch.int32)[:, None]
        where = Rings(owners, PAGE if ratio == 4 else 10_000, ratio, windows)
        ring_plan = plan.plan_many(where, tokens, batch)
        if single:
            made = plan.planned(batch, [where]).caches[0]
            assert isinstance(made, RingPlan)
            ring_plan = made
        slots = entry_slot_mapping(table[chosen], tokens, PAGE // ratio, ratio)
        rows = torch.cat([torch.arange(done[r], done[r] + n) for r, n in zip(chosen, sizes, strict=True)])
        owner = torch.tensor(chosen)[tokens.request_of_token.long()]
        scratch = plain(ring_plan.num_pages, ratio, 2 * width) if ring_plan.num_pages else None
        projected = Projected(kv[owner, rows], gate[owner, rows], ape, norm)
        state = RingState(projected, rings, scratch, SlotMapping(cache, slots))
        compress_step([state], ring_plan, entry_step(rows, tokens.request_of_token, ratio, overlap))
        for r, n in zip(chosen, sizes, strict=True):
            done[r] += n
    per_page = PAGE // ratio
    for r in range(3):
        want = entries_of_whole_sequence(Projected(kv[r, : total[r]], gate[r, : total[r]], ape, norm), ratio, overlap)
        at = torch.arange(len(want))
        torch.testing.assert_close(
            cache.data[table[r][at // per_page].long(), at % per_page], want, rtol=1e-6, atol=1e-6
        )
