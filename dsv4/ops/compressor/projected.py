# SPDX-License-Identifier: Apache-2.0
"""What the compressor is given in a step, wherever the open windows live. Source: docs/model.md,
3.4."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
