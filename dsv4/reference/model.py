# SPDX-License-Identifier: Apache-2.0
"""The whole model on one sequence, without paging: the truth for parity tests.

Attention is written densely from the paper's equations, so that it shares no paging, no slots and
no state cache with the engines' path; the mathematics of single rows comes from the operators'
references. Source: docs/model.md, 3.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import safe_open
from torch import Tensor

from dsv4.model.config import FP8_BLOCK, LayerKind, LayerSpec, Routing, V4Config
from dsv4.model.kv_layout import IndexFormat, KvFormat
from dsv4.ops.attention.reference import output_a
from dsv4.ops.compressor.entry import pool
from dsv4.ops.indexer.query import IndexQuery
from dsv4.ops.indexer.reference import prepare_query, query_values
from dsv4.ops.mhc import Site
from dsv4.ops.mhc import reference as mhc
from dsv4.ops.moe import reference as moe
from dsv4.ops.norm import head_rms_norm, rms_norm
from dsv4.ops.quant.reference import (
    decode_row,
    dequantize_e4m3,
    dequantize_expert,
    dequantize_fp8_block,
    encode_row,
    hadamard,
    quantize_e4m3,
)
from dsv4.ops.rope import apply_rope, cos_sin, inv_freq


@dataclass(frozen=True)
class Quantisation:
    """Which of the official quantisations to simulate; all off gives the plain fp32 model. Source:
    docs/model.md, 4.1.

    kv: window and compressed rows; index: index queries and keys; linear_inputs: e4m3 1x128 at
    every FP8 and FP4 linear.
    """

    kv: KvFormat = KvFormat.PLAIN
    index: IndexFormat = IndexFormat.PLAIN
    linear_inputs: bool = False


M = TypeVar("M", bound="ReferenceModel")


class ReferenceModel:
    """DeepSeek-V4 in fp32 on a CPU, one sequence at a time."""

    def __init__(self, config: V4Config, weights: dict[str, Tensor], quantisation: Quantisation | None = None) -> None:
        """weights: by released names, dequantised to fp32, without their scales (see
        `load_weights`)."""
        self.config = config
        self.weights = weights
        self.quantisation = quantisation or Quantisation()

    @classmethod
    def from_folder(cls: type[M], folder: str | Path, quantisation: Quantisation | None = None) -> M:
        """Read a checkpoint folder in the released format."""
        return cls(V4Config.from_path(folder), load_weights(folder), quantisation)

    def logprobs(self, ids: list[int]) -> Tensor:
        """Log-probabilities of the next token after each position: fp32 [T, V]."""
        return self.logits(ids).log_softmax(-1)

    @torch.inference_mode()
    def logits(self, ids: list[int]) -> Tensor:
        """Logits after each position: fp32 [T, V]."""
        streams = self.streams(ids)[-1]
        return self._head(mhc.head(streams, self._site("hc_head", "norm")))

    @torch.inference_mode()
    def streams(self, ids: list[int]) -> list[Tensor]:
        """Residual streams after each layer, before the head collapses them: fp32 [T, n, D]."""
        tokens = torch.tensor(ids)
        streams, found = self._embed(tokens), []
        for layer in self.config.layers:
            streams = self._layer(layer, streams, tokens)
            found.append(streams)
        return found

    def _embed(self, tokens: Tensor) -> Tensor:
        """Equal streams of the tokens' embeddings: [T, n, D]."""
        return self.weights["embed.weight"][tokens][:, None].repeat(1, self.config.hc_mult, 1)

    def _head(self, hidden: Tensor) -> Tensor:
        return hidden.float() @ self.weights["head.weight"].T

    def _layer(self, layer: LayerSpec, streams: Tensor, tokens: Tensor) -> Tensor:
        return self._block(layer, streams, lambda x: self._attention(layer, x), tokens)

    def _block(
        self, layer: LayerSpec, streams: Tensor, attention: Callable[[Tensor], Tensor], tokens: Tensor
    ) -> Tensor:
        """Both sites of a block. tokens: [T], which hash routing reads."""
        sites = (("attn", attention), ("ffn", lambda x: self._ffn(layer, x, tokens)))
        for site, sublayer in sites:
            prefix = self._prefix(layer)
            at = mhc.pre(streams, self._site(f"{prefix}.hc_{site}", f"{prefix}.{site}_norm"))
            streams = mhc.post(at.pending(sublayer(at.x)))
        return streams

    def _site(self, name: str, norm: str) -> Site:
        c, (fn, base, scale) = self.config, (self.weights[f"{name}_{part}"] for part in ("fn", "base", "scale"))
        weight = self.weights[f"{norm}.weight"]
        return Site(fn, base, scale, weight, rms_eps=c.rms_norm_eps, hc_eps=c.hc_eps, iters=c.hc_sinkhorn_iters)

    def _prefix(self, layer: LayerSpec) -> str:
        """Where a block's weights are: the draft's are numbered on from the backbone's."""
        first = self.config.num_hidden_layers
        return f"layers.{layer.index}" if layer.index < first else f"mtp.{layer.index - first}"

    def _weight(self, layer: LayerSpec, name: str) -> Tensor:
        return self.weights[f"{self._prefix(layer)}.{name}"]

    def _linear(self, layer: LayerSpec, name: str, x: Tensor) -> Tensor:
        """A linear whose released weight is FP8 or FP4; its input is quantised when that is
        switched on."""
        if self.quantisation.linear_inputs:
            x = dequantize_e4m3(*quantize_e4m3(x, min(FP8_BLOCK, x.shape[-1])))
        return x @ self._weight(layer, f"{name}.weight").T

    # ---- attention --------------------------------------------------------------------------

    def _attention(self, layer: LayerSpec, x: Tensor) -> Tensor:
        c = self.config
        t = torch.arange(x.shape[0])
        table = cos_sin(t, inv_freq(c, compressed=layer.kind is not LayerKind.SWA))
        q, qr = self._queries(layer, x, table)
        keys = self._window_rows(layer, x, table)
        visible = (t <= t[:, None]) & (t > t[:, None] - c.sliding_window)
        if layer.kind is not LayerKind.SWA:
            entries = self._compress(layer, x, "attn.compressor", c.head_dim, self.quantisation.kv)
            seen = torch.arange(entries.shape[0]) < ((t + 1) // layer.compress_ratio)[:, None]
            if layer.kind is LayerKind.CSA:
                seen = self._visible_topk(layer, x, qr, table, seen)
            keys, visible = torch.cat([keys, entries]), torch.cat([visible, seen], 1)
        return self._attend(layer, q, keys, visible, table)

    def _queries(self, layer: LayerSpec, x: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated queries [T, H, 512], and what they and the indexer's are projected from."""
        c = self.config
        qr = rms_norm(self._linear(layer, "attn.wq_a", x), self._weight(layer, "attn.q_norm.weight"), c.rms_norm_eps)
        q = self._linear(layer, "attn.wq_b", qr).unflatten(-1, (c.num_attention_heads, c.head_dim))
        return apply_rope(head_rms_norm(q, c.rms_norm_eps), table), qr

    def _window_rows(self, layer: LayerSpec, x: Tensor, table: Tensor) -> Tensor:
        """What the window's cache gives back of x: [T, 512]."""
        kv = self._linear(layer, "attn.wkv", x)
        kv = rms_norm(kv, self._weight(layer, "attn.kv_norm.weight"), self.config.rms_norm_eps)
        return self._stored(apply_rope(kv, table), self.quantisation.kv)

    def _attend(self, layer: LayerSpec, q: Tensor, keys: Tensor, visible: Tensor, table: Tensor) -> Tensor:
        """q over the visible keys, projected back: [T, D]."""
        c = self.config
        o = _softmax_over(q, keys, visible, self._weight(layer, "attn.attn_sink"))
        wo_a = self._weight(layer, "attn.wo_a.weight").unflatten(0, (c.o_groups, c.o_lora_rank))
        return self._linear(layer, "attn.wo_b", output_a(o, table, wo_a))

    def _stored(self, rows: Tensor, row_format: KvFormat | IndexFormat) -> Tensor:
        """What a cache of this format gives back."""
        if row_format in (KvFormat.PLAIN, IndexFormat.PLAIN):
            return rows
        rope = self.config.qk_rope_head_dim
        return decode_row(*encode_row(rows, row_format, rope), row_format, rope)

    def _compress(self, layer: LayerSpec, x: Tensor, name: str, dim: int, row_format: KvFormat | IndexFormat) -> Tensor:
        """Every completed entry of the sequence: [T // m, dim]."""
        m, eps = layer.compress_ratio, self.config.rms_norm_eps
        num_entries = x.shape[0] // m
        x = x[: num_entries * m]
        kv = (x @ self._weight(layer, f"{name}.wkv.weight").T).unflatten(0, (num_entries, m))  # [E, m, overlap * dim]
        score = (x @ self._weight(layer, f"{name}.wgate.weight").T).unflatten(0, (num_entries, m)) + self._weight(
            layer, f"{name}.ape"
        )
        if layer.overlap == 2:
            # Columns A of the window before, then columns B of the entry's own window.
            kv = torch.cat([_shift(kv[..., :dim], 0.0), kv[..., dim:]], 1)
            score = torch.cat([_shift(score[..., :dim], float("-inf")), score[..., dim:]], 1)
        entry = rms_norm(pool(kv, score), self._weight(layer, f"{name}.norm.weight"), eps)
        entry = apply_rope(entry, cos_sin(torch.arange(num_entries) * m, inv_freq(self.config, compressed=True)))
        if row_format in (IndexFormat.FP8, IndexFormat.MXFP4):
            entry = hadamard(entry.bfloat16())
        return self._stored(entry, row_format)

    def _visible_topk(self, layer: LayerSpec, x: Tensor, qr: Tensor, table: Tensor, seen: Tensor) -> Tensor:
        """Of the visible entries, those the indexer selects: bool [T, E]."""
        topk_mask = torch.zeros_like(seen)
        if seen.shape[1]:
            score = self._index_scores(layer, x, qr, table).masked_fill(~seen, float("-inf"))
            order = score.sort(dim=-1, descending=True, stable=True).indices[:, : self.config.index_topk]
            topk_mask.scatter_(1, order, True)
        return topk_mask & seen

    def _index_scores(self, layer: LayerSpec, x: Tensor, qr: Tensor, table: Tensor) -> Tensor:
        """Every token's score of every entry: fp32 [T, E]."""
        query = self._index_query(layer, x, qr, table)
        keys = self._compress(layer, x, "attn.indexer.compressor", self.config.index_head_dim, self.quantisation.index)
        dots = torch.relu(torch.einsum("thd,ed->the", query_values(query), keys))
        return torch.einsum("the,th->te", dots, query.weights)

    def _index_query(self, layer: LayerSpec, x: Tensor, qr: Tensor, table: Tensor) -> IndexQuery:
        c = self.config
        q = self._linear(layer, "attn.indexer.wq_b", qr).unflatten(-1, (c.index_n_heads, c.index_head_dim))
        return prepare_query(
            q, x @ self._weight(layer, "attn.indexer.weights_proj.weight").T, table, self.quantisation.index
        )

    # ---- experts ----------------------------------------------------------------------------

    def _ffn(self, layer: LayerSpec, x: Tensor, tokens: Tensor) -> Tensor:
        c = self.config
        logits = x.float() @ self._weight(layer, "ffn.gate.weight").T
        if layer.routing is Routing.HASH:
            weights, ids = moe.route_hash(
                logits, self._weight(layer, "ffn.gate.tid2eid"), tokens, c.routed_scaling_factor
            )
        else:
            weights, ids = moe.route_topk(
                logits, self._weight(layer, "ffn.gate.bias"), c.num_experts_per_tok, c.routed_scaling_factor
            )
        out = self._expert(layer, "ffn.shared_experts", x).float()
        for e in ids.unique().tolist():
            token, k = (ids == e).nonzero(as_tuple=True)
            y = self._expert(layer, f"ffn.experts.{e}", x[token])
            out.index_add_(0, token, y.float() * weights[token, k, None])
        return out.to(x.dtype)

    def _expert(self, layer: LayerSpec, name: str, x: Tensor) -> Tensor:
        gate, up = self._linear(layer, f"{name}.w1", x), self._linear(layer, f"{name}.w3", x)
        return self._linear(layer, f"{name}.w2", moe.swiglu(gate, up, self.config.swiglu_limit))


def _shift(windows: Tensor, fill: float) -> Tensor:
    """Move every window one place on; the first becomes `fill`."""
    return torch.cat([torch.full_like(windows[:1], fill), windows[:-1]])


def _softmax_over(q: Tensor, keys: Tensor, visible: Tensor, sink: Tensor) -> Tensor:
    """softmax over the visible keys and the sink: q [T, H, D], keys [K, D] (also the values),
    visible [T, K] bool."""
    scores = torch.einsum("thd,kd->htk", q.float(), keys.float()) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~visible, float("-inf"))
    with_sink = torch.cat([scores, sink[:, None, None].expand(-1, q.shape[0], 1)], -1)
    p = with_sink.softmax(-1)[..., :-1]
    return torch.einsum("htk,kd->thd", p, keys.float()).to(q.dtype)


def load_weights(folder: str | Path) -> dict[str, Tensor]:
    """A checkpoint's tensors by released name, dequantised to fp32 and without their scales;
    integers stay as they are."""
    raw: dict[str, Tensor] = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, framework="pt") as shard:
            raw.update({name: shard.get_tensor(name) for name in shard.keys()})  # noqa: SIM118  safe_open is no mapping
    weights = {}
    for name, tensor in raw.items():
        scale = raw.get(name.removesuffix("weight") + "scale") if name.endswith(".weight") else None
        if scale is not None:
            expert = ".experts." in name
            weights[name] = dequantize_expert(tensor, scale) if expert else dequantize_fp8_block(tensor, scale)
        elif not (name.endswith(".scale") and name.removesuffix("scale") + "weight" in raw):
            weights[name] = tensor.float() if tensor.is_floating_point() else tensor
    return weights
