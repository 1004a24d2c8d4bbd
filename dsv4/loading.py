# SPDX-License-Identifier: Apache-2.0
"""From released tensors to the parameters of the served model, which both plugins name alike."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from dsv4.errors import CheckpointError, CompatError
from dsv4.model.checkpoint import TensorHeader, check_table, compare
from dsv4.model.config import V4Config
from dsv4.model.tensors import DRAFT_PREFIX, Component, tensor_specs
from dsv4.ops.quant.reference import dequantize_expert, scale_value

# How safetensors spells the dtypes of released tensors.
DTYPES = {
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e8m0fnu: "F8_E8M0", torch.int8: "I8", torch.bfloat16: "BF16",
    torch.float32: "F32", torch.int32: "I32", torch.int64: "I64",
}  # fmt: skip

# Load formats, as both engines call them, whose tensors arrive here one by one, by released names;
# others copy into parameters by themselves, where nobody counts. dummy reads none, and pickled
# files are read by none.
LOAD_FORMATS = ("auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "runai_streamer", "dummy")

# Of those, the ones that read what `validate` looks at.
RELOAD_FORMATS = ("auto", "hf", "safetensors", "fastsafetensors", "instanttensor")

_PLAIN = (torch.float32, torch.bfloat16, torch.float16)

_EXPERT = re.compile(r"^(layers\.\d+\.ffn\.experts)\.(\d+)\.(w[123])\.(weight|scale)$")

_RENAMES: tuple[tuple[str, str], ...] = (
    (r"\.scale$", ".weight_scale_inv"),  # first: the mHC renames below make new names that end in .scale
    (r"^embed\.", "model.embed_tokens."),
    (r"^head\.", "lm_head."),
    (r"^(layers|norm)\.", r"model.\1."),
    (r"^hc_head_", "model.hc_head."),
    (r"\.hc_(attn|ffn|head)_", r".hc_\1."),
    (r"\.gate\.bias$", ".gate.e_score_correction_bias"),
    (r"\.shared_experts\.w2\.", ".shared_experts.down_proj."),
)

# Released tensors that share one fused parameter: pattern, fused name, shard.
_FUSED: tuple[tuple[str, str, int], ...] = (
    (r"\.shared_experts\.w1\.", ".shared_experts.gate_up_proj.", 0),
    (r"\.shared_experts\.w3\.", ".shared_experts.gate_up_proj.", 1),
    (r"\.attn\.compressor\.wkv\.", ".attn.entry_proj.", 0),
    (r"\.attn\.compressor\.wgate\.", ".attn.entry_proj.", 1),
    (r"\.attn\.indexer\.compressor\.wkv\.", ".attn.entry_proj.", 2),
    (r"\.attn\.indexer\.compressor\.wgate\.", ".attn.entry_proj.", 3),
    (r"\.attn\.indexer\.weights_proj\.", ".attn.entry_proj.", 4),
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


class PlainLinear(nn.Module):
    """An engine's linear whose weight is kept in a plain dtype."""

    weight: Tensor


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


def hand_over(params: Mapping[str, nn.Parameter], name: str, tensor: Tensor, tp_rank: int) -> None:
    """Give a released tensor to the loader of the parameter that it is, or is a part of."""
    expert = expert_tensor(name)
    if expert is None:
        target, shard = parameter_name(name)
        tensor = as_stored(params[target].dtype, tensor)
        if target.endswith(".attn_sink"):  # sharded, and in no linear: one logit per head
            heads = params[target].shape[0]
            tensor = tensor if tensor.shape[0] == heads else tensor[tp_rank * heads : (tp_rank + 1) * heads]
        _load(params[target], tensor, shard)
        return
    target = expert_parameter(expert, params)
    param = params[target]
    assert isinstance(param, ShardedParameter)
    param.weight_loader(param, as_stored(param.dtype, tensor), target, shard_id=expert.linear, expert_id=expert.expert)


_GIVEN = "the tensors that are loaded"


def owns_all(parameter: str, expert: ExpertTensor | None) -> bool:
    """Of the only rank there is. See `ReleasedLoader`."""
    return True


