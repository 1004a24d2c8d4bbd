# SPDX-License-Identifier: Apache-2.0
"""RMS norms, in plain PyTorch. Source: docs/model.md, 3.2."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, compute_dtype: torch.dtype = torch.float32) -> Tensor:
    """x / rms(x) * weight over the last axis, rounded once to x's dtype."""
    y = x.to(compute_dtype)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return (y * weight.to(compute_dtype)).to(x.dtype)


def head_rms_norm(q: Tensor, eps: float, compute_dtype: torch.dtype = torch.float32) -> Tensor:
    """q / rms(q) per head, without a weight: [T, H, D], rounded once to q's dtype."""
    x = q.to(compute_dtype)
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)).to(q.dtype)
