# SPDX-License-Identifier: Apache-2.0
"""From released tensor names to the model's parameters, each handed to the parameter's own sharding loader."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.utils import is_pp_missing_parameter

from dsv4.checkpoint import validate
from dsv4.errors import CheckpointError
from dsv4.parameters import ExpertTensor, as_stored, expert_tensor, parameter_name

if TYPE_CHECKING:
    from dsv4_vllm.model import DeepseekV4ForCausalLM


def load_weights(model: DeepseekV4ForCausalLM, weights: Iterable[tuple[str, Tensor]], tp_rank: int) -> set[str]:
    """Load every tensor of the backbone; `mtp.*` is left out.

    A local folder is validated by its headers first, so that nothing is loaded from a checkpoint that does not fit its
    config. Returns the names of the loaded parameters. Raises CheckpointError naming what is missing or unknown.
    """
    if Path(model.model_path).is_dir():
        validate(model.model_path, model.v4_config)
    params = dict(model.named_parameters())
    experts = {name: module for name, module in model.named_modules() if isinstance(module, RoutedExperts)}
    loaded: set[str] = set()
    unknown: list[str] = []
    for name, tensor in weights:
        if name.startswith("mtp."):
            continue
        if (expert := expert_tensor(name)) is not None:
            loaded |= _load_expert(experts, expert, tensor)
            continue
        target, shard = parameter_name(name)
        if is_pp_missing_parameter(target, model):
            continue
        if target not in params:
            unknown.append(name)
            continue
        _load(params[target], tensor, shard, tp_rank)
        loaded.add(target)
    missing = sorted(set(params) - loaded)
    if unknown or missing:
        raise CheckpointError(f"{model.model_path}: no parameter for {unknown}, no tensor for {missing}; is the download complete?")
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


def _load_expert(experts: dict[str, RoutedExperts], tensor_of: ExpertTensor, tensor: Tensor) -> set[str]:
    found = next(((name, module) for name, module in experts.items() if name.startswith(tensor_of.layer)), None)
    if found is None:
        return set()  # the layer lives on another pipeline rank
    name, module = found
    suffix = "weight"
    if tensor_of.is_scale:
        suffix = "weight_scale" if hasattr(module, f"{tensor_of.stem}_weight_scale") else "weight_scale_inv"
    param = getattr(module, f"{tensor_of.stem}_{suffix}")
    target = f"{name}.{tensor_of.stem}_{suffix}"
    # False: the expert lives on another expert-parallel rank.
    param.weight_loader(
        param, as_stored(param.dtype, tensor), target, shard_id=tensor_of.linear, expert_id=tensor_of.expert, return_success=True
    )
    return {target}
