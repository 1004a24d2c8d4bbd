# SPDX-License-Identifier: Apache-2.0
"""Released tensors loaded into vLLM's parameters."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.models.utils import is_pp_missing_parameter

from dsv4.loading import ExpertTensor, ReleasedLoader
from dsv4.model.checkpoint import validate
from dsv4.model.config import V4Config

_EXPERTS = ".routed_experts"  # vLLM's FusedMoE holds the routed experts' parameters in a module of its own


def loader_of(model: nn.Module, config: V4Config, tp_rank: int, draft: bool = False) -> ReleasedLoader:
    """The loader of this rank's parameters, of the backbone or of the draft."""
    experts = {name.removesuffix(_EXPERTS): m for name, m in model.named_modules() if isinstance(m, RoutedExperts)}

    def owns(parameter: str, expert: ExpertTensor | None) -> bool:
        if is_pp_missing_parameter(parameter, model):
            return False
        return expert is None or experts[expert.layer]._map_global_expert_id_to_local_expert_id(expert.expert) >= 0

    params = {name.replace(f"{_EXPERTS}.", "."): param for name, param in model.named_parameters()}
    return ReleasedLoader(params, config, tp_rank, owns, draft)


def load_weights(
    model: nn.Module, loader: ReleasedLoader, path: str, weights: Iterable[tuple[str, Tensor]]
) -> set[str]:
    """Load every tensor of the loader's part that belongs to this rank. See `ReleasedLoader`.

    A local folder is validated by its headers first, so that nothing is loaded from a checkpoint
    that does not fit its config; what comes by any other path is counted while it is loaded.
    """
    if Path(path).is_dir():
        validate(path, loader.config)
    names = {name.replace(f"{_EXPERTS}.", "."): name for name, _ in model.named_parameters()}
    loaded = loader.load(weights)
    loader.finish(path)
    return {names[short] for short in loaded}
