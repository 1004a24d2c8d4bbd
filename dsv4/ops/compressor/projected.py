# SPDX-License-Identifier: Apache-2.0
"""What the compressor is given in a step, wherever the open windows live. Source: docs/model.md,
3.4."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dsv4.model.config import LayerKind, LayerSpec, V4Config


@dataclass(frozen=True)
class Projected:
    """What a step's tokens project to for one cache, and the weights that make entries of it.

    With overlap 2 the first D columns (A) belong to the entry of the window after a token's own,
    the last D (B) to its own.

    kv, gate: [T, overlap * D] fp32
    ape: [ratio, overlap * D] fp32, added to the gate by the position in its window
    norm_weight: [D]
    """

    kv: Tensor
    gate: Tensor
    ape: Tensor
    norm_weight: Tensor


@dataclass(frozen=True, kw_only=True)
class EntryStep:
    """What the caches of a layer share in a step.

    positions: [T] int64
    request_of_token: [T] int32; tokens of one request are neighbours
    ratio: tokens of a window, thus from one entry to the next
    overlap: windows that an entry pools, 2 (CSA) or 1 (HCA)
    eps: of the entries' norm
    entry_cos_sin: [T, rope_dim] fp32, at the first position of the window that token t is in
    """

    positions: Tensor
    request_of_token: Tensor
    ratio: int
    overlap: int
    eps: float
    entry_cos_sin: Tensor

    @property
    def device(self) -> torch.device:
        return self.positions.device


def entry_widths(config: V4Config, layer: LayerSpec) -> list[int]:
    """Columns of the one product that a compressed layer's input goes through: values and gates of
    attention's entries; in CSA layers those of index keys, and the indexer's weights."""
    width, index_width = (layer.overlap * dim for dim in (config.head_dim, config.index_head_dim))
    if layer.kind is LayerKind.HCA:
        return [width, width]
    return [width, width, index_width, index_width, config.index_n_heads]


class EntryInputs(NamedTuple):
    """What entries and index keys are pooled from, values beside gates, and the weights of the
    indexer's heads: [T, n] fp32 each; None where a layer has no use for it."""

    kv_gate: Tensor | None = None
    index_kv_gate: Tensor | None = None
    index_weights: Tensor | None = None

    @classmethod
    def split(cls, product: Tensor, widths: Sequence[int]) -> EntryInputs:
        """product: [T, sum(widths)] fp32; widths: `entry_widths`."""
        return cls(*product.split([2 * width for width in widths[:-1:2]] + list(widths[4:]), -1))
