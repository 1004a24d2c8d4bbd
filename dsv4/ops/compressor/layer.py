# SPDX-License-Identifier: Apache-2.0
"""How a compressed layer uses its entries' parameters; the same in both engines."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsv4.model.config import LayerSpec
from dsv4.ops.compressor.projected import Projected


class Norm(nn.Module):
    """An engine's norm."""

    weight: Tensor


class Compressor(nn.Module):
    """Pools the entries of one cache: attention's own, or the index keys."""

    def __init__(self, layer: LayerSpec, norm: Norm) -> None:
        """norm: of an entry; its weight [dim] is read, and it is never called."""
        super().__init__()
        width = layer.overlap * norm.weight.shape[0]
        self.ape = nn.Parameter(torch.empty(layer.compress_ratio, width, dtype=torch.float32), requires_grad=False)
        self.norm = norm

    def projected(self, kv_gate: Tensor) -> Projected:
        """kv_gate: [T, 2 * overlap * dim] fp32, of the layer's one product (`EntryInputs`)."""
        kv, gate = kv_gate.chunk(2, -1)
        return Projected(kv, gate, self.ape, self.norm.weight)
