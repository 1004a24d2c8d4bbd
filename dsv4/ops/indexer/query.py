# SPDX-License-Identifier: Apache-2.0
"""The prepared index query that `prepare_query` makes and `logits` reads."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dsv4.model.kv_layout import IndexFormat


@dataclass(frozen=True)
class IndexQuery:
    """Index queries of T tokens and Hi heads, in the format of the keys.

    values: plain [T, Hi, 128] of the model's dtype; fp8: e4m3 codes uint8 [T, Hi, 128], whose scale
    is folded into `weights`; mxfp4: packed e2m1 uint8 [T, Hi, 64]. scales: mxfp4's ue8m0 uint8 [T,
    Hi, 4], else None.
    weights: [T, Hi] fp32, everything that multiplies relu(q_h . k).
    """

    values: Tensor
    scales: Tensor | None
    weights: Tensor
    format: IndexFormat

    def __getitem__(self, tokens: slice) -> IndexQuery:
        scales = None if self.scales is None else self.scales[tokens]
        return IndexQuery(self.values[tokens], scales, self.weights[tokens], self.format)
