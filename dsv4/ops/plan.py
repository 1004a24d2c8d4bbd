# SPDX-License-Identifier: Apache-2.0
"""What a step's batch and block tables mean for the operators: slots, lengths and rotary tables.

Everything is computed on the batch's device without a host synchronisation and copied into buffers
that live as long as the engine, so that captured CUDA graphs read the values of the step being
replayed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4.model.config import CSA_RATIO, HCA_RATIO
from dsv4.ops.pages import BatchView, Pages, PageTable, Selection, SlotMapping
from dsv4.ops.rope import cos_sin


@dataclass(frozen=True)
class TokenPlan:
    """request_of_token: [T] int32; positions: [T] int64; valid: [T] bool, false for padding."""

    request_of_token: Tensor
    positions: Tensor
    valid: Tensor

    def copied(self, copy: Callable[[str, Tensor], Tensor]) -> TokenPlan:
        """The same in the buffers that `copy` returns for a name and a value."""
        return TokenPlan(
            copy("request", self.request_of_token), copy("positions", self.positions), copy("valid", self.valid)
        )


def plan_tokens(batch: BatchView) -> TokenPlan:
    """Which request each token belongs to, and its position. Padding tokens get the last request
    and are not valid."""
    index = torch.arange(batch.num_tokens, device=batch.seq_lens.device, dtype=torch.int32)
    ends = batch.query_start_loc[1 : batch.num_reqs + 1]
    request = torch.searchsorted(ends, index, right=True).clamp_(max=batch.num_reqs - 1)
    valid = index < ends[-1]
    positions = batch.seq_lens[request] - ends[request] + index
    return TokenPlan(request.int(), torch.where(valid, positions, 0).long(), valid)


def token_slots(block_table: Tensor, tokens: TokenPlan, page_tokens: int) -> Tensor:
    """Each token's own slot in a cache with one row per token: [T] int32, -1 for padding."""
    page = block_table[tokens.request_of_token.long(), tokens.positions // page_tokens]
    slot = page * page_tokens + (tokens.positions % page_tokens).int()
    return torch.where(tokens.valid, slot, -1)


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
    return torch.where(inside, page * page_tokens + (at % page_tokens).int(), -1), lens


@dataclass(frozen=True)
class WindowPlan:
    """A step's windows.

    slot_mapping: [T] int32, where each token's row goes
    slots, lens: [T, 128] and [T] int32, what each token attends, see `window_slots`
    """

    tokens: TokenPlan
    slot_mapping: Tensor
    slots: Tensor
    lens: Tensor

    def written(self, pages: Pages) -> SlotMapping:
        """What the step writes, in one layer's pages."""
        return SlotMapping(pages, self.slot_mapping)

    def read(self, pages: Pages) -> Selection:
        """What the step reads, in one layer's pages."""
        return Selection(pages, self.slots, self.lens)

    def copied(self, copy: Callable[[str, Tensor], Tensor]) -> WindowPlan:
        """The same in the buffers that `copy` returns for a name and a value."""
        return WindowPlan(
            self.tokens.copied(copy),
            copy("slot_mapping", self.slot_mapping),
            copy("slots", self.slots),
            copy("lens", self.lens),
        )


def plan_window(block_table: Tensor, tokens: TokenPlan, page_tokens: int, window: int) -> WindowPlan:
    """block_table: [R, n] int32, pages of one row per token."""
    slots, lens = window_slots(block_table, tokens, page_tokens, window)
    return WindowPlan(tokens, token_slots(block_table, tokens, page_tokens), slots, lens)


def entry_slot_mapping(block_table: Tensor, tokens: TokenPlan, rows_per_page: int, ratio: int) -> Tensor:
    """The slot of the entry that each token completes: [T] int32, -1 for tokens that complete
    none."""
    entry = tokens.positions // ratio
    page = block_table[tokens.request_of_token.long(), entry // rows_per_page]
    completes = tokens.valid & ((tokens.positions + 1) % ratio == 0)
    return torch.where(completes, page * rows_per_page + (entry % rows_per_page).int(), -1)


def entry_lens(tokens: TokenPlan, ratio: int) -> Tensor:
    """Visible entries of each token: [T] int32; entry j is visible to position t when j < (t + 1)
    // ratio."""
    return torch.where(tokens.valid, (tokens.positions + 1) // ratio, 0).int()


def request_entry_slots(block_table: Tensor, rows_per_page: int, max_entries: int) -> Tensor:
    """Slots of every entry of every request: [R, max_entries] int32; only the first entry_lens
    places mean anything."""
    entry = torch.arange(max_entries, device=block_table.device)
    return block_table[:, entry // rows_per_page] * rows_per_page + (entry % rows_per_page).int()


def topk_slots(topk_indices: Tensor, entries: PageTable, request_of_token: Tensor) -> Tensor:
    """Slots of entries: topk_indices [T, K] int32, relative to the token's request; [T, K] int32,
    -1 is kept."""
    at, rows = topk_indices.clamp(min=0).long(), entries.pages.rows
    page = entries.block_table[request_of_token.long()[:, None], at // rows]
    return torch.where(topk_indices >= 0, page * rows + (at % rows).int(), -1)


@dataclass(frozen=True)
class EntryPlan:
    """A step's compressed entries in one cache.

    block_table: [R, n] int32
    slot_mapping: [T] int32, where the entry that each token completes goes
    lens: [T] int32, visible entries; max_entries: host bound on them
    request_slots: [R, E] int32, where every entry is attended (HCA); None where an indexer chooses,
    as E is 262,144 there
    """

    block_table: Tensor
    slot_mapping: Tensor
    lens: Tensor
    max_entries: int
    request_slots: Tensor | None

    def table(self, pages: Pages) -> PageTable:
        """One layer's pages, by request."""
        return PageTable(pages, self.block_table)

    def everything(self, pages: Pages, tokens: TokenPlan) -> Selection:
        """Every visible entry of each token's request, in one layer's pages."""
        assert self.request_slots is not None, "an indexer chooses these entries"
        return Selection(pages, self.request_slots, self.lens, tokens.request_of_token)


def plan_entries(block_table: Tensor, tokens: TokenPlan, page_tokens: int, ratio: int, max_tokens: int) -> EntryPlan:
    """page_tokens: tokens whose entries share a page; max_tokens: host bound on the context."""
    rows, max_entries = page_tokens // ratio, max_tokens // ratio
    return EntryPlan(
        block_table,
        entry_slot_mapping(block_table, tokens, rows, ratio),
        entry_lens(tokens, ratio),
        max_entries,
        request_entry_slots(block_table, rows, max_entries) if ratio == HCA_RATIO else None,
    )


@dataclass(frozen=True)
class RopeTables:
    """cos/sin rows of a step, [T, rope_dim] fp32 each: at the token's position with the frequencies
    of window-only and of compressed layers, and at the first position of the entry that the token
    belongs to, per ratio."""

    window: Tensor
    compressed: Tensor
    entry: dict[int, Tensor]


def rope_tables(positions: Tensor, window_freq: Tensor, compressed_freq: Tensor) -> RopeTables:
    """positions: [T]; window_freq, compressed_freq: [rope_dim / 2] fp32, of the two kinds of
    layers."""
    entry = {m: cos_sin(positions // m * m, compressed_freq) for m in (CSA_RATIO, HCA_RATIO)}
    return RopeTables(cos_sin(positions, window_freq), cos_sin(positions, compressed_freq), entry)


class GraphBuffers:
    """Buffers that keep their address and shape from step to step, as a captured CUDA graph
    needs."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def copy_in(self, name: str, value: Tensor, capacity: tuple[int, ...]) -> Tensor:
        """Copy `value` into the buffer `name` of shape `capacity`; return the buffer's first
        value.shape[0] rows.

        Columns beyond the value's keep what earlier steps left there. Raises ValueError when the
        value does not fit.
        """
        if any(have > room for have, room in zip(value.shape, capacity, strict=True)):
            raise ValueError(
                f"{name}: {tuple(value.shape)} does not fit the buffer {capacity} planned for this deployment"
            )
        buffer = self._buffers.get(name)
        if buffer is None:
            buffer = self._buffers[name] = value.new_zeros(capacity)
        buffer[tuple(slice(n) for n in value.shape)] = value
        return buffer[: value.shape[0]]
