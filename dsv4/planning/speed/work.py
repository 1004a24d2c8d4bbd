# SPDX-License-Identifier: Apache-2.0
"""What a decode step and a prefill must do on one rank, as times at the card's own peaks and as
counts: bytes, FLOPs, layers, exchanges. No efficiency is assumed here; `coefficients` holds what
each unit really took in public measurements.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from dsv4.errors import PlanError
from dsv4.machine.hardware import Gpu
from dsv4.model.config import LayerKind, V4Config
from dsv4.model.kv_layout import index_row, kv_row
from dsv4.model.tensors import Component, TensorSpec, tensor_specs
from dsv4.planning.deployment import Deployment
from dsv4.planning.memory.weights import Inventory, inventory, stage_weights

_ALIKE = 0.7  # drafted tokens of one request choose experts alike: of k, only 0.3 k add new ones
_STREAM_BYTES = 8  # per element of the residual streams and layer: two sites read and write bf16
_ATTENDED = 640  # keys of a CSA layer: the window and the selected entries

Features = Mapping[str, float]
DECODE = ("memory", "layers", "layers_arm", "layers_other", "reduces_pcie", "exchanges", "compute", "drafts",
          "prefill_compute", "prefill_rank")  # fmt: skip
PREFILL = ("compute", "index", "attention", "streams", "layers")


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Requests as they come: closed loop, all of one size.

    input_tokens, output_tokens: per request.
    cached: part of the input that the prefix cache holds, 0 to 1.
    concurrency: requests in flight over all replicas.
    accepted: tokens a step yields with a draft, 1 without; random text flatters drafts.
    prefilled_elsewhere: another engine prefills, so that no prefill runs beside a decode step.
    """

    input_tokens: int
    output_tokens: int
    concurrency: float = 1
    cached: float = 0.0
    accepted: float = 1.0
    prefilled_elsewhere: bool = False

    def __post_init__(self) -> None:
        if self.input_tokens < 1 or self.output_tokens < 1:
            raise PlanError("give at least one token of input and one of output", "input")
        if not 0 <= self.cached < 1:
            raise PlanError(f"{self.cached:g}: is the part of the input that is cached; give 0 to 0.99", "cached")

    @property
    def size(self) -> int:
        """Tokens of a request, in and out."""
        return self.input_tokens + self.output_tokens

    @property
    def new_tokens(self) -> float:
        """Input that a prefill computes."""
        return self.input_tokens * (1 - self.cached)

    @property
    def context(self) -> float:
        """Tokens that a decoding request attends to, on average."""
        return self.input_tokens + self.output_tokens / 2


def peaks(gpu: Gpu) -> tuple[float, float, float] | None:
    """Bytes/s of memory, FLOP/s of linears (fp8 where the card has it) and of attention (bf16);
    None where one is not known.
    """
    if not gpu.mem_bw_tb_s or not gpu.bf16_tflops:
        return None
    return gpu.mem_bw_tb_s * 1e12, (gpu.fp8_tflops or gpu.bf16_tflops) * 1e12, gpu.bf16_tflops * 1e12


def decode_work(d: Deployment, traffic: Traffic, batch: float) -> Features:
    """One decode step in the units of DECODE, per accepted token, with the prefills that run
    between two of a request's tokens. batch: requests that decode in one engine; a pipeline splits
    them over its stages.
    """
    gpu, config = d.gpu, d.config
    memory_peak, linear_peak, _ = _known(gpu)
    layers = config.num_hidden_layers
    drafted = d.speculation.num_tokens
    micro = max(batch / d.pp, 1.0)
    tokens = micro * (1 + drafted)
    touched = 1 - (1 - config.num_experts_per_tok / config.n_routed_experts) ** (micro * (1 + drafted * (1 - _ALIKE)))
    weights = stage_weights(config, tp=d.tp, dp=d.dp, ep=d.ep, pp=d.pp, with_draft=False, weights=d.checkpoint.weights)
    embedding = _inventory(d).first.total / d.tp
    read = sum(w.sharded_bytes + w.replicated_bytes + w.experts_bytes * touched for w in weights) - embedding
    read += micro / d.dp * _kv_read_bytes(d, traffic.context)
    native = is_native(gpu)
    prefill = prefill_work(d, traffic)
    others = 0.0 if traffic.prefilled_elsewhere else max(batch - 1, 0.0)
    between = others / traffic.output_tokens  # prefills of others while a request makes one token
    a = traffic.accepted
    return {
        "memory": read / memory_peak / a,
        "layers": layers / a if native else 0.0,
        "layers_arm": layers / a if native and gpu.arch == "aarch64" else 0.0,
        "layers_other": 0.0 if native else layers / a,
        "reduces_pcie": 2 * layers / a if d.tp > 1 and over_pcie(gpu) else 0.0,
        "exchanges": layers / a if d.dp > 1 else 0.0,
        "compute": _flops(d, d.dp) * tokens / linear_peak / a,
        "drafts": drafted / a,
        "prefill_compute": between * _flops(d, d.dp) * traffic.new_tokens / linear_peak,
        "prefill_rank": between * (prefill["streams"] + prefill["attention"]) / d.dp,
    }


