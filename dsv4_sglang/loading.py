# SPDX-License-Identifier: Apache-2.0
"""Released tensors loaded into SGLang's parameters."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from dsv4.loading import load_released


def load_weights(model: nn.Module, weights: Iterable[tuple[str, Tensor]], tp_rank: int) -> set[str]:
    """Load every tensor of the backbone. See `load_released`."""
    return load_released(dict(model.named_parameters()), weights, tp_rank)
