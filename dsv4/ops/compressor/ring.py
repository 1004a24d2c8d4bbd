# SPDX-License-Identifier: Apache-2.0
"""Compressor state in rings: only the open windows are kept, not a row per cached token.

A ring has `windows` pages of `ratio` rows: the two windows that a CSA entry pools, or the one of an HCA entry. Whoever
owns a ring (a window page, a request) finds it by `owner_table`. A step of one token per request pools straight from the
rings. A longer step would overwrite rows that its own entries still need, so its rows, and the open windows before
them, go through scratch memory, and only the windows that stay open are written back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4.ops.compressor.paged import Pooling, save_state, update
from dsv4.ops.pages import BatchView, Pages
from dsv4.ops.plan import TokenPlan


@dataclass(frozen=True)
class Rings:
    """Where the state row of a position lives.

    owner_table: [R, n] int32; the ring of request r's position p belongs to owner_table[r, p // owner_tokens].
    """

    owner_table: Tensor
    owner_tokens: int
    ratio: int
    windows: int

    def pages(self, request: Tensor, positions: Tensor) -> Tensor:
        """Ring pages of positions >= 0: request, positions [...] int; [...] int32."""
        owner = self.owner_table[request.long(), positions // self.owner_tokens]
        return (owner * self.windows + (positions // self.ratio) % self.windows).int()

    def slots(self, request: Tensor, positions: Tensor) -> Tensor:
        """Flat row slots of positions >= 0: [...] int32."""
        return self.pages(request, positions) * self.ratio + (positions % self.ratio).int()

    def first_needed(self, positions: Tensor) -> Tensor:
        """The first position whose row the token at `positions` may need: the start of the window before its own, or of its own."""
        return (positions // self.ratio - (self.windows - 1)).clamp(min=0) * self.ratio


@dataclass(frozen=True)
class RingPlan:
    """One step's use of the rings of one kind.

    positions: [T] int64, each relative to the first row that its request needs, so that tables stay short.
    table: [R, n] int32, pages of the memory that entries are pooled from; store_slots: [T] int32, where the step's rows go in it.
    The rest is None when that memory is the rings themselves: keep_slots [T] int32, ring slots of rows that outlive the step, -1
    for the others; carry_from, carry_to [R * n]: ring and scratch slots of rows from before the step; num_pages of scratch.
    """

    positions: Tensor
    table: Tensor
    store_slots: Tensor
    keep_slots: Tensor | None = None
    carry_from: Tensor | None = None
    carry_to: Tensor | None = None
    num_pages: int = 0


def plan_single(rings: Rings, tokens: TokenPlan) -> RingPlan:
    """One token per request, in request order; the rings are read and written in place."""
    base = rings.first_needed(tokens.positions)
    windows = base[:, None] + torch.arange(rings.windows, device=base.device) * rings.ratio  # [R, windows]
    # The window after the newest page may lie on a page that does not exist yet: it is not read.
    windows = torch.minimum(windows, tokens.positions[:, None])
    slots = torch.where(tokens.valid, rings.slots(tokens.request_of_token, tokens.positions), -1)
    return RingPlan(tokens.positions - base, rings.pages(tokens.request_of_token[:, None], windows), slots.int())


def plan_many(rings: Rings, tokens: TokenPlan, batch: BatchView) -> RingPlan:
    """Any number of tokens per request."""
    device, ratio = batch.seq_lens.device, rings.ratio
    index = torch.arange(batch.num_reqs, device=device)
    query_lens = batch.query_start_loc.diff()
    first = (batch.seq_lens - query_lens).long()
    base = rings.first_needed(first)  # [R]
    num_pages = (batch.seq_lens - base + ratio - 1) // ratio
    start = num_pages.cumsum(0) - num_pages
    columns = (batch.max_query_len + ratio - 1) // ratio + rings.windows
    table = (start[:, None] + torch.arange(columns, device=device)).int()
    capacity = batch.num_tokens // ratio + batch.num_reqs * (rings.windows + 1)

    request = tokens.request_of_token.long()
    positions = torch.where(tokens.valid, tokens.positions - base[request], 0)
    store = torch.where(tokens.valid, start[request] * ratio + positions, -1)
    keep = tokens.valid & _outlives(rings, tokens.positions, batch.seq_lens.long()[request])
    kept = torch.where(keep, rings.slots(request, tokens.positions), -1)

    rows = torch.arange(rings.windows * ratio - 1, device=device)
    at = base[:, None] + rows  # [R, n]
    exists = at < first[:, None]
    owner = torch.where(exists, at, base[:, None])
    source = torch.where(exists, rings.slots(index[:, None].expand_as(owner), owner), 0)
    target = torch.where(exists, start[:, None] * ratio + rows, capacity * ratio)  # the others go to a page nobody reads
    return RingPlan(positions, table, store.int(), kept.int(), source.flatten().long(), target.flatten().long(), capacity + 1)


def _outlives(rings: Rings, positions: Tensor, seq_lens: Tensor) -> Tensor:
    """Whether a later step may need a position's row: the open windows of the sequence, and the last window of each owner,
    from which another request may go on after a prefix hit."""
    open_window = positions >= rings.first_needed(seq_lens)
    last_windows = (rings.windows - 1) * rings.ratio
    return open_window | (positions % rings.owner_tokens >= rings.owner_tokens - last_windows)


@dataclass(frozen=True)
class RingPooling:
    """One cache that a layer's tokens are pooled into. kv, gate: [T, overlap * D] fp32; ape: [m, overlap * D] fp32.

    rings: its open windows; scratch: at least plan.num_pages pages of the rings' shape, None when the plan needs none;
    entry_slots: [T], the slot of the entry that token t completes, -1 for the others; norm_weight: [D]; cache: for entries.
    """

    kv: Tensor
    gate: Tensor
    ape: Tensor
    norm_weight: Tensor
    rings: Pages
    scratch: Pages | None
    entry_slots: Tensor
    cache: Pages


def compress_step(
    poolings: Sequence[RingPooling], plan: RingPlan, request_of_token: Tensor, overlap: int, eps: float, entry_cos_sin: Tensor
) -> None:
    """Save the step's rows, pool the entries that it completes, and keep what later steps need, for all caches of a layer.

    The other arguments are those of `update`.
    """
    update([_paged(to, plan) for to in poolings], plan.positions, request_of_token, overlap, eps, entry_cos_sin)
    if plan.keep_slots is not None:
        for to in poolings:
            save_state(to.kv, to.gate, to.ape, plan.positions, to.rings, plan.keep_slots)


def _paged(to: RingPooling, plan: RingPlan) -> Pooling:
    """The pages that entries are pooled from: the rings, or scratch that the rows they need have been copied to."""
    memory = to.rings
    if plan.keep_slots is not None:
        assert to.scratch is not None
        memory = to.scratch
        memory.data.flatten(0, 1)[plan.carry_to] = to.rings.data.flatten(0, 1)[plan.carry_from]
    return Pooling(to.kv, to.gate, to.ape, to.norm_weight, memory, plan.store_slots, plan.table, to.entry_slots, to.cache)
