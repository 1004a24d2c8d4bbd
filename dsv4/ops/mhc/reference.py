# SPDX-License-Identifier: Apache-2.0
"""Plain-PyTorch reference of the hyper-connection operators. Source: docs/model.md, 3.1.

n = 4 streams. `fn` maps the flattened streams [n * D] to 24 mixing logits: n for `pre`, n for
`post`, n * n for `comb`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.ops.mhc.site import PendingPost, Site, SublayerInput
from dsv4.ops.norm import rms_norm


def mixing_logits(streams: Tensor, fn: Tensor, rms_eps: float, compute_dtype: torch.dtype = torch.float32) -> Tensor:
    """(v fn^T) / rms(v) of the flattened streams; scaling comes after the product, as in the
    official code. [T, rows of fn]."""
    v = streams.flatten(1).to(compute_dtype)
    return (v @ fn.to(compute_dtype).T) * torch.rsqrt(v.square().mean(-1, keepdim=True) + rms_eps)


def sinkhorn(logits: Tensor, iters: int, eps: float) -> Tensor:
    """Make each token's mixing matrix doubly stochastic.

    logits: [T, n, n]. Returns [T, n, n]; columns sum to 1, rows only nearly. `iters` counts the
    first softmax and column division as one. Raises ValueError when iters < 1.
    """
    if iters < 1:
        raise ValueError(f"iters is {iters}, need at least 1")
    m = logits.softmax(-1).add_(eps)
    m.div_(m.sum(-2, keepdim=True).add_(eps))
    for _ in range(iters - 1):
        m.div_(m.sum(-1, keepdim=True).add_(eps))
        m.div_(m.sum(-2, keepdim=True).add_(eps))
    return m


def pre(streams: Tensor, site: Site, compute_dtype: torch.dtype = torch.float32) -> SublayerInput:
    """Collapse the streams into a sublayer's input and normalise it: RMSNorm(sum_j pre_j X_j), in
    the streams' dtype.

    streams: [T, n, D]. The collapsed sum is rounded to the streams' dtype before the norm.
    Raises ValueError when the site's iters < 1.
    """
    n = streams.shape[1]
    mix = mixing_logits(streams, site.fn, site.rms_eps, compute_dtype)
    base, scale = site.base.to(compute_dtype), site.scale.to(compute_dtype)
    pre_weight = torch.sigmoid(mix[:, :n] * scale[0] + base[:n]) + site.hc_eps
    post_weight = 2 * torch.sigmoid(mix[:, n : 2 * n] * scale[1] + base[n : 2 * n])
    comb = sinkhorn((mix[:, 2 * n :] * scale[2] + base[2 * n :]).unflatten(-1, (n, n)), site.iters, site.hc_eps)
    collapsed = (pre_weight[:, None] @ streams.to(compute_dtype)).squeeze(1).to(streams.dtype)
    x = rms_norm(collapsed, site.norm_weight, site.rms_eps, compute_dtype)
    return SublayerInput(x, streams, post_weight.float(), comb.float())


def post(pending: PendingPost, compute_dtype: torch.dtype = torch.float32) -> Tensor:
    """X'_k = post_k * y + sum_j comb[j, k] X_j: the matrix is used transposed, its first index is
    summed.

    Returns [T, n, D] in the streams' dtype, rounded once.
    """
    streams, y = pending.streams.to(compute_dtype), pending.y.to(compute_dtype)
    mixed = pending.comb.to(compute_dtype).transpose(1, 2) @ streams
    mixed += pending.post.to(compute_dtype)[:, :, None] * y[:, None]
    return mixed.to(pending.streams.dtype)


def post_pre(pending: PendingPost, site: Site) -> SublayerInput:
    """`post` of one site, then `pre` of the next."""
    return pre(post(pending), site)


def head(streams: Tensor, site: Site, compute_dtype: torch.dtype = torch.float32) -> Tensor:
    """Collapse the streams [T, n, D] after the last layer, then RMSNorm: [T, D] in the streams'
    dtype."""
    return rms_norm(collapse(streams, site, compute_dtype), site.norm_weight, site.rms_eps, compute_dtype)


def collapse(streams: Tensor, site: Site, compute_dtype: torch.dtype = torch.float32) -> Tensor:
    """What `head` norms: [T, D] in the streams' dtype."""
    mix = mixing_logits(streams, site.fn, site.rms_eps, compute_dtype)
    weight = torch.sigmoid(mix * site.scale.to(compute_dtype) + site.base.to(compute_dtype)) + site.hc_eps
    return (weight[:, None] @ streams.to(compute_dtype)).squeeze(1).to(streams.dtype)
