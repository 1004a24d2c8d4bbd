# SPDX-License-Identifier: Apache-2.0
"""config.json of DeepSeek-V4, in any of its shapes, as one frozen `V4Config`.

Two shapes circulate: the released flat one (`compress_ratios`, `num_hash_layers`, `rope_scaling`)
and the one of HF transformers (`layer_types`, `compress_rates`, `mlp_layer_types`, nested
`rope_parameters`). Source: docs/model.md, 1.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal

from dsv4.errors import ConfigError, UnsupportedCheckpointError

ARCHITECTURE = "DeepseekV4ForCausalLM"
MODEL_TYPE = "deepseek_v4"
CSA_RATIO = 4
HCA_RATIO = 128
FP8_BLOCK = 128  # FP8 linears carry one scale per 128 x 128 block
FP4_BLOCK = 32  # FP4 experts carry one scale per row and 32 inputs
DRAFT_STAGES_DSPARK = 3

ExpertDtype = Literal["fp4", "fp8"]
DraftKind = Literal["none", "mtp", "dspark"]


class LayerKind(str, Enum):
    """What a layer's attention sees beside its 128-token window."""

    SWA = "swa"  # nothing
    CSA = "csa"  # the top-k of entries that pool 4 tokens each
    HCA = "hca"  # every entry, each pooling 128 tokens


class Routing(str, Enum):
    """How a layer chooses its experts."""

    HASH = "hash"  # by token id, from the table tid2eid
    TOPK = "topk"  # by score plus bias


FP8_BLOCK = 128  # weights in a row, and in a column, that share a scale
_TOO_LARGE = 2**53  # above it a JSON number is no count, and floats skip integers
_KIND_OF_RATIO = {0: LayerKind.SWA, 1: LayerKind.SWA, CSA_RATIO: LayerKind.CSA, HCA_RATIO: LayerKind.HCA}
_RATIO_OF_KIND = {LayerKind.SWA: 0, LayerKind.CSA: CSA_RATIO, LayerKind.HCA: HCA_RATIO}
_KIND_OF_HF_TYPE = {
    "sliding_attention": LayerKind.SWA,
    "compressed_sparse_attention": LayerKind.CSA,
    "heavily_compressed_attention": LayerKind.HCA,
}
_ROUTING_OF_HF_TYPE = {"hash_moe": Routing.HASH, "moe": Routing.TOPK}


@dataclass(frozen=True)
class LayerSpec:
    """One decoder layer."""

    index: int
    kind: LayerKind
    routing: Routing

    @property
    def compress_ratio(self) -> int:
        """Tokens pooled into one compressed entry: 0 (none), 4 or 128."""
        return _RATIO_OF_KIND[self.kind]

    @property
    def overlap(self) -> int:
        """Windows pooled by one entry: 2 for CSA (its own and the one before), else 1."""
        return 2 if self.kind is LayerKind.CSA else 1


