# SPDX-License-Identifier: Apache-2.0
"""Manifold-constrained hyper-connections: four residual streams, mixed at every sublayer. Source: spec section 3.1."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dsv4.ops.mhc import reference
from dsv4.ops.registry import operator

pre = operator("mhc.pre", reference.pre, triton="dsv4.ops.mhc.triton:pre")
post = operator("mhc.post", reference.post, triton="dsv4.ops.mhc.triton:post")
post_pre = operator("mhc.post_pre", reference.post_pre, triton="dsv4.ops.mhc.triton:post_pre")
head = operator("mhc.head", reference.head, triton="dsv4.ops.mhc.triton:head")


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
