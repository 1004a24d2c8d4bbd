# SPDX-License-Identifier: Apache-2.0
"""What a hyper-connection site has, and what stands before and after its sublayer. n = 4
streams."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Site:
    """The parameters of one site: n for `pre`, n for `post`, n * n for `comb`, or n of the head
    alone.

    fn: [2n + n*n, n * D] fp32, or [n, n * D] for the head
    base: [2n + n*n] or [n] fp32
    scale: [3] or [1] fp32
    norm_weight: [D], of the norm of the sublayer's input
    iters: of the balancing; the head has none
    """

    fn: Tensor
    base: Tensor
    scale: Tensor
    norm_weight: Tensor
    rms_eps: float
    hc_eps: float
    iters: int


@dataclass(frozen=True)
class SublayerInput:
    """What `pre` makes of the streams.

    x: [T, D], the sublayer's input, normalised
    streams: [T, n, D]
    post, comb: [T, n] and [T, n, n] fp32, the weights that mix the sublayer's output in
    """

    x: Tensor
    streams: Tensor
    post: Tensor
    comb: Tensor

    def pending(self, y: Tensor) -> PendingPost:
        """y: [T, D], the sublayer's output."""
        return PendingPost(self.streams, y, self.post, self.comb)


@dataclass(frozen=True)
class PendingPost:
    """Streams [T, n, D] with a sublayer's output y [T, D] not yet mixed in, and the weights that
    will: see `SublayerInput`."""

    streams: Tensor
    y: Tensor
    post: Tensor
    comb: Tensor

    @property
    def device(self) -> torch.device:
        return self.streams.device
