# SPDX-License-Identifier: Apache-2.0
"""Released tensors loaded into vLLM's parameters."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from torch import Tensor, nn
from vllm.model_executor.models.utils import is_pp_missing_parameter

from dsv4.errors import CheckpointError
from dsv4.loading import load_released
from dsv4.model.checkpoint import validate
from dsv4.model.config import V4Config

_EXPERTS = ".routed_experts."  # vLLM's FusedMoE holds the routed experts' parameters in a module of its own


def load_weights(
    model: nn.Module, config: V4Config, path: str, weights: Iterable[tuple[str, Tensor]], tp_rank: int
) -> set[str]:
    """Load every tensor of the backbone that belongs to this pipeline rank. See `load_released`.

    A local folder is validated by its headers first, so that nothing is loaded from a checkpoint
    that does not fit its config.
    """
    if Path(path).is_dir():
        validate(path, config)
    names = {name.replace(_EXPERTS, "."): name for name, _ in model.named_parameters()}
    params = dict(model.named_parameters())
    ours = {short: params[name] for short, name in names.items()}
    try:
        loaded = load_released(ours, weights, tp_rank, lambda p: is_pp_missing_parameter(p, model))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return {names[short] for short in loaded}
