# SPDX-License-Identifier: Apache-2.0
"""Rings under speculation: whatever of a step is rejected, entries are those of the whole sequence.

Every step is a chunk or verifies drafts: some rows at its end are of another text, and the next
step begins before them.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dsv4.ops import plan, registry
from dsv4.ops.compressor.entry import pool
from dsv4.ops.compressor.projected import Projected
from dsv4.ops.compressor.ring import RingState, compress_step
from dsv4.ops.norm import rms_norm
from dsv4.ops.pages import BatchView, SlotMapping
from dsv4.ops.plan import Rings, rings
from dsv4.ops.plan.caches import entry_slot_mapping
from tests.ops.test_ring import DIM, PAGE, entry_step, plain

LOUD = 1e4  # a rejected row
MOST = 7
WINDOWS = {4: 2, 128: 1}
TEXT = 997


@pytest.fixture(autouse=True)
def _references(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan is what is tested, and the kernels' twins are a hundred times faster."""
    monkeypatch.setenv("DSV4_OPS", "reference")
    registry.forget_choices()


class Requests:
    """Requests of one deployment, each with a text of its own. settled: [R], rows that stay."""

    def __init__(self, ratio: int, drafted: int, starts: Tensor, pages: int, seed: int = 0) -> None:
        self.ratio, self.windows, self.drafted, self.settled = ratio, WINDOWS[ratio], drafted, starts.clone()
        count, width = len(starts), WINDOWS[ratio] * DIM
        self.starts, rng = starts, torch.Generator().manual_seed(seed)
        self.kv, self.gate = torch.randn(2, TEXT, width, generator=rng)
        self.ape, self.norm = torch.randn(ratio, width, generator=rng), torch.rand(DIM, generator=rng) + 0.5
        self.table = torch.randperm(count * pages, generator=rng).int().view(count, pages) + 1
        self.cache = plain(count * pages + 1, PAGE // ratio, DIM)
        requests = torch.randperm(count, generator=rng).int()[:, None]
        owners, of = (self.table, PAGE) if ratio == 4 else (requests, 1 << 20)
        self.where = Rings(owners, of, ratio, self.windows, drafted=drafted)
        self.rings = plain((count * pages + 1) * self.where.length, ratio, 2 * width)

    def text(self, request: Tensor, positions: Tensor) -> Tensor:
        """Rows of `kv` and `gate`."""
        return (positions + 37 * request) % TEXT

    def step(self, queries: Tensor, kept: Tensor) -> None:
        """`queries` rows of each request, of which the first `kept` stay."""
        queries, kept = queries.long(), kept.long()
        count, ends = len(queries), self.settled + queries
        starts = torch.cat([torch.zeros(1, dtype=torch.long), queries.cumsum(0)])
        batch = BatchView(starts.int(), ends.int(), int(queries.sum()), count, int(ends.max()), int(queries.max()))
        tokens = plan.plan_tokens(batch)
        owner = tokens.request_of_token.long()
        text = self.text(owner, tokens.positions)
        stays = (tokens.positions < (self.settled + kept)[owner])[:, None]
        kv, gate = (torch.where(stays, of[text], LOUD) for of in (self.kv, self.gate))
        made = plan.plan_many(self.where, tokens, batch)
        slots = entry_slot_mapping(self.table, tokens, PAGE // self.ratio, self.ratio)
        scratch = plain(made.num_pages, self.ratio, 2 * kv.shape[1])
        state = RingState(Projected(kv, gate, self.ape, self.norm), self.rings, scratch, SlotMapping(self.cache, slots))
        compress_step([state], made, entry_step(tokens.positions, tokens.request_of_token, self.ratio, self.windows))
        self.settled = self.settled + kept
        self._disown()

    def _disown(self) -> None:
        """NaN in every slot of a ring but those of settled rows that a later step may pool: from
        the first window that is still needed on, and a page's last one.
        """
        back = torch.arange(1, self.windows * self.ratio)
        at = self.settled[:, None] - back
        needed = at >= ((self.settled // self.ratio - (self.windows - 1)) * self.ratio)[:, None]
        if self.ratio == 4:
            ends = (torch.arange(1, self.table.shape[1]) * PAGE)[:, None] - torch.arange(1, 5)
            ends = ends.flatten().expand(len(at), -1)
            at, needed = torch.cat([at, ends], 1), torch.cat([needed, ends < self.settled[:, None]], 1)
        needed &= at >= 0
        request, column = needed.nonzero(as_tuple=True)
        owned = torch.zeros(self.rings.data.shape[:2], dtype=torch.bool).flatten()
        owned[self.where.slots(request, at[request, column]).long()] = True
        self.rings.data.flatten(0, 1)[~owned] = float("nan")

    def wrong(self) -> int:
        """Entries that began after the first step and are not what their windows' rows make."""
        first, last = -(-self.starts // self.ratio) + self.windows - 1, self.settled // self.ratio
        entry = torch.arange(int(last.max()))
        request, entry = ((entry >= first[:, None]) & (entry < last[:, None])).nonzero(as_tuple=True)
        rows = entry[:, None] * self.ratio + torch.arange((1 - self.windows) * self.ratio, self.ratio)
        text = self.text(request[:, None], rows)
        kv, score = self.kv[text], self.gate[text] + self.ape[rows % self.ratio]
        if self.windows == 2:  # the window before gives its first half, the entry's own its second
            before = (torch.arange(2 * self.ratio) < self.ratio)[None, :, None]
            kv, score = (torch.where(before, of[..., :DIM], of[..., DIM:]) for of in (kv, score))
        want = rms_norm(pool(kv, score), self.norm, 1e-6)
        page, row = self.table[request, entry // (PAGE // self.ratio)].long(), entry % (PAGE // self.ratio)
        assert len(want)
        return int((~torch.isclose(self.cache.data[page, row], want, rtol=1e-5, atol=1e-5)).any(-1).sum())


def served(ratio: int, k: int, seed: int = 0) -> tuple[int, set[tuple[int, int, int]]]:
    """A request for every phase of a page's positions mod `ratio` and every accepted length, which
    first comes there; after it, random ones over more than a page. Wrong entries, and (phase,
    drafts kept, whether over a page's end) of every verify step.
    """
    choose = torch.Generator().manual_seed(seed)
    phase, kept = torch.meshgrid(torch.arange(ratio), torch.arange(k + 1), indexing="ij")
    phase, kept = phase.flatten(), kept.flatten()
    starts = torch.full_like(phase, PAGE - 8 * ratio if ratio == 4 else PAGE)
    requests, met = Requests(ratio, k, starts, pages=3, seed=seed), set()
    lead = phase + (6 * ratio if ratio == 4 else 0)
    requests.step(lead.clamp(min=1), lead.clamp(min=1))  # what is not settled by a page's end
    while int(requests.settled.min()) < PAGE + 150:
        ends = requests.settled // PAGE < (requests.settled + k) // PAGE
        met |= set(zip((requests.settled % ratio).tolist(), kept.tolist(), ends.tolist(), strict=True))
        requests.step(torch.full_like(kept, 1 + k), 1 + kept)
        kept = torch.randint(0, k + 1, kept.shape, generator=choose)
    return requests.wrong(), met


CASES = [(ratio, k) for ratio in (4, 128) for k in range(1, MOST + 1)]


@pytest.mark.parametrize(("ratio", "k"), CASES)
def test_every_accepted_length_at_every_phase(ratio: int, k: int) -> None:
    wrong, met = served(ratio, k)
    assert wrong == 0
    assert {(phase, kept) for phase, kept, _ in met} == {(p, n) for p in range(ratio) for n in range(k + 1)}
    over = {(-phase) % ratio for phase, _, end in met if end}  # rows before the page's end, mod ratio
    assert over >= {rows % ratio for rows in range(1, k + 1)}


@pytest.mark.parametrize("half", ["short rings", "rows dropped"])
@pytest.mark.parametrize(("ratio", "k"), [(ratio, k) for ratio, k in CASES if ratio == 4 or k in (1, 2, MOST)])
def test_half_of_what_drafts_need_is_wrong(monkeypatch: pytest.MonkeyPatch, ratio: int, k: int, half: str) -> None:
    """Rings as long as without drafts hold one more row than an entry pools; and rows kept as if
    all were accepted leave out those before the last window's start, which is a CSA window more.
    """
    if half == "short rings":
        monkeypatch.setattr(rings, "ring_pages", lambda overlap, ratio, drafted: overlap)
        harmless = k == 1
    else:
        original = rings._outlives
        monkeypatch.setattr(rings, "_outlives", lambda where, *a: original(replace(where, drafted=0), *a))
        harmless = ratio == 4 and k < 4
    assert (served(ratio, k)[0] == 0) == harmless
