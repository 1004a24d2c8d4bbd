# SPDX-License-Identifier: Apache-2.0
"""The compressor on summaries stores, for any chunking, the entries that pooling whole windows gives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv4.kv_layout import KvFormat
from dsv4.ops.attention.plan import entry_store_slots, plan_tokens
from dsv4.ops.compressor.reference import pool
from dsv4.ops.mhc.reference import rms_norm
from dsv4.ops.pages import BatchView, Pages
from dsv4.ops.rope import apply_rope
from dsv4.ops.summary import compress

DIM, ROPE, PAGE, EPS = 16, 8, 256, 1e-6


def _whole(kv: Tensor, score: Tensor, ratio: int, overlap: int) -> Tensor:
    """Every completed entry, pooled from its rows at once: [T // m, DIM]."""
    n = kv.shape[0] // ratio
    kv, score = kv[: n * ratio].unflatten(0, (n, ratio)), score[: n * ratio].unflatten(0, (n, ratio))
    if overlap == 2:
        before = lambda x, fill: torch.cat([torch.full_like(x[:1], fill), x[:-1]])  # noqa: E731
        kv = torch.cat([before(kv[..., :DIM], 0.0), kv[..., DIM:]], 1)
        score = torch.cat([before(score[..., :DIM], float("-inf")), score[..., DIM:]], 1)
    return pool(kv, score)


class Engine:
    """Two requests in one set of pages; unowned memory is NaN, pages are dealt out of order."""

    def __init__(self, lens: tuple[int, int], ratio: int, overlap: int, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        self.ratio, self.overlap, self.rows = ratio, overlap, PAGE // ratio
        width = overlap * DIM
        self.kv = [torch.randn(n, width, generator=g) for n in lens]
        self.gate = [torch.randn(n, width, generator=g) * 3 for n in lens]
        self.ape = torch.randn(ratio, width, generator=g)
        self.weight = torch.rand(DIM, generator=g) + 0.5
        self.pages = [max(1, -(-n // PAGE)) for n in lens]
        order = torch.randperm(2 + sum(self.pages), generator=g)
        self.state_page = order[:2].int()
        self.table = torch.zeros(2, max(self.pages), dtype=torch.int32)
        self.table[0, : self.pages[0]] = order[2 : 2 + self.pages[0]]
        self.table[1, : self.pages[1]] = order[2 + self.pages[0] :]
        nan = float("nan")
        self.state = torch.full((len(order), overlap, 3, DIM), nan)
        self.tail = torch.full((len(order), 3, DIM), nan) if overlap == 2 else None
        self.cache = Pages(torch.full((len(order), self.rows, DIM), nan), self.rows, KvFormat.PLAIN)
        self.done = [0, 0]

    def step(self, counts: tuple[int, int]) -> None:
        counts = tuple(min(c, len(kv) - d) for c, kv, d in zip(counts, self.kv, self.done, strict=True))
        take = [slice(d, d + c) for d, c in zip(self.done, counts, strict=True)]
        kv, gate = (torch.cat([x[s] for x, s in zip(xs, take, strict=True)]) for xs in (self.kv, self.gate))
        if not len(kv):
            return
        self.done = [d + c for d, c in zip(self.done, counts, strict=True)]
        starts = torch.tensor([0, counts[0], sum(counts)], dtype=torch.int32)
        batch = BatchView(starts, torch.tensor(self.done, dtype=torch.int32), len(kv), 2, max(self.done))
        tokens = plan_tokens(batch)
        slots = entry_store_slots(self.table, tokens, self.rows, self.ratio)
        table = torch.zeros(len(kv), ROPE)
        table[:, : ROPE // 2] = 1.0  # cos 1, sin 0: RoPE is not under test
        compress(
            kv, gate, self.ape, batch, tokens.request_of_token, tokens.positions, self.state, self.state_page, self.tail, self.table, PAGE,
            slots, self.ratio, self.overlap, self.weight, EPS, table, self.cache,
        )  # fmt: skip

    def forget_state(self, request: int) -> None:
        """What a prefix hit finds: pages with their tails, and somebody else's state block."""
        self.state[self.state_page[request].long()] = float("nan")

    def check(self) -> None:
        for r in range(2):
            n = self.done[r]
            score = self.gate[r][:n] + self.ape[torch.arange(n) % self.ratio]
            want = apply_rope(
                rms_norm(_whole(self.kv[r][:n], score, self.ratio, self.overlap), self.weight, EPS),
                torch.tensor([[1.0] * 4 + [0.0] * 4] * (n // self.ratio)).reshape(-1, ROPE),
            )
            at = torch.arange(n // self.ratio)
            got = self.cache.data[self.table[r, at // self.rows].long(), at % self.rows]
            # A softmax of at most 128 terms in another order: a few fp32 roundings of values of order 1.
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("ratio", "overlap"), [(4, 2), (128, 1)])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_chunking_stores_the_entries_of_whole_windows(ratio: int, overlap: int, data: st.DataObject) -> None:
    lens = data.draw(st.tuples(st.integers(1, 530), st.integers(0, 300)))
    engine = Engine((lens[0], max(lens[1], 1)), ratio, overlap, seed=data.draw(st.integers(0, 99)))
    sizes = st.one_of(st.integers(0, 5), st.integers(0, 300))
    while engine.done[0] < lens[0] or engine.done[1] < len(engine.kv[1]):
        counts = data.draw(st.tuples(sizes, sizes))
        engine.step(counts if sum(counts) else (1, 1))
    engine.check()


@pytest.mark.parametrize(("ratio", "overlap"), [(4, 2), (128, 1)])
@pytest.mark.parametrize("after", [1, 3, 4, 130])
def test_a_page_end_carries_all_that_a_prefix_hit_needs(ratio: int, overlap: int, after: int) -> None:
    """At a multiple of 256 the state block may be anybody's: the tail alone continues the request."""
    engine = Engine((512 + after, 256 + after), ratio, overlap, seed=3)
    engine.step((200, 100))
    engine.step((312, 156))
    engine.forget_state(0)
    engine.forget_state(1)
    engine.step((after, after))
    engine.check()


def test_a_hit_on_a_page_that_another_request_fills_in_the_same_step_reads_the_new_tail() -> None:
    """vLLM shares a page as soon as it is scheduled: tails are written before any is read."""
    engine = Engine((300, 300), 4, 2, seed=5)
    engine.kv[1][:256], engine.gate[1][:256] = engine.kv[0][:256], engine.gate[0][:256]
    engine.step((250, 0))
    engine.table[1, 0] = engine.table[0, 0]
    engine.done[1] = 256
    engine.step((50, 44))
    engine.check()
