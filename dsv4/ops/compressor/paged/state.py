# SPDX-License-Identifier: Apache-2.0
"""One cache that a layer's tokens are pooled into, with its open windows kept as raw rows."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dsv4.ops.pages import Pages


@dataclass(frozen=True)
class Pooling:
    """kv, gate: [T, overlap * D] fp32; ape: [m, overlap * D] fp32; norm_weight: [D].

    state: fp32 rows [P, rows, 2 * overlap * D]; state_slots: [T], where token t's row goes; state_block_table: [R, n] of its
    pages; entry_slots: [T], the slot of the entry that token t completes; -1 for none in both. cache: where entries go.
    """

    kv: Tensor
    gate: Tensor
    ape: Tensor
    norm_weight: Tensor
    state: Pages
    state_slots: Tensor
    state_block_table: Tensor
    entry_slots: Tensor
    cache: Pages
