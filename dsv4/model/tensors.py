# SPDX-License-Identifier: Apache-2.0
"""Tensors that config.json implies: names, shapes, dtypes, tensor-parallel axes.

Dtypes are spelled as in safetensors. What a folder really holds is `dsv4.model.checkpoint`'s.
Source: docs/model.md, 2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum
from typing import Literal

from dsv4.model.config import FP4_BLOCK, FP8_BLOCK, ExpertDtype, LayerKind, LayerSpec, Routing, V4Config

DRAFT_PREFIX = "mtp."
ITEMSIZE = {"F8_E4M3": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "BF16": 2, "F16": 2, "F32": 4, "I32": 4, "F64": 8, "I64": 8}

ScaleDtype = Literal["F8_E8M0", "F32"]


class Component(str, Enum):
    """What a tensor belongs to, for byte accounting. Every `mtp.*` tensor is MTP."""

    EMBED = "embed"
    HEAD = "head"
    ATTENTION = "attention"
    COMPRESSOR = "compressor"
    INDEXER = "indexer"
    ROUTER = "router"
    TID2EID = "tid2eid"
    ROUTED_EXPERTS = "routed_experts"
    SHARED_EXPERTS = "shared_experts"
    MHC = "mhc"
    NORM = "norm"
    MTP = "mtp"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor that config.json implies.

    shape: as stored (FP4 weights hold two elements per I8). shard_axis: axis split over
    tensor-parallel ranks, None when replicated. alternates: other dtypes a legal checkpoint may
    use; the loader decides by the tensor itself.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    component: Component
    shard_axis: int | None = None
    alternates: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor, unsharded."""
        return math.prod(self.shape) * ITEMSIZE[self.dtype]

    def admits(self, shape: tuple[int, ...], dtype: str) -> bool:
        """Whether a stored tensor of this shape and dtype is legal."""
        return shape == self.shape and dtype in (self.dtype, *self.alternates)

    @property
    def is_draft(self) -> bool:
        """Belongs to the speculative draft, which may be absent or skipped."""
        return self.name.startswith(DRAFT_PREFIX)

    @property
    def is_routed_expert(self) -> bool:
        """Belongs to one routed expert, of the backbone or of the draft (expert parallelism moves
        it whole).
        """
        return ".ffn.experts." in self.name


def tensor_specs(
    config: V4Config, fp8_scale_dtype: ScaleDtype = "F8_E8M0", include_draft: bool = True
) -> dict[str, TensorSpec]:
    """Every tensor of `config`'s checkpoint by name, backbone first, then the draft.

    fp8_scale_dtype: dtype of the block scales when experts are FP8 (Base checkpoints exist with
    either; the released FP4 checkpoints have F8_E8M0 throughout). Source: docs/model.md, 1.3 and
    2.1.
    """
    specs = {spec.name: spec for spec in _backbone(config)}
    if include_draft:
        specs |= {spec.name: spec for spec in _draft(config)}
    if config.expert_dtype == "fp8":
        return {name: _either_scale(spec, fp8_scale_dtype) for name, spec in specs.items()}
    return specs


def _either_scale(spec: TensorSpec, dtype: ScaleDtype) -> TensorSpec:
    if not spec.name.endswith(".scale"):
        return spec
    return replace(spec, dtype=dtype, alternates=("F32" if dtype == "F8_E8M0" else "F8_E8M0",))


def _backbone(c: V4Config) -> Iterator[TensorSpec]:
    yield TensorSpec("embed.weight", (c.vocab_size, c.hidden_size), "BF16", Component.EMBED, 0)
    yield TensorSpec("head.weight", (c.vocab_size, c.hidden_size), "BF16", Component.HEAD, 0)
    yield TensorSpec("norm.weight", (c.hidden_size,), "BF16", Component.NORM)
    yield from _hc_head(c, "")
    for layer in c.layers:
        yield from _block(c, layer, f"layers.{layer.index}.")


def _draft(c: V4Config) -> Iterator[TensorSpec]:
    for stage in range(c.num_draft_layers):
        layer = LayerSpec(c.num_hidden_layers + stage, LayerKind.SWA, Routing.TOPK)
        prefix = f"{DRAFT_PREFIX}{stage}."
        extras = _mtp_extras(c, prefix) if c.draft == "mtp" else _dspark_extras(c, stage, prefix)
        for spec in (*_block(c, layer, prefix), *extras):
            yield replace(spec, component=Component.MTP)


def _mtp_extras(c: V4Config, p: str) -> Iterator[TensorSpec]:
    d = c.hidden_size
    yield from _fp8(p + "e_proj", d, d, Component.MTP)
    yield from _fp8(p + "h_proj", d, d, Component.MTP)
    for norm in ("enorm", "hnorm", "norm"):
        yield TensorSpec(f"{p}{norm}.weight", (d,), "BF16", Component.MTP)
    yield from _hc_head(c, p)


def _dspark_extras(c: V4Config, stage: int, p: str) -> Iterator[TensorSpec]:
    d, rank = c.hidden_size, c.dspark_markov_rank
    if stage == 0:
        yield from _fp8(p + "main_proj", d, d * len(c.dspark_target_layer_ids), Component.MTP)
        yield TensorSpec(p + "main_norm.weight", (d,), "BF16", Component.MTP)
    if stage == c.num_draft_layers - 1:
        yield TensorSpec(p + "norm.weight", (d,), "BF16", Component.MTP)
        yield from _hc_head(c, p)
        yield TensorSpec(p + "markov_head.markov_w1.weight", (c.vocab_size, rank), "BF16", Component.MTP, 0)
        yield TensorSpec(p + "markov_head.markov_w2.weight", (c.vocab_size, rank), "BF16", Component.MTP, 0)
        yield TensorSpec(p + "confidence_head.proj.weight", (1, d + rank), "BF16", Component.MTP)


