# SPDX-License-Identifier: Apache-2.0
"""One cache that a layer's tokens are pooled into, with its open windows kept as summaries."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dsv4.ops.compressor.projected import Projected
from dsv4.ops.pages import SlotMapping


@dataclass(frozen=True)
class SummaryState:
    """One page of summaries per request, and with overlap 2 one summary behind each page of
    entries.

    summaries: [P, overlap, 3, D] fp32
    state_page: [R] int32, each request's page of `summaries`
    tail: [P', 3, D] fp32, one per page of entries; None with overlap 1
    block_table: [R, n] int32, the pages of each request's entries
    entries: where the entry that each token completes goes
    """

    projected: Projected
    summaries: Tensor
    state_page: Tensor
    tail: Tensor | None
    block_table: Tensor
    entries: SlotMapping
