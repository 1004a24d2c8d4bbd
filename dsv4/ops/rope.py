# SPDX-License-Identifier: Apache-2.0
"""Interleaved rotary embedding on the last `rope_dim` channels, with YaRN on compressed layers.
Source: docs/model.md, 3.3."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dsv4.model.config import V4Config


def inv_freq(config: V4Config, compressed: bool, device: torch.device | None = None) -> Tensor:
    """Angular frequencies, [rope_dim / 2] fp32.

    compressed: the frequencies of CSA and HCA layers (compress_rope_theta and YaRN) instead of
    window-only layers'. YaRN scales frequencies only: cos and sin are never multiplied by its
    attention factor.
    """
    dim = config.qk_rope_head_dim
    theta = config.compress_rope_theta if compressed else config.rope_theta
    freq = 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim))
    if not compressed or config.yarn is None:
        return freq
    yarn = config.yarn

    def correction(rotations: float) -> float:
        return dim * math.log(yarn.original_max_position_embeddings / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(correction(yarn.beta_fast)), 0)
    high = min(math.ceil(correction(yarn.beta_slow)), dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32, device=device) - low) / max(high - low, 0.001)).clamp(0, 1)
    return freq / yarn.factor * ramp + freq * (1 - ramp)


def cos_sin(positions: Tensor, freq: Tensor) -> Tensor:
    """Table rows for `positions`.

    positions: [T] int; freq: [rope_dim / 2] fp32. Returns [T, rope_dim] fp32: cosines, then sines.
    The angle is fp32(t) * fp32(f): an fp64 angle differs by 1e-2 near one million tokens.
    """
    angle = positions.float()[:, None] * freq
    return torch.cat([angle.cos(), angle.sin()], -1)


def apply_rope(x: Tensor, table: Tensor, inverse: bool = False, compute_dtype: torch.dtype = torch.float32) -> Tensor:
    """Rotate the last rope_dim channels of `x` by the table's angles (by their negatives when
    `inverse`).

    x: [T, ..., D]; table: [T, rope_dim] fp32. Returns x's shape and dtype; pairs are (2i, 2i+1).
    """
    half = table.shape[-1] // 2
    shape = (table.shape[0],) + (1,) * (x.dim() - 2) + (half,)
    cos, sin = table[:, :half].view(shape).to(compute_dtype), table[:, half:].view(shape).to(compute_dtype)
    sin = -sin if inverse else sin
    a, b = x[..., -2 * half :].to(compute_dtype).unflatten(-1, (half, 2)).unbind(-1)
    rotated = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    return torch.cat([x[..., : -2 * half], rotated.to(x.dtype)], -1)
