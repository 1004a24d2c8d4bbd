# SPDX-License-Identifier: Apache-2.0
"""One cache that a layer's tokens are pooled into, with its open windows kept as summaries."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4.model.kv_layout import SINCE_BYTES
from dsv4.ops.compressor.projected import Projected
from dsv4.ops.pages import SlotMapping


@dataclass(frozen=True)
class SummaryPages:
    """What requests keep between steps, a page each.

    summaries: [P, overlap, 3, D] fp32, of the rows before a position
    ring: [P, k, 2, overlap * D] fp32, kv and score of the rows from there on, position p in row
    p % k: as many as a step may have to take back; None where no step has
    since: [P] int32, that position; None where it is the request's end
    """

    summaries: Tensor
    ring: Tensor | None = None
    since: Tensor | None = None

    @staticmethod
    def view(memory: Tensor, overlap: int, dim: int) -> SummaryPages:
        """Of fp32 [P, n], as `kv_layout.summary_row` lays a page out."""
        size, row = overlap * 3 * dim, 2 * overlap * dim
        summaries = memory[:, :size].unflatten(-1, (overlap, 3, dim))
        if memory.shape[1] == size:
            return SummaryPages(summaries)
        end = memory.shape[1] - SINCE_BYTES // memory.element_size()
        ring = memory[:, size:end].unflatten(-1, ((end - size) // row, 2, overlap * dim))
        return SummaryPages(summaries, ring, memory[:, end].view(torch.int32))

    @property
    def drafted(self) -> int:
        """Rows that a step may have to take back."""
        return 0 if self.ring is None else self.ring.shape[1]

    def clone(self) -> SummaryPages:
        """With memory of its own."""
        ring, since = (None if x is None else x.clone() for x in (self.ring, self.since))
        return SummaryPages(self.summaries.clone(), ring, since)


@dataclass(frozen=True)
class SummaryState:
    """One page of summaries per request, and with overlap 2 one summary behind each page of
    entries.

    state_page: [R] int32, each request's page of `kept`
    tail: [P', 3, D] fp32, one per page of entries; None with overlap 1
    block_table: [R, n] int32, the pages of each request's entries
    entries: where the entry that each token completes goes
    """

    projected: Projected
    kept: SummaryPages
    state_page: Tensor
    tail: Tensor | None
    block_table: Tensor
    entries: SlotMapping
