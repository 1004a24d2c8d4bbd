# SPDX-License-Identifier: Apache-2.0
"""The plan of a step: its kernels against their references, and both against a step counted token
by token."""

from __future__ import annotations

import random
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4.ops import plan
from dsv4.ops.pages import BatchView
from dsv4.ops.plan import reference
from dsv4.ops.rope import cos_sin

PAGE, WINDOW, BLOCK, TOPK, CONTEXT = 256, 128, 5, 16, 2048


def batch_of(steps: list[tuple[int, int]], padding: int = 0, padded_requests: int = 0) -> BatchView:
    """steps: (context before, new tokens) of each request."""
    new = [n for _, n in steps]
    ends = [sum(new[: i + 1]) for i in range(len(new))] + [sum(new)] * padded_requests
    lens = [before + n for before, n in steps] + [0] * padded_requests
    return BatchView(
        torch.tensor([0, *ends], dtype=torch.int32),
        torch.tensor(lens, dtype=torch.int32),
        sum(new) + padding,
        len(lens),
        max(lens),
        max(new),
    )


def tables(requests: int, page_tokens: int, context: int, generator: torch.Generator) -> Tensor:
    """Every page of every request is its own; columns behind the last one too."""
    columns = -(-context // page_tokens)
    return torch.randperm(requests * columns, generator=generator).int().view(requests, columns) + 1


def caches_of(batch: BatchView, seed: int = 0, context: int = CONTEXT) -> list[plan.Cache]:
    """Two groups of windows, the entries and keys of CSA, those of HCA, rows of both states, and,
    for one token per request, rings of both kinds, and longer ones."""
    generator, r = torch.Generator().manual_seed(seed), batch.num_reqs

    def table(page_tokens: int) -> Tensor:
        return tables(r, page_tokens, context, generator)

    found: list[plan.Cache] = [
        plan.WindowCache(table(64), 64, WINDOW),
        plan.EntryCache(table(PAGE), PAGE, 4, context, TOPK),
        plan.WindowCache(table(64), 64, WINDOW),
        plan.EntryCache(table(PAGE), PAGE, 128, context, None),
        plan.RowCache(table(8), 8),
        plan.RowCache(table(4), 4),
    ]
    if batch.max_query_len <= BLOCK:
        found.append(plan.BlockCache(table(64), 64, WINDOW, BLOCK))
    if batch.max_query_len == 1:
        found.append(plan.Rings(table(PAGE), PAGE, 4, 2))
        owners = torch.randperm(r, generator=generator).int()[:, None]
        found.append(plan.Rings(owners, context + 1, 128, 1))
        found.append(plan.Rings(table(PAGE), PAGE, 4, 2, drafted=3))
    return found


def parts(value: Any) -> list[Any]:
    if is_dataclass(value):
        return [part for field in fields(value) for part in parts(getattr(value, field.name))]
    return [part for each in value for part in parts(each)] if isinstance(value, tuple) else [value]


def meant(made: plan.StepPlan, batch: BatchView, caches: list[plan.Cache]) -> list[Any]:
    """What means anything of a plan: slots of entries as far as a request has any."""
    found = parts(made.tokens)
    for cache, each in zip(caches, made.caches, strict=True):
        values = parts(each)
        if isinstance(each, plan.EntryPlan) and isinstance(cache, plan.EntryCache) and each.request_slots is not None:
            have = (batch.seq_lens // cache.ratio)[:, None]
            inside = torch.arange(each.request_slots.shape[1]) < have
            values = [torch.where(inside, v, 0) if v is each.request_slots else v for v in values]
        found += values
    return found


def assert_same(got: list[Any], expected: list[Any]) -> None:
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


STEPS: dict[str, BatchView] = {
    "the first token": batch_of([(0, 1)]),
    "decoding at every edge": batch_of([(n, 1) for n in (0, 2, 3, 62, 63, 64, 126, 127, 128, 254, 255, 256, 2046)]),
    "more requests than are looked at together": batch_of([(7 * n, 1) for n in range(70)]),
    "a graph's padding": batch_of([(5, 1), (600, 1), (127, 1)], padding=5, padded_requests=5),
    "prefills": batch_of([(0, 37), (0, 1), (118, 40)]),
    "chunks and decoding": batch_of([(250, 20), (511, 1), (1, 9), (1000, 1)], padding=7),
    "a request without tokens": batch_of([(0, 0), (300, 3), (40, 0), (8, 1)]),
    "only padding": batch_of([(0, 0), (0, 0)], padding=3),
    "fewer tokens than entries need": batch_of([(0, 2), (1, 1)]),
    "blocks": batch_of([(n, 5) for n in (0, 1, 59, 62, 127, 128, 129, 255, 2040)], padding=5, padded_requests=2),
}


@pytest.mark.parametrize("name", STEPS)
def test_the_kernel_plans_as_its_reference_does(name: str) -> None:
    batch = STEPS[name]
    caches = caches_of(batch)
    made = plan.planned(batch, caches)
    expected = plan.planned(batch, caches)
    reference.step(batch, caches, expected)
    assert_same(meant(made, batch, caches), meant(expected, batch, caches))


def test_the_last_tokens_of_a_million() -> None:
    batch = batch_of([(1_048_573, 2), (1_048_575, 1)])
    caches = caches_of(batch, context=1 << 20)
    made, expected = plan.planned(batch, caches), plan.planned(batch, caches)
    reference.step(batch, caches, expected)
    assert_same(meant(made, batch, caches), meant(expected, batch, caches))


def test_who_is_at_home_nowhere_is_padding() -> None:
    batch = batch_of([(n, 1) for n in (9, 300, 0, 0)])
    caches, homes = caches_of(batch), plan.Homes(torch.tensor([256, 4000, 0, 255]), 256)
    made, expected = plan.planned(batch, caches, homes), plan.planned(batch, caches)
    reference.step(batch, caches, expected, homes)
    assert made.tokens.valid.tolist() == [True, True, False, False]
    assert_same(meant(made, batch, caches), meant(expected, batch, caches))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_lengths_of_both_widths(dtype: torch.dtype) -> None:
    batch = batch_of([(700, 1), (31, 1)])
    wide = BatchView(batch.query_start_loc, batch.seq_lens.to(dtype), 2, 2, 701, 1)
    caches = caches_of(batch)
    assert_same(meant(plan.planned(wide, caches), batch, caches), meant(plan.planned(batch, caches), batch, caches))


def test_a_page_that_is_none_or_outside_the_table_is_no_slot() -> None:
    """Lengths beyond what a table has, as a broken batch would have them, are masked."""
    batch = batch_of([(100, 1), (5000, 1), (300, 1)])
    table = torch.tensor([[3, -1], [4, 5], [6, -1]], dtype=torch.int32)
    caches: list[plan.Cache] = [plan.WindowCache(table, 256, WINDOW), plan.EntryCache(table, 256, 4, CONTEXT, TOPK)]
    made = plan.planned(batch, caches)
    window, entries = made.caches
    assert isinstance(window, plan.WindowPlan)
    assert isinstance(entries, plan.EntryPlan)
    assert window.slot_mapping.tolist() == [3 * 256 + 100, -1, -1]
    assert (window.slots[1] == -1).all()
    assert window.slots[2, 127 - 300 % 256 :].eq(-1).all()
    assert entries.slot_mapping.tolist() == [-1, -1, -1]


def test_slots_are_where_a_count_of_the_pages_says() -> None:
    """Token by token, without either implementation."""
    rng = random.Random(3)
    steps = [(rng.randrange(1500), rng.randrange(1, 40)) for _ in range(5)]
    batch = batch_of(steps, padding=2)
    caches = caches_of(batch, seed=5)
    made = plan.planned(batch, caches)
    t = 0
    for request, (before, new) in enumerate(steps):
        for position in range(before, before + new):
            for cache, each in zip(caches, made.caches, strict=True):
                assert not isinstance(cache, plan.Rings)
                table, page = cache.block_table[request].tolist(), cache.page_tokens

                def slot(p: int, table: list[int] = table, page: int = page) -> int:
                    return table[p // page] * page + p % page

                if isinstance(each, plan.WindowPlan):
                    attended = [slot(p) for p in range(max(0, position - WINDOW + 1), position + 1)]
                    assert each.slots[t].tolist() == attended + [-1] * (WINDOW - len(attended))
                    assert int(each.lens[t]) == len(attended)
                    assert int(each.slot_mapping[t]) == slot(position)
                elif isinstance(each, plan.EntryPlan) and isinstance(cache, plan.EntryCache):
                    seen = sum((p + 1) % cache.ratio == 0 for p in range(position + 1))
                    ends, rows = (position + 1) % cache.ratio == 0, page // cache.ratio
                    place = table[(seen - 1) // rows] * rows + (seen - 1) % rows
                    assert int(each.slot_mapping[t]) == (place if ends else -1)
                    assert int(each.lens[t]) == seen
                    if each.request_slots is None:
                        assert each.chosen_lens is not None
                        assert int(each.chosen_lens[t]) == min(seen, TOPK)
                    else:
                        listed = each.request_slots[request, :seen].tolist()
                        assert listed == [table[e // rows] * rows + e % rows for e in range(seen)]
                else:
                    assert isinstance(each, Tensor)
                    assert int(each[t]) == slot(position)
            t += 1
    assert not made.tokens.valid[t:].any()


def test_a_block_attends_itself_in_both_directions_and_the_window_before_it() -> None:
    """Token by token, without either implementation; a request may have fewer tokens than the
    block."""
    steps = [(0, 5), (3, 5), (127, 5), (128, 4), (129, 5), (700, 1)]
    batch = batch_of(steps, padding=3)
    (cache,) = [c for c in caches_of(batch, seed=2) if isinstance(c, plan.BlockCache)]
    (made,) = plan.planned(batch, [cache]).of(plan.WindowPlan)
    t = 0
    for request, (before, new) in enumerate(steps):
        table = cache.block_table[request].tolist()
        rows = [table[p // 64] * 64 + p % 64 for p in range(before + new)]
        attended = rows[max(0, before - WINDOW) :]
        for position in range(before, before + new):
            assert made.slots[t].tolist() == attended + [-1] * (WINDOW + BLOCK - len(attended))
            assert int(made.lens[t]) == len(attended)
            assert int(made.slot_mapping[t]) == rows[position]
            t += 1
    assert made.lens[t:].tolist() == [0] * 3
    assert made.slot_mapping[t:].tolist() == [-1] * 3


@pytest.mark.parametrize("columns", [1, 3, 300])
def test_page_tables(columns: int) -> None:
    places = torch.randint(0, 4000, (5, 300 * 4), dtype=torch.int32)
    requests, to_window = torch.tensor([4, 0, 2]), torch.randint(-1, 900, (4000,))
    made, expected = ([torch.full((3, 310), -7, dtype=torch.int32) for _ in range(2)] for _ in range(2))
    plan.page_tables(places, requests, to_window, *made, page_tokens=4, columns=columns)
    reference.page_tables(places, requests, to_window, *expected, page_tokens=4, columns=columns)
    assert_same(made, expected)
    with pytest.raises(ValueError, match="not written together"):
        plan.page_tables(places, requests, to_window, made[0], made[1][:, 1:].clone(), page_tokens=4, columns=1)


def test_rope_tables() -> None:
    """An angle is rounded once, to fp32, in both; cosines of equal angles are within two units in
    the last place of each other (CUDA's and PyTorch's documentation)."""
    positions = torch.tensor([0, 1, 3, 4, 5, 127, 128, 129, 4095, 65_537, 1_048_575] * 3)
    freq, other = 1e4 ** (-torch.arange(0, 64, 2) / 64), 1.6e5 ** (-torch.arange(0, 64, 2) / 64)
    made, expected = plan.rope_tables(positions, freq, other), reference.rope_tables(positions, freq, other)
    pairs = [
        (made.window, expected.window),
        (made.compressed, expected.compressed),
        *((made.entry[m], expected.entry[m]) for m in (4, 128)),
    ]
    for a, b in pairs:
        assert (a - b).abs().max() <= 2 * 2.0**-24
    assert torch.equal(expected.entry[128][5], cos_sin(torch.tensor([0]), other)[0])
