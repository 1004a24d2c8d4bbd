# SPDX-License-Identifier: Apache-2.0
"""Released tensors loaded into SGLang's parameters."""

from __future__ import annotations

from sglang.srt.layers.moe.fused_moe_triton import FusedMoE
from torch import nn

from dsv4.loading import ExpertTensor, ReleasedLoader
from dsv4.model.config import V4Config

# What is answered when weights are to be replaced there.
ON_A_GPU = (
    "dsv4 cannot replace weights on a GPU: SGLang's kernels have repacked them; start a server on the new checkpoint"
)


WITH_A_DRAFT = (
    "dsv4 cannot replace weights under a draft, which would go on with the old ones; start a server on the new"
    " checkpoint, or this one without --speculative-algorithm"
)


def loader_of(model: nn.Module, config: V4Config, tp_rank: int, draft: bool = False) -> ReleasedLoader:
    """The loader of this rank's parameters, of the backbone or of the draft."""
    experts = {name: module for name, module in model.named_modules() if isinstance(module, FusedMoE)}

    def owns(parameter: str, expert: ExpertTensor | None) -> bool:
        return expert is None or experts[expert.layer]._map_global_expert_id_to_local_expert_id(expert.expert) >= 0

    return ReleasedLoader(dict(model.named_parameters()), config, tp_rank, owns, draft)
