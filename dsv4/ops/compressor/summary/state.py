# SPDX-License-Identifier: Apache-2.0
"""One cache that a layer's tokens are pooled into, with its open windows kept as summaries."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dsv4.ops.pages import Pages


@dataclass(frozen=True)
class Pooling:
    """kv, gate: [T, overlap * D] fp32; ape: [m, overlap * D] fp32; norm_weight: [D].

    state: [P, overlap, 3, D] fp32, one page per request; state_page: [R]; tail: [P', 3, D] fp32, one per page of `cache`
    (overlap 2 only); block_table: [R, n] of those pages; entry_slots: [T], the slot of the entry that token t completes, -1
    for the others; cache: where entries go.
    """

    kv: Tensor
    gate: Tensor
    ape: Tensor
    norm_weight: Tensor
    state: Tensor
    state_page: Tensor
    tail: Tensor | None
    block_table: Tensor
    entry_slots: Tensor
    cache: Pages
