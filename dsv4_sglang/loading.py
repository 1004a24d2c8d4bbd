# SPDX-License-Identifier: Apache-2.0
"""Released tensors loaded into SGLang's parameters."""

from __future__ import annotations

from collections.abc import Iterable

from sglang.srt.layers.moe.fused_moe_triton import FusedMoE
from torch import Tensor, nn

from dsv4.loading import ExpertTensor, ReleasedLoader
from dsv4.model.config import V4Config


def load_weights(
    model: nn.Module, config: V4Config, path: str, weights: Iterable[tuple[str, Tensor]], tp_rank: int
) -> set[str]:
    """Load every tensor of the backbone that belongs to this rank. See `ReleasedLoader`.

    path: what messages begin with
    """
    experts = {name: module for name, module in model.named_modules() if isinstance(module, FusedMoE)}

    def owns(parameter: str, expert: ExpertTensor | None) -> bool:
        return expert is None or experts[expert.layer]._map_global_expert_id_to_local_expert_id(expert.expert) >= 0

    loader = ReleasedLoader(dict(model.named_parameters()), config, tp_rank, owns)
    loaded = loader.load(weights)
    loader.finish(path)
    return loaded
