# SPDX-License-Identifier: Apache-2.0
"""Manifold-constrained hyper-connections: four residual streams, mixed at every sublayer. Source: spec section 3.1."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dsv4.ops.kernels import refuse_triton
from dsv4.ops.registry import register, resolve

register("mhc.pre", "dsv4.ops.mhc.reference:pre")
register("mhc.post", "dsv4.ops.mhc.reference:post")
register("mhc.post_pre", "dsv4.ops.mhc.reference:post_pre")
register("mhc.head", "dsv4.ops.mhc.reference:head")
register("mhc.pre", "dsv4.ops.mhc.triton:pre", "triton", refuse_triton)
register("mhc.post", "dsv4.ops.mhc.triton:post", "triton", refuse_triton)
register("mhc.post_pre", "dsv4.ops.mhc.triton:post_pre", "triton", refuse_triton)
register("mhc.head", "dsv4.ops.mhc.triton:head", "triton", refuse_triton)


@dataclass(frozen=True)
class Unmixed:
    """Streams [T, 4, D] with a sublayer's output y [T, D] not yet mixed in, and the weights that will: post [T, 4], comb [T, 4, 4]."""

    streams: Tensor
    y: Tensor
    post: Tensor
    comb: Tensor

    def mix(self) -> Tensor:
        """The streams with the output spread over them: [T, 4, D]."""
        return post(self.streams, self.y, self.post, self.comb)


def collapse(
    before: Tensor | Unmixed, fn: Tensor, base: Tensor, scale: Tensor, norm_weight: Tensor, rms_eps: float, hc_eps: float, iters: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The streams at a site and what `pre` makes of them; what the site before left unmixed is mixed in, reading them once less."""
    site = (fn, base, scale, norm_weight, rms_eps, hc_eps, iters)
    if isinstance(before, Unmixed):
        return post_pre(before.streams, before.y, before.post, before.comb, *site)
    return before, *pre(before, *site)


def pre(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, norm_weight: Tensor, rms_eps: float, hc_eps: float, iters: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Collapse the streams into a sublayer's normalised input. See `reference.pre`."""
    return resolve("mhc.pre", streams.device)(streams, fn, base, scale, norm_weight, rms_eps, hc_eps, iters)


def post(streams: Tensor, y: Tensor, post_weight: Tensor, comb: Tensor) -> Tensor:
    """Spread a sublayer's output over the streams and mix them. See `reference.post`."""
    return resolve("mhc.post", streams.device)(streams, y, post_weight, comb)


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
    """`post` of one site and `pre` of the next, which reads the streams once less. See `reference.post_pre`."""
    return resolve("mhc.post_pre", streams.device)(streams, y, post_weight, comb, fn, base, scale, norm_weight, rms_eps, hc_eps, iters)


def head(streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, norm_weight: Tensor, rms_eps: float, hc_eps: float) -> Tensor:
    """Collapse the streams after the last layer, and normalise. See `reference.head`."""
    return resolve("mhc.head", streams.device)(streams, fn, base, scale, norm_weight, rms_eps, hc_eps)