@dataclass(frozen=True)
class Yarn:
    """YaRN parameters of the compressed layers. Source: docs/model.md, 3.3."""

    factor: float
    beta_fast: float
    beta_slow: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class V4Config:
    """Everything the model's mathematics, its checkpoint and its caches depend on. Source: spec
    section 1.1.
    """

    hidden_size: int
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    sliding_window: int
    rope_theta: float
    compress_rope_theta: float
    yarn: Yarn | None
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    n_routed_experts: int
    num_experts_per_tok: int
    n_shared_experts: int
    moe_intermediate_size: int
    routed_scaling_factor: float
    swiglu_limit: float
    hc_mult: int
    hc_sinkhorn_iters: int
    hc_eps: float
    rms_norm_eps: float
    vocab_size: int
    max_position_embeddings: int
    expert_dtype: ExpertDtype
    layers: tuple[LayerSpec, ...]
    draft: DraftKind
    num_draft_layers: int
    dspark_markov_rank: int
    dspark_target_layer_ids: tuple[int, ...]
    dspark_block_size: int
    dspark_noise_token_id: int

    def __hash__(self) -> int:
        """Of a few fields: it is a key of the planner's caches many thousand times a plan."""
        return hash((self.hidden_size, self.n_routed_experts, self.vocab_size, len(self.layers)))

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layers)

    @property
    def draft_in_words(self) -> str:
        """For messages."""
        return {"mtp": "an MTP block", "dspark": "a DSpark draft", "none": "no draft"}[self.draft]

    @property
    def draft_layers(self) -> tuple[LayerSpec, ...]:
        """The draft's blocks, numbered on from the backbone: a window, and experts by score.
        Source: docs/model.md, 3.9 and 3.10.
        """
        first = self.num_hidden_layers
        return tuple(LayerSpec(first + i, LayerKind.SWA, Routing.TOPK) for i in range(self.num_draft_layers))

    @property
    def qk_nope_head_dim(self) -> int:
        return self.head_dim - self.qk_rope_head_dim

    @property
    def heads_per_group(self) -> int:
        """Heads that share one block of wo_a."""
        return self.num_attention_heads // self.o_groups

    def why_not_sharded(self, tp: int) -> str | None:
        """What stands against `tp` tensor-parallel ranks, which split heads, output groups and the
        shared experts' blocks of 128; None when nothing does."""
        shared = self.moe_intermediate_size * self.n_shared_experts
        shares = (
            ("num_attention_heads", self.num_attention_heads),
            ("o_groups", self.o_groups),
            (f"the shared experts' {shared} channels in blocks of {FP8_BLOCK}, thus", max(1, shared // FP8_BLOCK)),
        )
        for what, count in shares:
            if count % tp:
                fits = [n for n in range(1, count + 1) if all(c % n == 0 for _, c in shares)]
                return f"{tp}: {what} {count} is not divisible by it; use one of {fits}"
        return None

    def count(self, kind: LayerKind) -> int:
        """Number of decoder layers of `kind`."""
        return sum(layer.kind is kind for layer in self.layers)

    @staticmethod
    def from_path(path: str | Path) -> V4Config:
        """Read `path`, a config.json or a folder that holds one. Raises ConfigError."""
        file = Path(path)
        file = file / "config.json" if file.is_dir() else file
        try:
            raw = json.loads(file.read_text())
        except OSError as e:
            raise ConfigError(f"{file}: cannot be read ({e.strerror}); is this a checkpoint folder?") from e
        except (ValueError, RecursionError) as e:
            raise ConfigError(f"{file}: not JSON ({str(e)[:200]}); download it again") from e
        return V4Config.from_dict(raw, str(file))

    @staticmethod
    def from_dict(raw: Mapping[str, Any], where: str = "config.json") -> V4Config:
        """Read a config in either shape.

        raw: the parsed JSON, or an HF config object's `to_dict()`. where: named in errors. Raises
        UnsupportedCheckpointError for V4.1, NVFP4, Vision-Exp and other architectures, ConfigError
        otherwise.
        """
        if not isinstance(raw, Mapping):
            raise ConfigError(f"{where}: is a {type(raw).__name__}, not a JSON object; is this a model's config.json?")
        _check_types(raw, where)
        _refuse_other_families(raw, where)
        return _read(raw, where)


_LISTS: dict[str, type] = {
    "architectures": str,
    "compress_ratios": int,
    "layer_types": str,
    "mlp_layer_types": str,
    "dspark_target_layer_ids": int,
}
_OBJECTS = ("quantization_config", "rope_scaling", "rope_parameters", "compress_rates")
_COUNTS = ("num_hash_layers", "num_nextn_predict_layers", "dspark_block_size", "dspark_markov_rank", "vision_n_layers")


def _short(value: Any) -> str:
    """A value as an error shows it."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _check_types(raw: Mapping[str, Any], where: str) -> None:
    """Refuse fields whose JSON type would make the reading below fail without saying where; None
    counts as absent.
    """
    present = {key: value for key, value in raw.items() if value is not None}
    for key, kind in _LISTS.items():
        value = present.get(key, [])
        if not isinstance(value, list | tuple) or any(not isinstance(v, kind) or isinstance(v, bool) for v in value):
            raise ConfigError(
                f"{where}: field {key!r} is {_short(value)}, expected a list of {'words' if kind is str else 'whole numbers'}"
            )
    for key in _OBJECTS:
        if not isinstance(present.get(key, {}), Mapping):
            raise ConfigError(f"{where}: field {key!r} is {_short(present[key])}, expected an object")
    for key in _COUNTS:
        value = present.get(key, 0)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < _TOO_LARGE:
            raise ConfigError(f"{where}: field {key!r} is {_short(value)}, expected a whole number, 0 or more")
    if not isinstance(present.get("model_type", MODEL_TYPE), str):
        raise ConfigError(f"{where}: field 'model_type' is {_short(present['model_type'])}, expected a word")


def _refuse_other_families(raw: Mapping[str, Any], where: str) -> None:
    archs = raw.get("architectures") or []
    arch = archs[0] if archs else ARCHITECTURE
    model_type = raw.get("model_type") or MODEL_TYPE
    if "v41" in model_type.lower() or "v41" in arch.lower().replace("_", "").replace(".", ""):
        raise UnsupportedCheckpointError(
            f"{where}: {arch} is DeepSeek-V4.1, another architecture; dsv4 serves V4-Flash and V4-Pro, use the engine's own V4.1"
        )
    if model_type not in (MODEL_TYPE, "deepseek_mtp") or "DeepseekV4" not in arch.replace("DeepSeek", "Deepseek"):
        raise UnsupportedCheckpointError(
            f"{where}: architecture {arch} (model_type {model_type}) is not DeepSeek-V4; dsv4 serves {ARCHITECTURE} only"
        )
    if (raw.get("vision_n_layers") or 0) > 0:
        raise UnsupportedCheckpointError(
            f"{where}: this is the Vision-Exp checkpoint (vision_n_layers={raw['vision_n_layers']}); its image tokens attend both ways"
            " and route by bias_vl, which dsv4 does not do; use V4-Flash-0731 for text"
        )
    quant = raw.get("quantization_config") or {}
    algo = str(quant.get("moe_quant_algo") or quant.get("quant_algo") or "")
    if "NVFP4" in algo.upper() or "nvfp4" in str(quant.get("quant_method", "")).lower():
        raise UnsupportedCheckpointError(
            f"{where}: routed experts are {algo or 'NVFP4'} (one e4m3 scale per 16), which dsv4 does not read;"
            " use the released FP4 checkpoint deepseek-ai/DeepSeek-V4-Flash or -Pro"
        )


def _need(raw: Mapping[str, Any], key: str, where: str) -> Any:
    if raw.get(key) is None:
        raise ConfigError(f"{where}: field {key!r} is missing; is this a complete DeepSeek-V4 config.json?")
    return raw[key]


def _number(raw: Mapping[str, Any], key: str, where: str) -> Any:
    value = _need(raw, key, where)
    if (
        isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < _TOO_LARGE
    ):  # refuses nan and inf too
        raise ConfigError(f"{where}: field {key!r} is {_short(value)}, expected a positive number")
    return value


def _count(raw: Mapping[str, Any], key: str, where: str) -> int:
    value = _number(raw, key, where)
    if value != int(value):
        raise ConfigError(f"{where}: field {key!r} is {_short(value)}, expected a whole number")
    return int(value)


def _read(raw: Mapping[str, Any], where: str) -> V4Config:
    num_layers = _count(raw, "num_hidden_layers", where)
    kinds, draft_slots = _layer_kinds(raw, num_layers, where)
    routings = _routings(raw, num_layers, where)
    draft, num_draft_layers = _draft(raw, draft_slots)
    ints: dict[str, Any] = {
        key: _count(raw, key, where)
        for key in (
            "hidden_size", "num_attention_heads", "head_dim", "q_lora_rank", "o_groups", "o_lora_rank",
            "sliding_window", "index_n_heads", "index_head_dim", "index_topk", "n_routed_experts",
            "num_experts_per_tok", "n_shared_experts", "moe_intermediate_size", "hc_mult", "hc_sinkhorn_iters",
            "vocab_size", "max_position_embeddings",
        )
    }  # fmt: skip
    floats: dict[str, Any] = {
        key: float(_number(raw, key, where))
        for key in ("routed_scaling_factor", "swiglu_limit", "hc_eps", "rms_norm_eps")
    }
    config = V4Config(
        **ints,
        **floats,
        qk_rope_head_dim=_rope_dim(raw, ints["head_dim"], where),
        rope_theta=float(_number(raw, "rope_theta", where)),
        compress_rope_theta=float(_number(raw, "compress_rope_theta", where)),
        yarn=_yarn(raw, where),
        expert_dtype=_expert_dtype(raw, where),
        layers=tuple(
            LayerSpec(i, kind, routing) for i, (kind, routing) in enumerate(zip(kinds, routings, strict=True))
        ),
        draft=draft,
        num_draft_layers=num_draft_layers,
        dspark_markov_rank=int(raw.get("dspark_markov_rank") or 0),
        dspark_target_layer_ids=tuple(raw.get("dspark_target_layer_ids") or ()),
        dspark_block_size=int(raw.get("dspark_block_size") or 0),
        dspark_noise_token_id=int(raw.get("dspark_noise_token_id") or 0),
    )
    _check(raw, config, where)
    return config


def _layer_kinds(raw: Mapping[str, Any], num_layers: int, where: str) -> tuple[list[LayerKind], int]:
    """Kinds of the backbone layers, and how many draft slots follow them in `compress_ratios`."""
    ratios = raw.get("compress_ratios")
    if ratios is None:
        types = _need(raw, "layer_types", where)
        rates = raw.get("compress_rates") or {}
        for name, ratio in (("compressed_sparse_attention", CSA_RATIO), ("heavily_compressed_attention", HCA_RATIO)):
            if rates.get(name, ratio) != ratio:
                raise ConfigError(f"{where}: compress_rates[{name!r}] is {rates[name]}, dsv4 knows {ratio}")
        unknown = [t for t in types if t not in _KIND_OF_HF_TYPE]
        if unknown or len(types) < num_layers:
            raise ConfigError(
                f"{where}: layer_types has {len(types)} entries, unknown ones {unknown}; need {num_layers} of {sorted(_KIND_OF_HF_TYPE)}"
            )
        return [_KIND_OF_HF_TYPE[t] for t in types[:num_layers]], 0
    if len(ratios) < num_layers:
        raise ConfigError(f"{where}: compress_ratios has {len(ratios)} entries for num_hidden_layers={num_layers}")
    for i, ratio in enumerate(ratios):
        if ratio not in _KIND_OF_RATIO:
            raise ConfigError(
                f"{where}: compress_ratios[{i}] is {_short(ratio)}; dsv4 knows 0 (window), 4 (CSA) and 128 (HCA)"
            )
    return [_KIND_OF_RATIO[r] for r in ratios[:num_layers]], len(ratios) - num_layers


def _routings(raw: Mapping[str, Any], num_layers: int, where: str) -> list[Routing]:
    types = raw.get("mlp_layer_types")
    if types is None:
        num_hash = int(_need(raw, "num_hash_layers", where))
        return [Routing.HASH if i < num_hash else Routing.TOPK for i in range(num_layers)]
    unknown = [t for t in types if t not in _ROUTING_OF_HF_TYPE]
    if unknown or len(types) < num_layers:
        raise ConfigError(
            f"{where}: mlp_layer_types has {len(types)} entries, unknown ones {unknown}; need {num_layers} of {sorted(_ROUTING_OF_HF_TYPE)}"
        )
    return [_ROUTING_OF_HF_TYPE[t] for t in types[:num_layers]]


def _draft(raw: Mapping[str, Any], draft_slots: int) -> tuple[DraftKind, int]:
    # num_nextn_predict_layers still says 1 in DSpark checkpoints: the dspark_* keys decide
    # (docs/model.md, 1.3).
    if raw.get("dspark_block_size"):
        return "dspark", draft_slots or DRAFT_STAGES_DSPARK
    num_mtp = int(raw.get("num_nextn_predict_layers") or 0)
    return ("mtp", num_mtp) if num_mtp else ("none", 0)


def _rope_dim(raw: Mapping[str, Any], head_dim: int, where: str) -> int:
    if raw.get("qk_rope_head_dim") is not None:
        return _count(raw, "qk_rope_head_dim", where)
    return int(head_dim * _number(raw, "partial_rotary_factor", where))


def _yarn(raw: Mapping[str, Any], where: str) -> Yarn | None:
    nested = raw.get("rope_parameters") or {}
    scaling = raw.get("rope_scaling") or nested.get("compress") or nested
    if not isinstance(scaling, Mapping):
        raise ConfigError(f"{where}: rope_parameters['compress'] is {_short(scaling)}, expected an object")
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return None
    if kind != "yarn":
        raise ConfigError(f"{where}: rope_scaling type is {_short(kind)}; dsv4 knows yarn")
    return Yarn(
        factor=float(_number(scaling, "factor", f"{where}: rope_scaling")),
        beta_fast=float(_number(scaling, "beta_fast", f"{where}: rope_scaling")),
        beta_slow=float(_number(scaling, "beta_slow", f"{where}: rope_scaling")),
        original_max_position_embeddings=_count(scaling, "original_max_position_embeddings", f"{where}: rope_scaling"),
    )


def _expert_dtype(raw: Mapping[str, Any], where: str) -> ExpertDtype:
    dtype = raw.get("expert_dtype") or "fp4"  # one early Pro copy lacks the key (docs/model.md, 1.1)
    if dtype == "fp4":
        return "fp4"
    if dtype == "fp8":
        return "fp8"
    raise ConfigError(f"{where}: expert_dtype is {_short(dtype)}; dsv4 knows fp4 and fp8")


def _check(raw: Mapping[str, Any], c: V4Config, where: str) -> None:
    """Refuse what the mathematics assumes and the file contradicts."""
    expected = {
        "scoring_func": "sqrtsoftplus", "topk_method": "noaux_tc", "norm_topk_prob": True,
        "num_key_value_heads": 1, "hidden_act": "silu", "tie_word_embeddings": False,
    }  # fmt: skip
    for key, want in expected.items():
        if raw.get(key, want) != want:
            raise ConfigError(f"{where}: {key} is {_short(raw[key])}, DeepSeek-V4 has {want!r}")
    quant = raw.get("quantization_config") or {}
    if quant and (
        quant.get("quant_method") not in ("fp8", "deepseek_v4_fp8")
        or quant.get("weight_block_size") not in ([FP8_BLOCK] * 2, (FP8_BLOCK,) * 2)
    ):
        raise UnsupportedCheckpointError(
            f"{where}: quantization_config is {quant.get('quant_method')!r} with weight_block_size {quant.get('weight_block_size')};"
            f" dsv4 reads fp8 with [{FP8_BLOCK}, {FP8_BLOCK}]"
        )
    if c.num_attention_heads % c.o_groups:
        raise ConfigError(
            f"{where}: num_attention_heads {c.num_attention_heads} is not a multiple of o_groups {c.o_groups}"
        )
    if c.qk_rope_head_dim >= c.head_dim or c.qk_rope_head_dim % 2:
        raise ConfigError(
            f"{where}: qk_rope_head_dim {c.qk_rope_head_dim} must be even and below head_dim {c.head_dim}"
        )
