# SPDX-License-Identifier: Apache-2.0
"""One cache that a layer's tokens are pooled into, with its open windows kept as raw rows."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dsv4.ops.compressor.projected import Projected
from dsv4.ops.pages import SlotMapping


@dataclass(frozen=True)
class PagedState:
    """Rows [kv | gate + ape], one per token, in pages.

    rows: where each token's goes, in fp32 rows [P, rows, 2 * overlap * D]
    block_table: [R, n] int32, the pages of each request's rows
    entries: where the entry that each token completes goes
    """

    projected: Projected
    rows: SlotMapping
    block_table: Tensor
    entries: SlotMapping
