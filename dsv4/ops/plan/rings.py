# SPDX-License-Identifier: Apache-2.0
"""Where the rows of open windows lie in rings, and what a step does with them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4.model.kv_layout import ring_pages, round_up
from dsv4.ops.pages import BatchView
from dsv4.ops.plan.room import Room
from dsv4.ops.plan.tokens import TokenPlan


@dataclass(frozen=True)
class Rings:
    """Where the state row of a position lives.

    owner_table: [R, n] int32; the ring of request r's position p belongs to owner_table[r, p //
    owner_tokens]
    owner_tokens: tokens of one owner
    ratio: rows of a ring page, a window
    windows: that an entry is pooled from
    drafted: a step's last rows that may be rejected, which the next step then starts before; it
    makes the ring longer
    """

    owner_table: Tensor
    owner_tokens: int
    ratio: int
    windows: int
    drafted: int = 0

    @property
    def length(self) -> int:
        """Pages of a ring."""
        return ring_pages(self.windows, self.ratio, self.drafted)

    def pages(self, request: Tensor, positions: Tensor) -> Tensor:
        """Ring pages of positions >= 0: request, positions [...] int; [...] int32."""
        owner = self.owner_table[request.long(), positions // self.owner_tokens]
        return (owner * self.length + (positions // self.ratio) % self.length).int()

    def slots(self, request: Tensor, positions: Tensor) -> Tensor:
        """Flat row slots of positions >= 0: [...] int32."""
        return self.pages(request, positions) * self.ratio + (positions % self.ratio).int()

    def first_needed(self, positions: Tensor) -> Tensor:
        """The first position whose row the token at `positions` may need: [...] int.

        It is the start of the window before its own, or of its own.
        """
        return (positions // self.ratio - (self.windows - 1)).clamp(min=0) * self.ratio

    def empty(self, batch: BatchView, room: Room) -> RingPlan:
        """Memory for the plan of a step of one token per request."""
        return RingPlan(
            room.per_token("ring_positions", dtype=torch.int64),
            room.per_token("ring_table", self.windows),
            room.per_token("ring_slots"),
        )

    def fill(self, plan: RingPlan, tokens: TokenPlan) -> None:
        """Plan a step of one token per request, in request order; the rings are read and written in
        place."""
        base = self.first_needed(tokens.positions)
        windows = base[:, None] + torch.arange(self.windows, device=base.device) * self.ratio  # [R, windows]
        # The window after the newest page may lie on a page that does not exist yet: it is not
        # read.
        windows = torch.minimum(windows, tokens.positions[:, None])
        slots = self.slots(tokens.request_of_token, tokens.positions)
        plan.positions[:] = tokens.positions - base
        plan.block_table[:] = self.pages(tokens.request_of_token[:, None], windows)
        plan.slot_mapping[:] = torch.where(tokens.valid, slots, -1)


@dataclass(frozen=True)
class RingPlan:
    """One step's use of the rings of one kind.

    positions: [T] int64, each relative to the first row that its request needs, so that tables stay
    short block_table: [R, n] int32, pages of the memory that entries are pooled from
    slot_mapping: [T] int32, where the step's rows go in it

    The rest is None when that memory is the rings themselves:

    keep_slot_mapping: [T] int32, ring slots of rows that outlive the step, -1 for the others
    carry_from, carry_to: [R * n] int64, ring and scratch slots of rows from before the step
    num_pages: of scratch
    """

    positions: Tensor
    block_table: Tensor
    slot_mapping: Tensor
    keep_slot_mapping: Tensor | None = None
    carry_from: Tensor | None = None
    carry_to: Tensor | None = None
    num_pages: int = 0


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
    # The others go to a page nobody reads.
    target = torch.where(exists, start[:, None] * ratio + rows, capacity * ratio)
    return RingPlan(
        positions,
        table,
        store.int(),
        keep_slot_mapping=kept.int(),
        carry_from=source.flatten().long(),
        carry_to=target.flatten().long(),
        num_pages=round_up(capacity + 1, 16),  # Triton compiles anew for other classes of this integer
    )


def _outlives(rings: Rings, positions: Tensor, seq_lens: Tensor) -> Tensor:
    """Whether a later step may need a position's row.

    It may be of an open window of the sequence, however much of the step is rejected, or of the
    last window of an owner, from which another request may go on after a prefix hit.
    """
    open_window = positions >= rings.first_needed((seq_lens - rings.drafted).clamp(min=0))
    last_windows = (rings.windows - 1) * rings.ratio
    return open_window | (positions % rings.owner_tokens >= rings.owner_tokens - last_windows)
