# SPDX-License-Identifier: Apache-2.0
"""Released tensors handed to the model's parameters, each by the parameter's own sharding loader."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from sglang.srt.layers.moe.fused_moe_triton import FusedMoE
from sglang.srt.model_loader.weight_utils import default_weight_loader
from torch import Tensor, nn

from dsv4.errors import CheckpointError
from dsv4.parameters import ExpertTensor, as_stored, expert_tensor, parameter_name

if TYPE_CHECKING:
    from dsv4_sglang.model import DeepseekV4PluginForCausalLM


def load_weights(model: DeepseekV4PluginForCausalLM, weights: Iterable[tuple[str, Tensor]], tp_rank: int) -> set[str]:
    """Load every tensor of the backbone; `mtp.*` is left out.

    Returns the names of the loaded parameters. Raises CheckpointError naming what is missing or unknown.
    """
    params = dict(model.named_parameters())
    experts = {name: module for name, module in model.named_modules() if isinstance(module, FusedMoE)}
    loaded: set[str] = set()
    unknown: list[str] = []
    for name, tensor in weights:
        if name.startswith("mtp."):
            continue
        if (expert := expert_tensor(name)) is not None:
            loaded.add(_load_expert(experts[expert.layer], expert, tensor))
            continue
        target, shard = parameter_name(name)
        if target not in params:
            unknown.append(name)
            continue
        _load(params[target], tensor, shard, tp_rank)
        loaded.add(target)
    missing = sorted(set(params) - loaded)
    if unknown or missing:
        raise CheckpointError(f"no parameter for {unknown}, no tensor for {missing}; is the download complete?")
    return loaded


def _load(param: nn.Parameter, tensor: Tensor, shard: int | None, tp_rank: int) -> None:
    tensor = as_stored(param.dtype, tensor)
    loader = getattr(param, "weight_loader", default_weight_loader)
    if shard is not None:
        loader(param, tensor, shard)
    elif loader is default_weight_loader and param.shape != tensor.shape:
        local = param.shape[0]  # only attn_sink is sharded and belongs to no linear: one logit per head
        loader(param, tensor[tp_rank * local : (tp_rank + 1) * local])
    else:
        loader(param, tensor)


def _load_expert(module: FusedMoE, tensor_of: ExpertTensor, tensor: Tensor) -> str:
    # SGLang names MXFP4 scales like block-FP8 ones until they are repacked.
    name = f"{tensor_of.stem}_weight{'_scale_inv' if tensor_of.is_scale else ''}"
    param = getattr(module, name)
    tensor = as_stored(param.dtype, tensor)
    # An expert that lives on another expert-parallel rank is left out by the loader.
    param.weight_loader(param, tensor, name, shard_id=tensor_of.linear, expert_id=tensor_of.expert)
    return f"{tensor_of.layer}.{name}"
