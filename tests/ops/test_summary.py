# SPDX-License-Identifier: Apache-2.0
"""The compressor on summaries stores, for any chunking, the entries that pooling whole windows
gives.

Its kernel stores and keeps what the reference does.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv4.model.config import LayerKind, LayerSpec, Routing
from dsv4.model.kv_layout import IndexFormat, KvFormat, summary_row
from dsv4.ops.compressor import summary
from dsv4.ops.compressor.entry import pool
from dsv4.ops.compressor.projected import EntryStep, Projected
from dsv4.ops.compressor.summary import SummaryPages, SummaryState, reference
from dsv4.ops.norm import rms_norm
from dsv4.ops.pages import BatchView, Pages, RowsFormat, SlotMapping, load_rows, row_widths
from dsv4.ops.plan.caches import entry_slot_mapping
from dsv4.ops.plan.tokens import TokenPlan, plan_tokens
from dsv4.ops.quant.reference import hadamard
from dsv4.ops.rope import apply_rope, cos_sin
from tests.support.kernel_cases import clone_pages, fill_pages, make_pages, memory
from tests.support.races import ORDERS, watched

DIM, ROPE, PAGE, EPS = 16, 8, 256, 1e-6
NAN = float("nan")
SOMEBODY = 1 << 30  # a position of nobody here
HUGE = 1e30  # of a refused row: where one were left over, nothing would be as expected


def _whole(kv: Tensor, score: Tensor, ratio: int, overlap: int) -> Tensor:
    """Every completed entry, pooled from its rows at once: [T // m, D]."""
    n, dim = kv.shape[0] // ratio, kv.shape[1] // overlap
    kv, score = kv[: n * ratio].unflatten(0, (n, ratio)), score[: n * ratio].unflatten(0, (n, ratio))
    if overlap == 2:
        before = lambda x, fill: torch.cat([torch.full_like(x[:1], fill), x[:-1]])  # noqa: E731
        kv = torch.cat([before(kv[..., :dim], 0.0), kv[..., dim:]], 1)
        score = torch.cat([before(score[..., :dim], float("-inf")), score[..., dim:]], 1)
    return pool(kv, score)


def entry_step(tokens: TokenPlan, ratio: int, overlap: int, entry_cos_sin: Tensor) -> EntryStep:
    return EntryStep(
        positions=tokens.positions,
        request_of_token=tokens.request_of_token,
        ratio=ratio,
        overlap=overlap,
        eps=EPS,
        entry_cos_sin=entry_cos_sin,
    )


def state_memory(pages: int, ratio: int, dim: int, drafted: int, beside: int = 0) -> Tensor:
    """Pages of state that nobody has written, and so many values of others behind each."""
    kind = LayerKind.CSA if ratio == 4 else LayerKind.HCA
    size = summary_row(LayerSpec(0, kind, Routing.TOPK), dim, drafted).row_bytes // 4
    return torch.full((pages, size + beside), NAN)[:, :size]


class Engine:
    """Two requests in one set of pages; unowned memory is NaN, pages are dealt out of order.

    drafted: tokens that a step may have to take back
    """

    def __init__(self, lens: tuple[int, int], ratio: int, overlap: int, seed: int, drafted: int = 0) -> None:
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
        self.state = state_memory(len(order), ratio, DIM, drafted)
        self.drafted = drafted
        self.tail = torch.full((len(order), 3, DIM), NAN) if overlap == 2 else None
        self.cache = Pages(torch.full((len(order), self.rows, DIM), NAN), self.rows, KvFormat.PLAIN)
        self.done = [0, 0]

    def step(self, counts: tuple[int, int], refused: tuple[int, int] = (0, 0)) -> None:
        """Run a step; the last tokens of each request that are refused had rows like no other."""
        counts = tuple(min(c, len(kv) - d) for c, kv, d in zip(counts, self.kv, self.done, strict=True))
        take = [slice(d, d + c) for d, c in zip(self.done, counts, strict=True)]
        kv, gate = (torch.cat([x[s] for x, s in zip(xs, take, strict=True)]) for xs in (self.kv, self.gate))
        if not len(kv):
            return
        for last, wrong in zip((counts[0], sum(counts)), refused, strict=True):
            kv[last - wrong : last] = gate[last - wrong : last] = HUGE
        self.done = [d + c for d, c in zip(self.done, counts, strict=True)]
        starts = torch.tensor([0, counts[0], sum(counts)], dtype=torch.int32)
        batch = BatchView(starts, torch.tensor(self.done, dtype=torch.int32), len(kv), 2, max(self.done), max(counts))
        tokens = plan_tokens(batch)
        slots = entry_slot_mapping(self.table, tokens, self.rows, self.ratio)
        table = torch.zeros(len(kv), ROPE)
        table[:, : ROPE // 2] = 1.0  # cos 1, sin 0: RoPE is not under test
        state = SummaryState(
            Projected(kv, gate, self.ape, self.weight),
            kept=SummaryPages.view(self.state, self.overlap, DIM),
            state_page=self.state_page,
            tail=self.tail,
            block_table=self.table,
            entries=SlotMapping(self.cache, slots),
        )
        reference.compress([state], entry_step(tokens, self.ratio, self.overlap, table), batch)
        self.done = [d - wrong for d, wrong in zip(self.done, refused, strict=True)]

    def forget_state(self, request: int) -> None:
        """What a prefix hit finds: pages with their tails, and somebody else's state block."""
        self.state[self.state_page[request].long()] = NAN

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
            # A softmax of at most 128 terms in another order: a few fp32 roundings of values of
            # order 1.
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


class Refusals:
    """How many drafted tokens to refuse next: what has not been met yet where the request is, until
    every number has been at every phase of the longer window, and at each of the last 8 of a
    page."""

    def __init__(self, drafted: int, seed: int) -> None:
        everywhere = {place for start in range(PAGE) for place in self.places(start)}
        self.missing = {(place, refused) for place in everywhere for refused in range(drafted + 1)}
        self.drafted, self.random = drafted, random.Random(seed)

    @staticmethod
    def places(start: int) -> list[tuple[str, int]]:
        page_end = [("of a page", start % PAGE)] if start % PAGE >= PAGE - 8 else []
        return [("of a window", start % 128), *page_end]

    def __call__(self, start: int) -> int:
        choice = [self.random.randint(0, self.drafted), *range(self.drafted + 1)]
        unmet = [n for n in choice if any((place, n) in self.missing for place in self.places(start))]
        refused = [*unmet, *choice][0]
        self.missing -= {(place, refused) for place in self.places(start)}
        return refused

    def steps(self, engine: Engine, tokens: int) -> None:
        """Steps of an engine until a request has so many tokens: three of four verify
        drafts, the others are chunks of any size, idle requests, and hits at page ends."""
        while max(engine.done) + 9 < tokens:
            for r in range(2):
                if engine.done[r] % PAGE == 0 and self.random.random() < 0.5:
                    engine.forget_state(r)
            if self.random.random() < 0.75:
                engine.step((self.drafted + 1,) * 2, (self(engine.done[0]), self(engine.done[1])))
            else:
                sizes = (0, 1, 2, self.drafted + 1, 9)
                engine.step((self.random.choice(sizes), self.random.choice(sizes[1:])))


@pytest.mark.parametrize(("ratio", "overlap"), [(4, 2), (128, 1)])
@pytest.mark.parametrize("drafted", [1, 3, 5, *(pytest.param(k, marks=pytest.mark.long) for k in (2, 4, 6, 7))])
def test_refused_tokens_leave_nothing_at_any_phase(ratio: int, overlap: int, drafted: int) -> None:
    """Every number of refused tokens at every place of `Refusals`; none missing."""
    refusals, seed = Refusals(drafted, seed=drafted), 0
    while refusals.missing:
        engine = Engine((1000, 1000), ratio, overlap, seed=seed, drafted=drafted)
        engine.step((1 + seed * 37 % 300, 1 + seed * 91 % 300))
        refusals.steps(engine, 1000)
        engine.check()
        seed += 1


def test_without_kept_rows_refused_tokens_show() -> None:
    """The control: an engine that is told of fewer drafts than are refused."""
    engine = Engine((300, 300), 4, 2, seed=0, drafted=1)
    engine.step((101, 102))
    engine.step((4, 4), refused=(3, 2))
    engine.step((20, 20))
    with pytest.raises(AssertionError):
        engine.check()


@pytest.mark.parametrize(("ratio", "overlap"), [(4, 2), (128, 1)])
@pytest.mark.parametrize("after", [1, 3, 4, 130])
def test_a_page_end_carries_all_that_a_prefix_hit_needs(ratio: int, overlap: int, after: int) -> None:
    """At a multiple of 256 the state block may be anybody's: the tail alone continues the
    request."""
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


# ---- the kernel ----------------------------------------------------------------------------

FREQ = 1.6e5 ** (-torch.arange(0, 64, 2) / 64)
# Per cache: head dim and format. A CSA layer pools into two, the entries and the index keys.
CACHES: dict[str, tuple[int, list[tuple[int, RowsFormat]]]] = {
    "csa-fp8": (4, [(512, KvFormat.FP8_DS_MLA), (128, IndexFormat.FP8)]),
    "csa-mxfp4": (4, [(512, KvFormat.FP8_DS_MLA), (128, IndexFormat.MXFP4)]),
    "csa-plain": (4, [(512, KvFormat.PLAIN), (128, IndexFormat.PLAIN)]),
    "hca-fp8": (128, [(512, KvFormat.FP8_DS_MLA)]),
    "hca-plain": (128, [(512, KvFormat.PLAIN)]),
}
REQUESTS, CONTEXT = 3, 3 * PAGE


class Served:
    """Requests whose steps the kernel serves, and next to it the reference from the same memory.

    Whatever no request wrote is NaN.

    Every cache has its own pages and block table; state pages are strided, as a column of an
    engine's block table is.
    """

    def __init__(self, kind: str, seed: int = 0, drafted: int = 0) -> None:
        torch.manual_seed(seed)
        self.drafted = drafted
        self.ratio, caches = CACHES[kind]
        self.overlap, self.rows = (2 if self.ratio == 4 else 1), PAGE // self.ratio
        self.done = [0] * REQUESTS
        self.caches = [self._cache(dim, row_format) for dim, row_format in caches]
        self.gates = [torch.randn(REQUESTS, CONTEXT, c.projected.ape.shape[1]) * 3 for c in self.caches]
        self.kvs = [torch.randn_like(gate) for gate in self.gates]

    def _cache(self, dim: int, row_format: RowsFormat) -> SummaryState:
        pages = REQUESTS * CONTEXT // PAGE
        nothing, width = torch.zeros(0, self.overlap * dim), self.overlap * dim
        state = state_memory(2 * REQUESTS, self.ratio, dim, self.drafted, beside=64)
        tail = None
        if self.overlap == 2:
            tail = torch.full((pages, 3 * dim + 32), NAN)[:, : 3 * dim].unflatten(-1, (3, dim))
        state_page = (torch.randperm(REQUESTS)[:, None] * 2).int().expand(-1, 2)[:, 0]
        table = torch.randperm(pages).int().view(REQUESTS, -1)
        cache = make_pages(row_format, pages, self.rows, dim)
        norm = torch.rand(dim) + 0.5
        return SummaryState(
            Projected(nothing, nothing, torch.randn(self.ratio, width), norm),
            kept=SummaryPages.view(state, self.overlap, dim),
            state_page=state_page,
            tail=tail,
            block_table=table,
            entries=SlotMapping(cache, nothing),
        )

    def hit(self, request: int, of: int, pages: int) -> None:
        """Let `request` go on behind the first pages of another, with somebody else's state."""
        self.done[request] = pages * PAGE
        for i, c in enumerate(self.caches):
            c.block_table[request, :pages] = c.block_table[of, :pages]
            page = c.state_page[request].long()
            c.kept.summaries[page] = NAN
            if c.kept.ring is not None and c.kept.since is not None:
                c.kept.ring[page], c.kept.since[page] = NAN, SOMEBODY
            for x in (self.kvs[i], self.gates[i]):
                x[request, : pages * PAGE] = x[of, : pages * PAGE]

    def step(
        self,
        counts: tuple[int, ...],
        padding: int = 0,
        compare: bool = True,
        refused: tuple[int, ...] = (0,) * REQUESTS,
    ) -> None:
        """Run a step of so many tokens per request, and padding tokens, and compare all memory.

        compare: False runs it by the reference alone
        refused: of each request's tokens, the last ones, which then are others
        """
        self._run(counts, padding, compare)
        for r, wrong in enumerate(refused):
            self.done[r] -= wrong
            again = slice(self.done[r], self.done[r] + wrong)
            for gates, kvs in zip(self.gates, self.kvs, strict=True):
                gates[r, again] = torch.randn_like(gates[r, again]) * 3
                kvs[r, again] = torch.randn_like(kvs[r, again])

    def _run(self, counts: tuple[int, ...], padding: int, compare: bool) -> None:
        self.done = [d + c for d, c in zip(self.done, counts, strict=True)]
        starts = torch.tensor([0, *torch.tensor(counts).cumsum(0)], dtype=torch.int32)
        num_tokens = sum(counts) + padding
        batch = BatchView(
            starts, torch.tensor(self.done, dtype=torch.int32), num_tokens, REQUESTS, max(self.done), max(counts)
        )
        tokens = plan_tokens(batch)
        table = cos_sin(tokens.positions // self.ratio * self.ratio, FREQ)
        given = [self._step(i, tokens) for i in range(len(self.caches))]
        step = entry_step(tokens, self.ratio, self.overlap, table)
        if not compare:
            reference.compress(given, step, batch)
            return
        expected = [
            replace(
                state,
                kept=state.kept.clone(),
                tail=_clone(state.tail),
                entries=replace(state.entries, pages=clone_pages(state.entries.pages)),
            )
            for state in given
        ]
        summary.compress(given, step, batch)
        reference.compress(expected, step, batch)
        for i, (got, want) in enumerate(zip(given, expected, strict=True)):
            assert_summaries_close(got.kept.summaries, want.kept.summaries)
            self._check_kept_rows(got.kept, want.kept)
            if got.tail is not None and want.tail is not None:
                assert_summaries_close(got.tail, want.tail)
            self._check_entries(i, got, want, tokens)

    def _check_kept_rows(self, got: SummaryPages, want: SummaryPages) -> None:
        """Rows that may be taken back, and what nobody wrote, are the reference's to the bit."""
        assert (got.ring is None) == (want.ring is None) == (self.drafted == 0)
        if got.ring is not None and want.ring is not None and got.since is not None and want.since is not None:
            assert torch.equal(got.since, want.since)
            assert torch.equal(got.ring.view(torch.int32), want.ring.view(torch.int32))

    def _step(self, i: int, tokens: TokenPlan) -> SummaryState:
        c, request = self.caches[i], tokens.request_of_token.long()
        # Views with a stride, as the fused projection gives; NaN where padding reads.
        both = torch.cat([self.kvs[i][request, tokens.positions], self.gates[i][request, tokens.positions]], -1)
        both[~tokens.valid] = NAN
        kv, gate = both.chunk(2, -1)
        slots = entry_slot_mapping(c.block_table, tokens, self.rows, self.ratio)
        return replace(c, projected=replace(c.projected, kv=kv, gate=gate), entries=replace(c.entries, slots=slots))

    def _check_entries(self, i: int, got: SummaryState, want: SummaryState, tokens: TokenPlan) -> None:
        """What this step stored is the encoding of whole windows pooled at once.

        All other bytes are as the reference left them.
        """
        stored = (got.entries.slots >= 0).nonzero().squeeze(-1)
        where = got.entries.slots[stored].long()
        pages = [got.entries.pages, want.entries.pages]
        if len(stored):
            self._check_stored(i, got, want, where, tokens.request_of_token[stored].long(), tokens.positions[stored])
            for p in pages:
                _erase(p, where, got.projected.norm_weight.shape[0])
        assert torch.equal(memory(pages[0]), memory(pages[1])), "other bytes were touched"

    def _check_stored(
        self,
        i: int,
        got: SummaryState,
        want: SummaryState,
        where: Tensor,
        request: Tensor,
        positions: Tensor,
    ) -> None:
        dim, exact = got.projected.norm_weight.shape[0], []
        for r, at in zip(request.tolist(), (positions // self.ratio).tolist(), strict=True):
            begin, end = max(at - self.overlap + 1, 0) * self.ratio, (at + 1) * self.ratio
            score = self.gates[i][r, begin:end] + got.projected.ape[torch.arange(begin, end) % self.ratio]
            exact.append(_whole(self.kvs[i][r, begin:end], score, self.ratio, self.overlap)[-1])
        entry = apply_rope(
            rms_norm(torch.stack(exact), got.projected.norm_weight, EPS),
            cos_sin(positions // self.ratio * self.ratio, FREQ),
        )
        # fp32 sums in another order may tip a bf16 rounding. Behind the Hadamard sum that is one of
        # 128 addends, or two.
        source, slack = entry, entry.abs() * 2.0**-8 + 1e-6
        if got.entries.pages.format in (IndexFormat.FP8, IndexFormat.MXFP4):
            source = hadamard(entry.bfloat16())
            slack = 2 * 2.0**-7 * 128**-0.5 * entry.abs().amax(-1, keepdim=True)
        stored = load_rows(got.entries.pages, where, dim, 64).float()
        near = torch.stack([_rounded(source + shift, got.entries.pages.format) for shift in (-slack, 0 * slack, slack)])
        assert ((near.amin(0) <= stored) & (stored <= near.amax(0))).all()
        assert (stored == load_rows(want.entries.pages, where, dim, 64).float()).float().mean() > 0.99


def _rounded(rows: Tensor, row_format: RowsFormat) -> Tensor:
    """Rows as the cache keeps them."""
    pages, slots = make_pages(row_format, 1, rows.shape[0], rows.shape[1]), torch.arange(rows.shape[0])
    fill_pages(pages, slots, rows, 64)
    return load_rows(pages, slots, rows.shape[1], 64).float()


def _clone(tail: Tensor | None) -> Tensor | None:
    return None if tail is None else tail.clone()


def _erase(pages: Pages, where: Tensor, dim: int) -> None:
    page, row = where // pages.rows, where % pages.rows
    if not pages.packed:
        pages.data[page, row] = 0
        return
    width, scales = row_widths(pages, dim, 64)
    pages.data[page[:, None], row[:, None] * width + torch.arange(width)] = 0
    pages.data[page[:, None], pages.rows * width + row[:, None] * scales + torch.arange(scales)] = 0


def assert_summaries_close(actual: Tensor, expected: Tensor) -> None:
    """fp32 [..., 3, D]: the maximum bit for bit, the sums to the rounding of one that is added up
    in another order.

    A sum has at most n = 128 rows. Each of its terms carries the rounding of an exponential's
    argument, of at most 40 in size here (40 * 2**-24), two ulp of the exponential, one of a
    product, and one per rescaling and addition, of which there are at most n + n / 8. Relative to
    the sum of magnitudes that is below (40 + 3 + 144) * 2**-24, on either side.
    """
    assert torch.equal(actual.isnan(), expected.isnan()), (
        "NaN elsewhere: a summary that nobody wrote, or one not written"
    )
    top, weight, total = (x.nan_to_num(nan=0.0, neginf=-1e30) for x in expected.unbind(-2))
    got = [x.nan_to_num(nan=0.0, neginf=-1e30) for x in actual.unbind(-2)]
    assert torch.equal(got[0], top)
    bound = 2 * (40 + 3 + 144) * 2.0**-24
    assert ((got[1] - weight).abs() <= bound * weight).all()
    assert (
        (got[2] - total).abs() <= bound * weight * 8
    ).all()  # |kv| < 8, so that magnitudes sum to less than 8 * weight


def test_scores_and_values_are_within_what_the_tolerance_assumes() -> None:
    served = Served("hca-fp8")
    assert served.kvs[0].abs().max() < 8
    spread = served.gates[0].amax() - served.gates[0].amin() + 2 * served.caches[0].projected.ape.abs().max()
    assert spread < 40


@pytest.mark.parametrize("kind", CACHES)
def test_kernel_steps_of_many_sizes_are_the_references(kind: str) -> None:
    """T = 63, 1, 2, 257 and more.

    Zero-length requests, padding, starts inside a window, exact page ends, a hit after each.
    """
    served = Served(kind)
    served.step((63, 0, 0))
    served.step((0, 1, 0), padding=3)  # padding is counted to the last request, which has no token
    served.step((1, 0, 1))
    served.step((192, 65, 0))  # request 0 ends its first page
    served.hit(2, of=0, pages=1)
    for _ in range(5):  # decode past the page end: the first entry there reads the tail
        served.step((1, 1, 1), padding=1)
    served.step((3, 0, 9))


@pytest.mark.parametrize("kind", ["csa-fp8", "hca-fp8"])
def test_kernel_decodes_over_a_page_end(kind: str) -> None:
    """One token per request: a single launch writes tails, entries and state; a page is hit in the
    step that fills it."""
    served = Served(kind, seed=1)
    served.step((253, 127, 126), compare=False)
    for _ in range(2):
        served.step((1, 1, 1))
    served.hit(1, of=0, pages=1)
    served.step((1, 1, 0))  # request 0 ends the page that request 1 continues from
    for _ in range(4):
        served.step((1, 1, 1))


@pytest.mark.parametrize(("filler", "reader"), [(0, 1), (1, 0)])
@pytest.mark.parametrize("missing", [6, 3], ids=["a-window", "part-of-one"])
def test_kernel_reads_the_tail_of_a_page_filled_in_the_same_step(filler: int, reader: int, missing: int) -> None:
    """The later request may come first in the step; launch order, not program order, makes its tail
    ready."""
    served = Served("csa-fp8", seed=2)
    counts = [0, 0, 0]
    counts[filler] = PAGE - missing
    served.step(tuple(counts), compare=False)
    served.hit(reader, of=filler, pages=1)
    counts[filler], counts[reader] = missing, 7
    served.step(tuple(counts))


@pytest.mark.parametrize("kind", ["csa-fp8", "hca-fp8"])
@pytest.mark.parametrize("drafted", [1, 5])
def test_kernel_takes_back_refused_tokens_as_the_reference_does(kind: str, drafted: int) -> None:
    """Over window and page ends, with chunks, single tokens, idle requests and a hit between."""
    served, verify = Served(kind, seed=drafted, drafted=drafted), drafted + 1
    served.step((251, 125, 62), compare=False)
    served.step((verify,) * 3, refused=(drafted, 0, drafted // 2))
    served.step((verify,) * 3, padding=2, refused=(0, drafted, drafted))
    served.step((1, 0, verify), refused=(0, 0, drafted))
    served.hit(1, of=0, pages=1)
    served.step((verify,) * 3, refused=(drafted // 2, drafted, 0))
    served.step((1, 1, 1))
    served.step((9, verify, 0), refused=(0, 1, 0))
    served.step((1, 3, 66))


@pytest.mark.parametrize("order", ORDERS)
def test_no_program_of_a_verifying_step_reads_what_another_writes(order: str) -> None:
    """Requests inside a window, at its end and at a page's, each with rows to take back."""
    served = Served("csa-fp8", seed=4, drafted=5)
    served.step((253, 126, 61), compare=False)
    served.step((6, 6, 6), compare=False, refused=(2, 5, 0))
    with watched(order) as watch:
        served.step((6, 6, 6))
    assert watch.findings == []


def test_kernel_masks_pages_and_slots_out_of_range() -> None:
    served = Served("csa-fp8")
    served.step((3, 3, 0))
    before = [(c.kept.summaries.clone(), _clone(c.tail), memory(c.entries.pages).clone()) for c in served.caches]
    starts = torch.tensor([0, 1, 2, 2], dtype=torch.int32)
    batch = BatchView(starts, torch.tensor([PAGE, 2 * PAGE, 3]), 2, REQUESTS, 2 * PAGE, 1)
    tokens = plan_tokens(batch)
    states = [
        replace(
            served._step(i, tokens),
            state_page=torch.tensor([-1, 1 << 20, 0], dtype=torch.int32),
            block_table=torch.tensor([[-1], [1], [2]], dtype=torch.int32),  # of request 1, the second page is missing
            entries=SlotMapping(served.caches[i].entries.pages, torch.tensor([1 << 20, -7], dtype=torch.int32)),
        )
        for i in range(2)
    ]
    step = entry_step(tokens, 4, 2, cos_sin(tokens.positions, FREQ))
    summary.compress(states, step, batch)
    summary.compress(states, step, replace(batch, max_query_len=2))
    for c, (state, tail, cache) in zip(served.caches, before, strict=True):
        assert torch.equal(c.kept.summaries.isnan(), state.isnan())
        assert torch.equal(c.kept.summaries.nan_to_num(), state.nan_to_num())
        assert tail is not None
        assert c.tail is not None
        assert torch.equal(c.tail.isnan(), tail.isnan())
        assert torch.equal(memory(c.entries.pages), cache)
