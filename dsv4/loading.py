# SPDX-License-Identifier: Apache-2.0
"""From released tensors to the parameters of the served model, which both plugins name alike."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from dsv4.errors import CheckpointError
from dsv4.ops.quant.reference import scale_value

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


@runtime_checkable
class ShardedParameter(Protocol):
    """A parameter to which an engine gave a loader that keeps this rank's part.

    weight_loader: (parameter, tensor), then the shard of a fused linear; for experts the name, the
    linear and the expert
    """

    weight_loader: Callable[..., object]


class PackedLinear(nn.Module):
    """What the engines' block-FP8 linears have between their creation and
    `process_weights_after_loading`."""

    weight: Tensor
    weight_scale_inv: Tensor
    orig_dtype: torch.dtype
    logical_widths: list[int]
    weight_block_size: list[int]


@dataclass(frozen=True)
class ExpertTensor:
    """A routed expert's tensor. layer: prefix of its layer's experts, `model.layers.3.ffn.experts`;
    linear: w1, w2 or w3."""

    layer: str
    expert: int
    linear: str
    is_scale: bool

    @property
    def stem(self) -> str:
        """The fused parameter it belongs to: w13 (gate rows first) or w2."""
        return "w2" if self.linear == "w2" else "w13"


def expert_tensor(name: str) -> ExpertTensor | None:
    """What a released name says when it is a routed expert's of the backbone, else None."""
    match = _EXPERT.match(name)
    if match is None:
        return None
    prefix, expert, linear, kind = match.groups()
    return ExpertTensor(f"model.{prefix}", int(expert), linear, kind == "scale")


def parameter_name(name: str) -> tuple[str, int | None]:
    """The parameter that a released tensor (other than a routed expert's) loads into, and its shard
    in a fused one."""
    shard = None
    for pattern, fused, index in _FUSED:
        name, hits = re.subn(pattern, fused, name)
        if hits:
            shard = index
            break
    for pattern, new in _RENAMES:
        name = re.sub(pattern, new, name)
    return name, shard


def as_stored(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    """A released tensor as a parameter of `dtype` keeps it: e8m0 scales as bytes or as values,
    never by a numeric cast."""
    if tensor.dtype is torch.float8_e8m0fnu and dtype is torch.uint8:
        return tensor.view(torch.uint8)
    if tensor.dtype is torch.float8_e8m0fnu and dtype is torch.float32:
        return scale_value(tensor)
    return tensor.view(torch.uint8) if tensor.dtype is torch.int8 and dtype is torch.uint8 else tensor


def load_released(
    params: Mapping[str, nn.Parameter],
    weights: Iterable[tuple[str, Tensor]],
    tp_rank: int,
    elsewhere: Callable[[str], bool] = lambda name: False,
) -> set[str]:
    """Hand each released tensor of the backbone to the sharding loader that the engine put on its
    parameter.

    params: by the names that `parameter_name` gives, routed experts as `{layer}.w13_weight`;
    weights: in any order, `mtp.*` is left out; elsewhere: whether another pipeline rank has that
    parameter. Returns the names of the loaded parameters. Raises CheckpointError naming what is
    missing or unknown.
    """
    loaded: set[str] = set()
    unknown: list[str] = []
    for name, tensor in weights:
        if name.startswith("mtp."):
            continue
        expert = expert_tensor(name)
        target, shard = parameter_name(name) if expert is None else (_expert_parameter(expert, params), None)
        if elsewhere(target):
            continue
        if target not in params:
            unknown.append(name)
            continue
        param = params[target]
        tensor = as_stored(param.dtype, tensor)
        if expert is None:
            _load(param, tensor, shard, tp_rank)
        else:  # an expert that lives on another expert-parallel rank is left out by the engine's loader
            assert isinstance(param, ShardedParameter)
            param.weight_loader(param, tensor, target, shard_id=expert.linear, expert_id=expert.expert)
        loaded.add(target)
    missing = sorted(set(params) - loaded)
    if unknown or missing:
        raise CheckpointError(f"no parameter for {unknown}, no tensor for {missing}; is the download complete?")
    return loaded


def _expert_parameter(expert: ExpertTensor, params: Mapping[str, nn.Parameter]) -> str:
    weight = f"{expert.layer}.{expert.stem}_weight"
    if not expert.is_scale:
        return weight
    # Engines disagree on the name of MXFP4 scales; block-FP8 ones are _scale_inv in both.
    return f"{weight}_scale" if f"{weight}_scale" in params else f"{weight}_scale_inv"


def _load(param: nn.Parameter, tensor: Tensor, shard: int | None, tp_rank: int) -> None:
    if not isinstance(param, ShardedParameter):
        if param.shape != tensor.shape and param.dim():
            local = param.shape[0]  # only attn_sink is sharded and belongs to no linear: one logit per head
            tensor = tensor[tp_rank * local : (tp_rank + 1) * local]
        param.data.copy_(tensor.view(param.shape))
    elif shard is None:
        param.weight_loader(param, tensor)
    else:
        param.weight_loader(param, tensor, shard)
