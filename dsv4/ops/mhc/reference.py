# SPDX-License-Identifier: Apache-2.0
"""Plain-PyTorch twin of the hyper-connection operators. Source: spec section 3.1.

n = 4 streams. `fn` maps the flattened streams [n * D] to 24 mixing logits: n for `pre`, n for `post`, n * n for `comb`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.ops.norm import rms_norm


def mixing_logits(streams: Tensor, fn: Tensor, rms_eps: float, compute_dtype: torch.dtype = torch.float32) -> Tensor:
    """(v fn^T) / rms(v) of the flattened streams; scaling comes after the product, as in the official code. [T, rows of fn]."""
    v = streams.flatten(1).to(compute_dtype)
    return (v @ fn.to(compute_dtype).T) * torch.rsqrt(v.square().mean(-1, keepdim=True) + rms_eps)


def sinkhorn(logits: Tensor, iters: int, eps: float) -> Tensor:
    """Make each token's mixing matrix doubly stochastic.

    logits: [T, n, n]. Returns [T, n, n]; columns sum to 1, rows only nearly. `iters` counts the first softmax and column
    division as one. Raises ValueError when iters < 1.
    """
    if iters < 1:
        raise ValueError(f"iters is {iters}, need at least 1")
    m = logits.softmax(-1).add_(eps)
    m.div_(m.sum(-2, keepdim=True).add_(eps))
    for _ in range(iters - 1):
        m.div_(m.sum(-1, keepdim=True).add_(eps))
        m.div_(m.sum(-2, keepdim=True).add_(eps))
    return m


def pre(
    streams: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    norm_weight: Tensor,
    rms_eps: float,
    hc_eps: float,
    iters: int,
    compute_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """Collapse the streams into a sublayer's input and normalise it.

    streams: [T, n, D]; fn: [2n + n*n, n * D] fp32; base: [2n + n*n] fp32; scale: [3] fp32; norm_weight: [D].
    Returns the sublayer's input RMSNorm(sum_j pre_j X_j) [T, D] in the streams' dtype, post [T, n] fp32 and
    comb [T, n, n] fp32. The collapsed sum is rounded to the streams' dtype before the norm.
    """
    n = streams.shape[1]
    mix = mixing_logits(streams, fn, rms_eps, compute_dtype)
    base, scale = base.to(compute_dtype), scale.to(compute_dtype)
    pre_weight = torch.sigmoid(mix[:, :n] * scale[0] + base[:n]) + hc_eps
    post_weight = 2 * torch.sigmoid(mix[:, n : 2 * n] * scale[1] + base[n : 2 * n])
    comb = sinkhorn((mix[:, 2 * n :] * scale[2] + base[2 * n :]).unflatten(-1, (n, n)), iters, hc_eps)
    collapsed = (pre_weight[:, None] @ streams.to(compute_dtype)).squeeze(1).to(streams.dtype)
    return rms_norm(collapsed, norm_weight, rms_eps, compute_dtype), post_weight.float(), comb.float()


def post(streams: Tensor, y: Tensor, post_weight: Tensor, comb: Tensor, compute_dtype: torch.dtype = torch.float32) -> Tensor:
    """X'_k = post_k * y + sum_j comb[j, k] X_j: the matrix is used transposed, its first index is summed.

    streams: [T, n, D]; y: [T, D]; post_weight: [T, n] fp32; comb: [T, n, n] fp32. Returns [T, n, D], rounded once.
    """
    mixed = comb.to(compute_dtype).transpose(1, 2) @ streams.to(compute_dtype)
    mixed += post_weight.to(compute_dtype)[:, :, None] * y.to(compute_dtype)[:, None]
    return mixed.to(streams.dtype)


def post_pre(
    streams: Tensor,
    y: Tensor,
    post_weight: Tensor,
    comb: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    norm_weight: Tensor,
    rms_eps: float,
    hc_eps: float,
    iters: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`post` of one site, then `pre` of the next: returns the new streams and what `pre` returns."""
    streams = post(streams, y, post_weight, comb)
    return streams, *pre(streams, fn, base, scale, norm_weight, rms_eps, hc_eps, iters)


def head(
    streams: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    norm_weight: Tensor,
    rms_eps: float,
    hc_eps: float,
    compute_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Collapse the streams after the last layer, then RMSNorm.

    streams: [T, n, D]; fn: [n, n * D] fp32; base: [n] fp32; scale: [1] fp32. Returns [T, D] in the streams' dtype.
    """
    mix = mixing_logits(streams, fn, rms_eps, compute_dtype)
    weight = torch.sigmoid(mix * scale.to(compute_dtype) + base.to(compute_dtype)) + hc_eps
    collapsed = (weight[:, None] @ streams.to(compute_dtype)).squeeze(1).to(streams.dtype)
    return rms_norm(collapsed, norm_weight, rms_eps, compute_dtype)
