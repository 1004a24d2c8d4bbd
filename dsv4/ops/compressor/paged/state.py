# SPDX-License-Identifier: Apache-2.0
"""One cache that a layer's tokens are pooled into, with its open windows kept as raw rows."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dsv4.ops.compressor.projected import Projected
from dsv4.ops.pages import Pages


@dataclass(frozen=True)
class PagedState:
    """Rows [kv | gate + ape], one per token, in pages; -1 stands for none in both slot mappings.

    pages: fp32 rows [P, rows, 2 * overlap * D]
    slot_mapping: [T] int32, where token t's row goes
    block_table: [R, n] int32, the pages of each request
    entry_slot_mapping: [T] int32, the slot of the entry that token t completes
    entries: the cache of those
    """

    projected: Projected
    pages: Pages
    slot_mapping: Tensor
    block_table: Tensor
    entry_slot_mapping: Tensor
    entries: Pages
