# SPDX-License-Identifier: Apache-2.0
"""From released tensor names to the model's parameters, each handed to the parameter's own sharding loader."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.utils import is_pp_missing_parameter

from dsv4.checkpoint import validate
from dsv4.errors import CheckpointError
from dsv4.ops.quant.reference import scale_value

if TYPE_CHECKING:
    from dsv4_vllm.model import DeepseekV4ForCausalLM

_EXPERT = re.compile(r"^(layers\.\d+\.ffn\.experts)\.(\d+)\.(w[123])\.(weight|scale)$")

_RENAMES: tuple[tuple[str, str], ...] = (
    (r"\.scale$", ".weight_scale_inv"),  # first: the mHC renames below make new names that end in .scale
    (r"^embed\.", "model.embed_tokens."),
    (r"^head\.", "lm_head."),
    (r"^(layers|norm)\.", r"model.\1."),
    (r"^hc_head_", "model.hc_head."),
    (r"\.hc_(attn|ffn)_", r".hc_\1."),
    (r"\.gate\.bias$", ".gate.e_score_correction_bias"),
    (r"\.shared_experts\.w2\.", ".shared_experts.down_proj."),
)

# Released tensors that share one fused parameter: pattern, fused name, shard.
_FUSED: tuple[tuple[str, str, int], ...] = (
    (r"\.shared_experts\.w1\.", ".shared_experts.gate_up_proj.", 0),
    (r"\.shared_experts\.w3\.", ".shared_experts.gate_up_proj.", 1),
    (r"\.compressor\.wkv\.", ".compressor.fused_wkv_wgate.", 0),
    (r"\.compressor\.wgate\.", ".compressor.fused_wkv_wgate.", 1),
    (r"\.attn\.wq_a\.", ".attn.fused_wqa_wkv.", 0),
    (r"\.attn\.wkv\.", ".attn.fused_wqa_wkv.", 1),
)


def parameter_name(name: str) -> tuple[str, int | None]:
    """The parameter that a released tensor (other than a routed expert's) loads into, and its shard in a fused one."""
    shard = None
    for pattern, fused, index in _FUSED:
        name, hits = re.subn(pattern, fused, name)
        if hits:
            shard = index
            break
    for pattern, new in _RENAMES:
        name = re.sub(pattern, new, name)
    return name, shard


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
        if match := _EXPERT.match(name):
            loaded |= _load_expert(model, experts, match, tensor)
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
    tensor = _as_stored(param, tensor)
    loader = getattr(param, "weight_loader", default_weight_loader)
    if shard is not None:
        loader(param, tensor, shard)
    elif loader is default_weight_loader and param.shape != tensor.shape:
        local = param.shape[0]  # only attn_sink is sharded and belongs to no linear: one logit per head
        loader(param, tensor[tp_rank * local : (tp_rank + 1) * local])
    else:
        loader(param, tensor)


def _as_stored(param: nn.Parameter, tensor: Tensor) -> Tensor:
    """e8m0 scales as the parameter keeps them: their bytes in uint8, their values in fp32, never a numeric cast."""
    if tensor.dtype is torch.float8_e8m0fnu and param.dtype is torch.uint8:
        return tensor.view(torch.uint8)
    if tensor.dtype is torch.float8_e8m0fnu and param.dtype is torch.float32:
        return scale_value(tensor)
    return tensor.view(torch.uint8) if tensor.dtype is torch.int8 and param.dtype is torch.uint8 else tensor


def _load_expert(model: DeepseekV4ForCausalLM, experts: dict[str, RoutedExperts], match: re.Match[str], tensor: Tensor) -> set[str]:
    prefix, expert, linear, kind = match.groups()
    found = next(((name, module) for name, module in experts.items() if name.startswith(f"model.{prefix}")), None)
    if found is None:
        return set()  # the layer lives on another pipeline rank
    name, module = found
    stem = "w2" if linear == "w2" else "w13"
    suffix = "weight"
    if kind == "scale":
        suffix = "weight_scale" if hasattr(module, f"{stem}_weight_scale") else "weight_scale_inv"
    param = getattr(module, f"{stem}_{suffix}")
    target = f"{name}.{stem}_{suffix}"
    # False: the expert lives on another expert-parallel rank.
    param.weight_loader(param, _as_stored(param, tensor), target, shard_id=linear, expert_id=int(expert), return_success=True)
    return {target}