def _block(c: V4Config, layer: LayerSpec, p: str) -> Iterator[TensorSpec]:
    yield from _attention(c, layer, p + "attn.")
    yield from _ffn(c, layer, p + "ffn.")
    for norm in ("attn_norm", "ffn_norm"):
        yield TensorSpec(f"{p}{norm}.weight", (c.hidden_size,), "BF16", Component.NORM)
    mixes = (2 + c.hc_mult) * c.hc_mult  # pre, post, comb: 24 in V4
    for site in ("hc_attn", "hc_ffn"):
        yield TensorSpec(f"{p}{site}_fn", (mixes, c.hc_mult * c.hidden_size), "F32", Component.MHC)
        yield TensorSpec(f"{p}{site}_base", (mixes,), "F32", Component.MHC)
        yield TensorSpec(f"{p}{site}_scale", (3,), "F32", Component.MHC)


def _attention(c: V4Config, layer: LayerSpec, p: str) -> Iterator[TensorSpec]:
    yield TensorSpec(p + "attn_sink", (c.num_attention_heads,), "F32", Component.ATTENTION, 0)
    yield TensorSpec(p + "q_norm.weight", (c.q_lora_rank,), "BF16", Component.NORM)
    yield TensorSpec(p + "kv_norm.weight", (c.head_dim,), "BF16", Component.NORM)
    o_rank = c.o_groups * c.o_lora_rank
    yield from _fp8(p + "wq_a", c.q_lora_rank, c.hidden_size, Component.ATTENTION)
    yield from _fp8(p + "wq_b", c.num_attention_heads * c.head_dim, c.q_lora_rank, Component.ATTENTION, 0)
    yield from _fp8(p + "wkv", c.head_dim, c.hidden_size, Component.ATTENTION)
    yield from _fp8(p + "wo_a", o_rank, c.heads_per_group * c.head_dim, Component.ATTENTION, 0)
    yield from _fp8(p + "wo_b", c.hidden_size, o_rank, Component.ATTENTION, 1)
    if layer.kind is not LayerKind.SWA:
        yield from _compressor(c, layer, p + "compressor.", c.head_dim, Component.COMPRESSOR)
    if layer.kind is LayerKind.CSA:
        yield from _fp8(p + "indexer.wq_b", c.index_n_heads * c.index_head_dim, c.q_lora_rank, Component.INDEXER)
        yield TensorSpec(p + "indexer.weights_proj.weight", (c.index_n_heads, c.hidden_size), "BF16", Component.INDEXER)
        yield from _compressor(c, layer, p + "indexer.compressor.", c.index_head_dim, Component.INDEXER)


def _compressor(c: V4Config, layer: LayerSpec, p: str, head_dim: int, component: Component) -> Iterator[TensorSpec]:
    width = layer.overlap * head_dim
    for linear in ("wkv", "wgate"):
        yield TensorSpec(f"{p}{linear}.weight", (width, c.hidden_size), "BF16", component)
    yield TensorSpec(p + "ape", (layer.compress_ratio, width), "F32", component)
    yield TensorSpec(p + "norm.weight", (head_dim,), "BF16", Component.NORM)


def _ffn(c: V4Config, layer: LayerSpec, p: str) -> Iterator[TensorSpec]:
    d, i = c.hidden_size, c.moe_intermediate_size
    yield TensorSpec(p + "gate.weight", (c.n_routed_experts, d), "BF16", Component.ROUTER)
    if layer.routing is Routing.HASH:
        yield TensorSpec(
            p + "gate.tid2eid", (c.vocab_size, c.num_experts_per_tok), "I64", Component.TID2EID, None, ("I32",)
        )
    else:
        yield TensorSpec(p + "gate.bias", (c.n_routed_experts,), "F32", Component.ROUTER)
    for name, rows, columns, axis in (("w1", i, d, 0), ("w3", i, d, 0), ("w2", d, i, 1)):
        shared = i * c.n_shared_experts
        shared_rows, shared_columns = (shared, d) if axis == 0 else (d, shared)
        yield from _fp8(f"{p}shared_experts.{name}", shared_rows, shared_columns, Component.SHARED_EXPERTS, axis)
        for expert in range(c.n_routed_experts):
            yield from _routed(f"{p}experts.{expert}.{name}", rows, columns, c.expert_dtype, axis)


def _routed(p: str, rows: int, columns: int, dtype: ExpertDtype, axis: int) -> tuple[TensorSpec, TensorSpec]:
    component = Component.ROUTED_EXPERTS
    if dtype == "fp8":
        return _fp8(p, rows, columns, component, axis)
    return (
        TensorSpec(p + ".weight", (rows, columns // 2), "I8", component, axis),
        TensorSpec(p + ".scale", (rows, -(-columns // FP4_BLOCK)), "F8_E8M0", component, axis),
    )


def _fp8(
    p: str, rows: int, columns: int, component: Component, axis: int | None = None
) -> tuple[TensorSpec, TensorSpec]:
    blocks = (-(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK))
    return (
        TensorSpec(p + ".weight", (rows, columns), "F8_E4M3", component, axis),
        TensorSpec(p + ".scale", blocks, "F8_E8M0", component, axis),
    )


def _hc_head(c: V4Config, p: str) -> Iterator[TensorSpec]:
    component = Component.MTP if p else Component.MHC
    yield TensorSpec(p + "hc_head_fn", (c.hc_mult, c.hc_mult * c.hidden_size), "F32", component)
    yield TensorSpec(p + "hc_head_base", (c.hc_mult,), "F32", component)
    yield TensorSpec(p + "hc_head_scale", (1,), "F32", component)