def prefill_work(d: Deployment, traffic: Traffic) -> Features:
    """The prefill of one request in the units of PREFILL. Its own TP group computes its linears,
    every rank of a stage its experts; the index scan and the residual streams are repeated on each
    rank of the group.
    """
    gpu, config = d.gpu, d.config
    memory_peak, linear_peak, attention_peak = _known(gpu)
    new, first = traffic.new_tokens, traffic.input_tokens - traffic.new_tokens
    layers = config.num_hidden_layers
    pairs = new * (first + new / 2) / 4  # tokens times the CSA entries that each scores
    scan = pairs * config.index_n_heads * config.index_head_dim * 2 * _count(config, LayerKind.CSA)
    attention = new * _ATTENDED * config.num_attention_heads * config.head_dim * 4 * layers / d.tp
    streams = new * config.hidden_size * config.hc_mult * _STREAM_BYTES * layers
    return {
        "compute": _flops(d, 1) * new / d.pp / linear_peak,
        "index": scan / attention_peak / d.pp,
        "attention": attention / attention_peak / d.pp,
        "streams": streams / memory_peak / d.pp,
        "layers": layers * math.ceil(new / d.max_num_batched_tokens),
    }


def is_native(gpu: Gpu) -> bool:
    """Whether published points of native V4 speak for the card: sm90 and sm100. Elsewhere forks
    served.
    """
    return gpu.platform == "cuda" and gpu.capability[0] in (9, 10)


def over_pcie(gpu: Gpu) -> bool:
    """Whether ranks of a node talk over PCIe."""
    return gpu.fabric.startswith("PCIe")


def _known(gpu: Gpu) -> tuple[float, float, float]:
    found = peaks(gpu)
    if found is None:
        raise PlanError(f"{gpu.id}: its bandwidth or its FLOP/s are not known, so no speed can be estimated", "gpu")
    return found


def _inventory(d: Deployment) -> Inventory:
    return d.checkpoint.weights or inventory(d.config)


@functools.lru_cache(maxsize=64)
def _count(config: V4Config, kind: LayerKind) -> int:
    return sum(layer.kind is kind for layer in config.layers)


def _kv_read_bytes(d: Deployment, context: float) -> float:
    """What attention and the index scan of one request read in a step, all layers."""
    config, row = d.config, kv_row(d.config, d.formats).row_bytes
    keys = context / 4 * index_row(config, d.formats).row_bytes
    csa = keys + min(context / 4, config.index_topk) * row
    window = min(context, config.sliding_window) * row
    return (
        _count(config, LayerKind.CSA) * csa
        + _count(config, LayerKind.HCA) * context / 128 * row
        + config.num_hidden_layers * window
    )


@functools.lru_cache(maxsize=32)
def _active(config: V4Config) -> tuple[float, float, float]:
    """Elements of the matrices that one token passes: in routed experts, in linears that TP cuts,
    and in those that every rank repeats. Source: the tensor inventory; tables and scales multiply
    nothing.
    """
    empty = replace(config, layers=(), draft="none", num_draft_layers=0)
    found = Counter(_matrices(s for s in tensor_specs(empty).values() if s.component is Component.HEAD))
    kinds = {(layer.kind, layer.routing): layer for layer in config.layers}
    counts = Counter((layer.kind, layer.routing) for layer in config.layers)
    for kind, layer in kinds.items():
        specs = tensor_specs(replace(empty, layers=(layer,))).values()
        for place, elements in _matrices(s for s in specs if s.name.startswith("layers.")).items():
            found[place] += counts[kind] * elements
    share = config.num_experts_per_tok / config.n_routed_experts
    return found["experts"] * share, found["sharded"], found["replicated"]


def _matrices(specs: Iterable[TensorSpec]) -> dict[str, int]:
    """Elements by where they are; FP4 holds two in a byte."""
    found: Counter[str] = Counter()
    for s in specs:
        if len(s.shape) == 2 and s.component is not Component.TID2EID and not s.name.endswith("scale"):
            place = "experts" if s.is_routed_expert else "replicated" if s.shard_axis is None else "sharded"
            found[place] += math.prod(s.shape) * (2 if s.dtype == "I8" else 1)
    return found


def _flops(d: Deployment, groups: int) -> float:
    """Of one token's linears on a rank, where `groups` TP groups work on tokens of their own."""
    experts, sharded, replicated = _active(d.config)
    return 2 * (experts / (d.tp * d.dp) + (sharded / d.tp + replicated) / groups)
