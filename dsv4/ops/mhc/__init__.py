# SPDX-License-Identifier: Apache-2.0
"""Manifold-constrained hyper-connections: four residual streams, mixed at every sublayer. Source:
docs/model.md, 3.1."""

from __future__ import annotations

from torch import Tensor

from dsv4.ops.mhc import reference
from dsv4.ops.mhc.site import PendingPost, Site, SublayerInput
from dsv4.ops.registry import operator

_pre = operator("mhc.pre", reference.pre, triton="dsv4.ops.mhc.triton:pre")
_post_pre = operator("mhc.post_pre", reference.post_pre, triton="dsv4.ops.mhc.triton:post_pre")
post = operator("mhc.post", reference.post, triton="dsv4.ops.mhc.triton:post")
head = operator("mhc.head", reference.head, triton="dsv4.ops.mhc.triton:head")


def pre(before: Tensor | PendingPost, site: Site) -> SublayerInput:
    """A site's sublayer input from the streams [T, 4, D]; what the site before left pending is
    mixed in, reading them once less."""
    return _post_pre(before, site) if isinstance(before, PendingPost) else _pre(before, site)


__all__ = ["PendingPost", "Site", "SublayerInput", "head", "post", "pre"]
