# SPDX-License-Identifier: Apache-2.0
"""Caches as a step sees them, and what it reads and writes there. Every cache makes the memory of
its plan (`empty`) and says, in plain PyTorch, what belongs in it (`fill`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4.ops.pages import BatchView, Pages, PageTable, Selection, SlotMapping
from dsv4.ops.plan.room import Room
from dsv4.ops.plan.tokens import TokenPlan


@dataclass(frozen=True)
class RowCache:
    """One row per token. block_table: [R, n] int32, of pages of `page_tokens` rows."""

    block_table: Tensor
    page_tokens: int

    def empty(self, batch: BatchView, room: Room) -> Tensor:
        return room.per_token("slot_mapping")

    def fill(self, plan: Tensor, tokens: TokenPlan) -> None:
        plan[:] = token_slots(self.block_table, tokens, self.page_tokens)


def token_slots(block_table: Tensor, tokens: TokenPlan, page_tokens: int) -> Tensor:
    """Each token's own slot in a cache with one row per token: [T] int32, -1 for padding."""
    page = block_table[tokens.request_of_token.long(), tokens.positions // page_tokens]
    slot = _slots(page, tokens.positions % page_tokens, page_tokens)
    return torch.where(tokens.valid, slot, -1)


def _slots(page: Tensor, row: Tensor, rows: int) -> Tensor:
    """-1 where there is no page."""
    return torch.where(page >= 0, page * rows + row.int(), -1)


@dataclass(frozen=True)
class WindowCache:
    """One row per token, of which each token attends the last `window`, itself among them."""

    block_table: Tensor
    page_tokens: int
    window: int

    def empty(self, batch: BatchView, room: Room) -> WindowPlan:
        return WindowPlan(room.per_token("slot_mapping"), room.per_token("slots", self.window), room.per_token("lens"))

    def fill(self, plan: WindowPlan, tokens: TokenPlan) -> None:
        plan.slot_mapping[:] = token_slots(self.block_table, tokens, self.page_tokens)
        plan.slots[:], plan.lens[:] = window_slots(self.block_table, tokens, self.page_tokens, self.window)


@dataclass(frozen=True)
class BlockCache:
    """One row per token of a draft's block: a request's tokens of the step, all of which each of
    them attends, in both directions, and the `window` rows before them. Source: docs/model.md,
    3.10.

    block: most tokens of a request in the step
    """

    block_table: Tensor
    page_tokens: int
    window: int
    block: int

    @property
    def width(self) -> int:
        """Rows that a token attends, at most."""
        return self.window + self.block

    def empty(self, batch: BatchView, room: Room) -> WindowPlan:
        slots = room.per_token("block_slots", self.width)
        return WindowPlan(room.per_token("slot_mapping"), slots, room.per_token("lens"))

    def fill(self, plan: WindowPlan, tokens: TokenPlan) -> None:
        plan.slot_mapping[:] = token_slots(self.block_table, tokens, self.page_tokens)
        request, before = tokens.request_of_token.long(), torch.where(tokens.valid, tokens.positions, 1 << 40)
        after = torch.where(tokens.valid, tokens.positions + 1, 0)
        requests = self.block_table.shape[0]
        start = before.new_full((requests,), 1 << 40).scatter_reduce(0, request, before, "amin")[request]
        end = after.new_zeros(requests).scatter_reduce(0, request, after, "amax")[request]
        first = (start - self.window).clamp(min=0)
        plan.lens[:] = torch.where(tokens.valid, end - first, 0)
        place = torch.arange(self.width, device=first.device)
        inside = place < plan.lens[:, None]
        at = torch.where(inside, first[:, None] + place, 0)
        page = self.block_table[request[:, None], at // self.page_tokens]
        plan.slots[:] = torch.where(inside, _slots(page, at % self.page_tokens, self.page_tokens), -1)


@dataclass(frozen=True)
class WindowPlan:
    """A step's windows.

    slot_mapping: [T] int32, where each token's row goes
    slots, lens: [T, 128] and [T] int32, what each token attends, see `window_slots`; of a
    `BlockCache` as many more as its block has
    """

    slot_mapping: Tensor
    slots: Tensor
    lens: Tensor

    def written(self, pages: Pages) -> SlotMapping:
        """What the step writes, in one layer's pages."""
        return SlotMapping(pages, self.slot_mapping)

    def read(self, pages: Pages) -> Selection:
        """What the step reads, in one layer's pages."""
        return Selection(pages, self.slots, self.lens)


def window_slots(block_table: Tensor, tokens: TokenPlan, page_tokens: int, window: int) -> tuple[Tensor, Tensor]:
    """Slots of each token's window, oldest first, and how many: [T, window] int32 and [T] int32.

    The window includes the token itself. Places beyond the length are -1.
    """
    lens = torch.where(tokens.valid, (tokens.positions + 1).clamp(max=window), 0).int()
    first = tokens.positions + 1 - lens
    at = first[:, None] + torch.arange(window, device=lens.device)
    inside = torch.arange(window, device=lens.device) < lens[:, None]
    at = torch.where(inside, at, 0)
    page = block_table[tokens.request_of_token.long()[:, None], at // page_tokens]
    return torch.where(inside, _slots(page, at % page_tokens, page_tokens), -1), lens


@dataclass(frozen=True)
class EntryCache:
    """One compressed entry per `ratio` tokens.

    page_tokens: tokens whose entries share a page
    max_context: tokens of the longest request of this deployment
    topk: how many an indexer chooses for each token; None where a token attends all that it sees
    """

    block_table: Tensor
    page_tokens: int
    ratio: int
    max_context: int
    topk: int | None

    @property
    def rows(self) -> int:
        return self.page_tokens // self.ratio

    def max_entries(self, batch: BatchView) -> int:
        """Host bound on the entries of a request of this step."""
        return min(batch.max_seq_len, self.max_context) // self.ratio

    def empty(self, batch: BatchView, room: Room) -> EntryPlan:
        max_entries, request_slots = self.max_entries(batch), None
        if self.topk is None:
            # As wide in every step, so that a captured step finds its rows: only the first places
            # are meant.
            request_slots = room.per_request("request_slots", self.max_context // self.ratio)[:, :max_entries]
        return EntryPlan(
            self.block_table,
            room.per_token("slot_mapping"),
            room.per_token("lens"),
            max_entries,
            request_slots,
            None if self.topk is None else room.per_token("chosen_lens"),
        )

    def fill(self, plan: EntryPlan, tokens: TokenPlan) -> None:
        plan.slot_mapping[:] = entry_slot_mapping(self.block_table, tokens, self.rows, self.ratio)
        plan.lens[:] = entry_lens(tokens, self.ratio)
        if plan.chosen_lens is not None:
            plan.chosen_lens[:] = plan.lens.clamp(max=self.topk)
        if plan.request_slots is not None:
            plan.request_slots[:] = request_entry_slots(self.block_table, self.rows, plan.max_entries)


@dataclass(frozen=True)
class EntryPlan:
    """A step's compressed entries in one cache.

    block_table: [R, n] int32
    slot_mapping: [T] int32, where the entry that each token completes goes
    lens: [T] int32, visible entries; max_entries: host bound on them
    request_slots: [R, E] int32, where every entry is attended (HCA); None where an indexer chooses,
    as E is 262,144 there
    chosen_lens: [T] int32, how many it chooses for each token
    """

    block_table: Tensor
    slot_mapping: Tensor
    lens: Tensor
    max_entries: int
    request_slots: Tensor | None
    chosen_lens: Tensor | None

    def table(self, pages: Pages) -> PageTable:
        """One layer's pages, by request."""
        return PageTable(pages, self.block_table)

    def everything(self, pages: Pages, tokens: TokenPlan) -> Selection:
        """Every visible entry of each token's request, in one layer's pages."""
        assert self.request_slots is not None, "an indexer chooses these entries"
        return Selection(pages, self.request_slots, self.lens, tokens.request_of_token)


def entry_slot_mapping(block_table: Tensor, tokens: TokenPlan, rows_per_page: int, ratio: int) -> Tensor:
    """The slot of the entry that each token completes: [T] int32, -1 for tokens that complete
    none."""
    entry = tokens.positions // ratio
    page = block_table[tokens.request_of_token.long(), entry // rows_per_page]
    completes = tokens.valid & ((tokens.positions + 1) % ratio == 0)
    return torch.where(completes, _slots(page, entry % rows_per_page, rows_per_page), -1)


def entry_lens(tokens: TokenPlan, ratio: int) -> Tensor:
    """Visible entries of each token: [T] int32; entry j is visible to position t when j < (t + 1)
    // ratio."""
    return torch.where(tokens.valid, (tokens.positions + 1) // ratio, 0).int()


def request_entry_slots(block_table: Tensor, rows_per_page: int, max_entries: int) -> Tensor:
    """Slots of every entry of every request: [R, max_entries] int32; only the first entry_lens
    places mean anything."""
    entry = torch.arange(max_entries, device=block_table.device)
    return _slots(block_table[:, entry // rows_per_page], entry % rows_per_page, rows_per_page)


def topk_slots(topk_indices: Tensor, entries: PageTable, request_of_token: Tensor) -> Tensor:
    """Slots of entries: topk_indices [T, K] int32, relative to the token's request; [T, K] int32,
    -1 is kept."""
    at, rows = topk_indices.clamp(min=0).long(), entries.pages.rows
    page = entries.block_table[request_of_token.long()[:, None], at // rows]
    return torch.where(topk_indices >= 0, page * rows + (at % rows).int(), -1)