class ReleasedLoader:
    """Hands each released tensor of the backbone, or of the draft, to the sharding loader that the
    engine put on its parameter, and knows which are still to come.

    Tensors are counted, not parameters: a fused parameter has several, and is not loaded before the
    last of them. Where a parameter is kept in a plain dtype, a quantised weight waits for its scale
    and is dequantised whole, before it is sharded: what was loaded once can be loaded again.
    """

    def __init__(
        self,
        params: Mapping[str, nn.Parameter],
        config: V4Config,
        tp_rank: int,
        owns: Callable[[str, ExpertTensor | None], bool] = owns_all,
        draft: bool = False,
    ) -> None:
        """params: by the names that `parameter_name` gives, routed experts as `{layer}.w13_weight`

        draft: load the draft instead of the backbone; its blocks are layers after the backbone's

        owns: whether this rank has that parameter and, of a routed expert's, that expert; others
        are another pipeline stage's or expert-parallel rank's
        """
        self.params, self.config, self.tp_rank, self.draft = params, config, tp_rank, draft
        self.specs = {name: s for name, s in tensor_specs(config).items() if s.is_draft is draft}
        self.ours: dict[str, str] = {}  # the parameter of each released tensor that is expected here
        for name in self.specs:
            local = self._as_layer(name)
            expert = expert_tensor(local)
            target = parameter_name(local)[0] if expert is None else expert_parameter(expert, params)
            if owns(target, expert):
                self.ours[name] = target
        self.plain: set[str] = set()  # linears, by released name, whose parameter is kept in a plain dtype
        for linear in [name.removesuffix(".scale") for name in self.ours if name.endswith(".scale")]:
            weight = self.ours[f"{linear}.weight"]
            if self.ours[f"{linear}.scale"] not in params and weight in params and params[weight].dtype in _PLAIN:
                self.plain.add(linear)
                self.ours[f"{linear}.scale"] = weight
        self.given: dict[str, TensorHeader] = {}
        self.waiting: dict[str, Tensor] = {}  # weights and scales whose other half is still to come
        self._check_parameters()

    def _as_layer(self, name: str) -> str:
        """A tensor's name with the draft's blocks numbered on from the backbone's."""
        if not self.draft:
            return name
        _, block, rest = name.split(".", 2)
        return f"layers.{self.config.num_hidden_layers + int(block)}.{rest}"

    def _check_parameters(self) -> None:
        needed = set(self.ours.values())
        for kind, names in (
            ("no parameter for what a checkpoint holds", needed - set(self.params)),
            ("nothing in a checkpoint for", set(self.params) - needed),
        ):
            if names:
                shown = ", ".join(sorted(names)[:8])
                raise CompatError(f"the model has {kind}: {shown} ({len(names)} in all); report this engine's version")

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load what is ours of `weights`, in any order; what is the draft's, or all else, is left
        out.

        Returns the names of the parameters that something was loaded into. A tensor that does not
        fit is not loaded, and `finish` says so. Raises CheckpointError for a hash table that names
        experts which do not exist.
        """
        loaded: set[str] = set()
        for name, tensor in weights:
            if self._admits(name, tensor):
                self._take(name, tensor)
                loaded.add(self.ours[name])
        return loaded

    def load_again(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load any part of a checkpoint over what is loaded; a weight may come before its scale.

        Raises CheckpointError as `finish` does, but not for what is missing; before anything is
        loaded when `weights` is a list.
        """
        self.given = {}
        if isinstance(weights, list):
            self.check(weights)
        loaded = self.load(weights)
        self._compare(set(self.given))
        return loaded

    def check(self, weights: Sequence[tuple[str, Tensor]]) -> None:
        """Raise as `load_again` does, and load nothing."""
        for name, tensor in weights:
            self._admits(name, tensor)
        self._compare(set(self.given))

    def refuse_halves(self) -> None:
        """Raise CheckpointError where a weight waits for its scale, or a scale for its weight."""
        if self.waiting:
            shown = ", ".join(sorted(self.waiting)[:8])
            raise CheckpointError(f"{len(self.waiting)} tensors wait for their weight or scale: {shown}")

    def _admits(self, name: str, tensor: Tensor) -> bool:
        """Whether a tensor is ours and fits; what was given is remembered, but for what is of the
        draft while the backbone is loaded, or the reverse."""
        if name.startswith(DRAFT_PREFIX) is not self.draft:
            return False
        self.given[name] = header = _header(tensor)
        spec = self.specs.get(name)
        if spec is None or not spec.admits(header.shape, header.dtype) or name not in self.ours:
            return False
        if spec.component is Component.TID2EID:
            check_table(_GIVEN, name, int(tensor.min()), int(tensor.max()), self.config)
        return True

    def _compare(self, names: Iterable[str], where: str = _GIVEN) -> None:
        compare(where, self.config, {n: self.specs[n] for n in names if n in self.specs}, self.given)

    def _take(self, name: str, tensor: Tensor) -> None:
        linear, _, kind = name.rpartition(".")
        if linear not in self.plain:
            hand_over(self.params, self._as_layer(name), tensor, self.tp_rank)
            return
        other = self.waiting.pop(f"{linear}.{'scale' if kind == 'weight' else 'weight'}", None)
        if other is None:
            self.waiting[name] = tensor.clone()  # an engine may read the next tensor into the same memory
            return
        weight, scale = (tensor, other) if kind == "weight" else (other, tensor)
        device = self.params[self.ours[name]].device
        if device.type != "meta":  # as it is while vLLM counts what it reloads
            weight, scale = weight.to(device), scale.to(device)
        whole = dequantize_expert(weight, scale)
        hand_over(self.params, self._as_layer(f"{linear}.weight"), whole, self.tp_rank)

    def finish(self, where: str) -> None:
        """Raise CheckpointError, beginning with `where`, unless all that is ours was given, and
        nothing that is no tensor of this model, or has another shape or dtype."""
        self._compare([name for name in self.specs if name in self.ours or name in self.given], where)


def _header(tensor: Tensor) -> TensorHeader:
    return TensorHeader("", DTYPES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape))


def expert_parameter(expert: ExpertTensor, params: Mapping[str, nn.Parameter]) -> str:
    """The parameter that a routed expert's tensor is a part of."""
    weight = f"{expert.layer}.{expert.stem}_weight"
    if not expert.is_scale:
        return weight
    # Engines disagree on the name of MXFP4 scales; block-FP8 ones are _scale_inv in both.
    return f"{weight}_scale" if f"{weight}_scale" in params else f"{weight}_scale_inv"


def _load(param: nn.Parameter, tensor: Tensor, shard: int | None) -> None:
    if not isinstance(param, ShardedParameter):
        param.data.copy_(tensor.view(param.shape))
    elif shard is None:
        param.weight_loader(param, tensor)
    else:
        param.weight_loader(param, tensor, shard)


def checkpoint_folder(model: str) -> Path:
    """Where a checkpoint lies that a server is told to load over its own: a folder, or what the hub
    has under that id. Raises CheckpointError."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(model, allow_patterns=["*.safetensors", "*.json"]))
    except (OSError, HFValidationError) as error:  # the hub's own errors are OSErrors
        line = str(error).splitlines()[0]
        raise CheckpointError(f"{model}: neither a folder here nor a checkpoint of the hub ({line})") from error
