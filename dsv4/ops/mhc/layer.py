# SPDX-License-Identifier: Apache-2.0
"""How a decoder layer uses the hyper-connections; the same in both engines."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dsv4.model.config import V4Config
from dsv4.ops import check
from dsv4.ops.mhc import PendingPost, Site, pre


class HyperConnection(nn.Module):
    """The mixing parameters of one site."""

    fn: Tensor
    base: Tensor
    scale: Tensor

    def __init__(self, config: V4Config, is_head: bool = False) -> None:
        super().__init__()
        n = config.hc_mult
        rows, scales = (n, 1) if is_head else (n * (2 + n), 3)
        self.config = config
        self.fn = nn.Parameter(torch.empty(rows, n * config.hidden_size, dtype=torch.float32), requires_grad=False)
        self.base = nn.Parameter(torch.empty(rows, dtype=torch.float32), requires_grad=False)
        self.scale = nn.Parameter(torch.empty(scales, dtype=torch.float32), requires_grad=False)

    def site(self, norm_weight: Tensor) -> Site:
        """The site with the norm of its sublayer's input, [D].

        Made anew at each call: engines may put other parameters in the place of these after they
        have loaded them.
        """
        c = self.config
        return Site(
            self.fn,
            self.base,
            self.scale,
            norm_weight,
            rms_eps=c.rms_norm_eps,
            hc_eps=c.hc_eps,
            iters=c.hc_sinkhorn_iters,
        )


def decoder_step(
    before: Tensor | PendingPost,
    *,
    name: str,
    attn_site: Site,
    attn: Callable[[Tensor], Tensor],
    ffn_site: Site,
    ffn: Callable[[Tensor], Tensor],
) -> PendingPost:
    """One decoder layer.

    before: the streams [T, 4, D], or the layer before with its last output still to be mixed in,
    which saves reading them twice
    name: for messages; attn, ffn: the sublayers, [T, D] -> [T, D]
    """
    at = pre(before, attn_site)
    at = pre(at.pending(check.finite(f"attention of {name}", attn(at.x))), ffn_site)
    return at.pending(check.finite(f"experts of {name}", ffn(at.x)))
