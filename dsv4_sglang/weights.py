# SPDX-License-Identifier: Apache-2.0
"""Released tensors loaded into SGLang's parameters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import Tensor

from dsv4.parameters import load_released

if TYPE_CHECKING:
    from dsv4_sglang.model import DeepseekV4PluginForCausalLM


def load_weights(model: DeepseekV4PluginForCausalLM, weights: Iterable[tuple[str, Tensor]], tp_rank: int) -> set[str]:
    """Load every tensor of the backbone. See `load_released`."""
    return load_released(dict(model.named_parameters()), weights, tp_rank)
