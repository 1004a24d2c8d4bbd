# SPDX-License-Identifier: Apache-2.0
"""DeepSeek-V4 wired from SGLang's parallel layers and dsv4's operators. Source: docs/model.md,
3."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.distributed import get_tp_group, tensor_model_parallel_all_reduce
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from sglang.srt.layers.logits_processor import LogitsProcessor
from sglang.srt.layers.moe.fused_moe_triton import FusedMoE
from sglang.srt.layers.moe.topk import StandardTopKOutput
from sglang.srt.layers.quantization.fp8 import Fp8Config
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from sglang.srt.model_executor.forward_context import get_attn_backend
from sglang.srt.runtime_context import get_parallel
from sglang.srt.utils import add_prefix
from torch import Tensor, nn

from dsv4.errors import Dsv4Error
from dsv4.loading import ReleasedLoader
from dsv4.model.config import LayerKind, LayerSpec, Routing, V4Config
from dsv4.model.kv_layout import CacheRole
from dsv4.ops import attention, check, indexer, mhc, moe
from dsv4.ops.compressor.layer import Compressor
from dsv4.ops.compressor.projected import EntryInputs, EntryStep, entry_widths
from dsv4.ops.linear import linear_fp32
from dsv4.ops.mhc.layer import HyperConnection, decoder_step
from dsv4.ops.pages import Selection
from dsv4.ops.plan import EntryPlan, RopeTables, TokenPlan, rope_tables
from dsv4.ops.rope import inv_freq
from dsv4_sglang import released_config
from dsv4_sglang.caches import LayerState, V4Pool
from dsv4_sglang.loading import ON_A_GPU, WITH_A_DRAFT, loader_of
from dsv4_sglang.metadata import V4AttentionBackend
from dsv4_sglang.options import drafted_tokens
from dsv4_sglang.quant import V4QuantConfig, on_cpu
from dsv4_sglang.step import StepMetadata
from dsv4_sglang.warm_up import compile_kernels

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner


class V4Mlp(nn.Module):
    """The shared expert."""

    def __init__(self, config: V4Config, quant: V4QuantConfig | None, prefix: str) -> None:
        super().__init__()
        size = config.moe_intermediate_size * config.n_shared_experts
        self.gate_up_proj = MergedColumnParallelLinear(
            config.hidden_size, [size] * 2, bias=False, quant_config=quant, prefix=add_prefix("gate_up_proj", prefix)
        )
        # Added to the routed experts' output before the one reduction of both.
        self.down_proj = RowParallelLinear(
            size,
            config.hidden_size,
            bias=False,
            reduce_results=False,
            quant_config=quant,
            prefix=add_prefix("down_proj", prefix),
        )
        self.limit = config.swiglu_limit

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x)[0].chunk(2, -1)
        return self.down_proj(moe.swiglu(gate, up, self.limit))[0]


class V4Moe(nn.Module):
    """Routed experts, through SGLang's FusedMoE, and the shared one."""

    def __init__(self, config: V4Config, layer: LayerSpec, quant: V4QuantConfig | None, prefix: str) -> None:
        super().__init__()
        self.top_k, self.scaling_factor = config.num_experts_per_tok, config.routed_scaling_factor
        self.gate = ReplicatedLinear(
            config.hidden_size, config.n_routed_experts, bias=False, prefix=add_prefix("gate", prefix)
        )
        self.gate.tid2eid = self.gate.e_score_correction_bias = None
        if layer.routing is Routing.HASH:
            # Not torch.empty: with --load-format dummy garbage ids would address experts that do
            # not exist.
            table = torch.randint(0, config.n_routed_experts, (config.vocab_size, self.top_k), dtype=torch.int32)
            self.gate.tid2eid = nn.Parameter(table, requires_grad=False)
        else:
            self.gate.e_score_correction_bias = nn.Parameter(
                torch.zeros(config.n_routed_experts, dtype=torch.float32), requires_grad=False
            )
        self.shared_experts = V4Mlp(config, quant, add_prefix("shared_experts", prefix))
        self.experts = FusedMoE(
            num_experts=config.n_routed_experts,
            top_k=config.num_experts_per_tok,
            hidden_size=config.hidden_size,
            intermediate_size=config.moe_intermediate_size,
            layer_id=layer.index,
            reduce_results=False,
            quant_config=quant,
            prefix=add_prefix("experts", prefix),
            swiglu_limit=config.swiglu_limit,  # SGLang's own CPU path ignores it; ours does not
        )
        self.reduce = get_parallel().tp_size > 1

    def forward(self, x: Tensor, input_ids: Tensor) -> Tensor:
        logits = linear_fp32(x, self.gate.weight)
        if self.gate.tid2eid is not None:
            weights, ids = moe.route_hash(logits, self.gate.tid2eid, input_ids, self.scaling_factor)
        else:
            weights, ids = moe.route_topk(logits, self.gate.e_score_correction_bias, self.top_k, self.scaling_factor)
        shared = self.shared_experts(x)  # first: an expert kernel may write its result over x
        out = self.experts(x, StandardTopKOutput(weights, ids, logits)) + shared
        return tensor_model_parallel_all_reduce(out) if self.reduce else out


class V4Indexer(nn.Module):
    """Chooses the entries a CSA query attends. Replicated on every tensor-parallel rank."""

    def __init__(self, config: V4Config, layer: LayerSpec, quant: V4QuantConfig | None, prefix: str) -> None:
        super().__init__()
        self.layer = layer.index
        self.topk, self.num_heads, self.dim = config.index_topk, config.index_n_heads, config.index_head_dim
        self.wq_b = ReplicatedLinear(
            config.q_lora_rank,
            self.num_heads * self.dim,
            bias=False,
            quant_config=quant,
            prefix=add_prefix("wq_b", prefix),
        )
        self.compressor = Compressor(layer, RMSNorm(self.dim, config.rms_norm_eps))
        rank, size = get_parallel().tp_rank, get_parallel().tp_size
        self.ranks = indexer.Ranks.of(rank, size, lambda x: get_tp_group().all_gather(x, dim=0))

    def forward(
        self, weights: Tensor, qr: Tensor, tokens: TokenPlan, plan: EntryPlan, pool: V4Pool, cos_sin: Tensor
    ) -> Selection:
        """The entries that each token attends. weights: [T, Hi] fp32; plan: of the entries, whose
        keys lie on the same pages."""
        caches = pool.layers[self.layer]
        q = self.wq_b(qr)[0].unflatten(-1, (self.num_heads, self.dim))
        query = indexer.prepare_query(q, weights, cos_sin, pool.formats.index)
        keys, entries = plan.table(caches[CacheRole.INDEX_KEY]), plan.table(caches[CacheRole.COMPRESSED])
        return indexer.select(
            query,
            keys,
            entries,
            tokens.request_of_token,
            plan.lens,
            max_entries=plan.max_entries,
            k=self.topk,
            chosen_lens=plan.chosen_lens,
            ranks=self.ranks,
        )


class V4Attention(nn.Module):
    """Window, compressed entries and sink; heads are sharded over tensor-parallel ranks, caches are
    replicated."""

    def __init__(self, config: V4Config, layer: LayerSpec, quant: V4QuantConfig | None, prefix: str) -> None:
        super().__init__()
        tp = get_parallel().tp_size
        self.config, self.layer, self.prefix = config, layer, prefix
        self.num_heads, self.num_groups = config.num_attention_heads // tp, config.o_groups // tp
        eps = config.rms_norm_eps
        self.fused_wqa_wkv = MergedColumnParallelLinear(
            config.hidden_size,
            [config.q_lora_rank, config.head_dim],
            bias=False,
            quant_config=quant,
            prefix=add_prefix("fused_wqa_wkv", prefix),
            parallel_group="replicated",
        )
        self.q_norm = RMSNorm(config.q_lora_rank, eps)
        self.kv_norm = RMSNorm(config.head_dim, eps)
        self.wq_b = ColumnParallelLinear(
            config.q_lora_rank,
            config.num_attention_heads * config.head_dim,
            bias=False,
            quant_config=quant,
            prefix=add_prefix("wq_b", prefix),
        )
        self.attn_sink = nn.Parameter(torch.empty(self.num_heads, dtype=torch.float32), requires_grad=False)
        self.wo_a = ColumnParallelLinear(
            config.heads_per_group * config.head_dim,
            config.o_groups * config.o_lora_rank,
            bias=False,
            quant_config=quant,
            prefix=add_prefix("wo_a", prefix),
        )
        self.wo_b = RowParallelLinear(
            config.o_groups * config.o_lora_rank,
            config.hidden_size,
            bias=False,
            quant_config=quant,
            prefix=add_prefix("wo_b", prefix),
        )
        self.compressor = self.indexer = self.state = self.entry_proj = None
        if layer.kind is not LayerKind.SWA:
            self.state = LayerState(layer)
            self.entry_proj = MergedColumnParallelLinear(
                config.hidden_size,
                entry_widths(config, layer),
                bias=False,
                prefix=add_prefix("entry_proj", prefix),
                parallel_group="replicated",
            )
            self.compressor = Compressor(layer, RMSNorm(config.head_dim, config.rms_norm_eps))
        if layer.kind is LayerKind.CSA:
            self.indexer = V4Indexer(config, layer, quant, add_prefix("indexer", prefix))

    def forward(self, x: Tensor, rope: RopeTables) -> Tensor:
        c = self.config
        qr, kv = self.fused_wqa_wkv(x)[0].split([c.q_lora_rank, c.head_dim], -1)
        qr = self.q_norm(qr.contiguous())
        q = self.wq_b(qr)[0].unflatten(-1, (self.num_heads, c.head_dim))
        o = self._attend(x, qr, q, kv, rope)
        wo_a = self.wo_a.weight.unflatten(0, (self.num_groups, c.o_lora_rank))
        return self.wo_b(attention.output_a(o, None, wo_a))[0]  # `_attend` has rotated back already

    def _attend(self, x: Tensor, qr: Tensor, q: Tensor, kv: Tensor, rope: RopeTables) -> Tensor:
        """Write the caches, select entries, attend and rotate back: [T, H, 512]."""
        backend: V4AttentionBackend = get_attn_backend()
        pool, step = backend.pool, backend.plan
        assert step is not None
        if check.enabled():
            check.enter_layer(self.prefix, step.tokens.request_of_token)
        norm, window = self.kv_norm, pool.layers[self.layer.index][CacheRole.WINDOW]
        table = rope.window if self.layer.kind is LayerKind.SWA else rope.compressed
        q = attention.norm_rope_store(q, kv, norm.weight, norm.variance_epsilon, table, step.window.written(window))
        entries = self._entries(x, qr, step, pool, rope)
        return attention.sparse_attention(q, step.window.read(window), entries, self.attn_sink, table)[0]

    def _entries(self, x: Tensor, qr: Tensor, step: StepMetadata, pool: V4Pool, rope: RopeTables) -> Selection | None:
        """Store the entries that the step completes, and select those that each token attends."""
        if self.compressor is None or self.state is None or self.entry_proj is None:
            return None
        plan = step.entries[self.layer.compress_ratio]
        inputs = EntryInputs.split(linear_fp32(x, self.entry_proj.weight), self.entry_proj.output_sizes)
        assert inputs.kv_gate is not None
        projected = [self.compressor.projected(inputs.kv_gate)]
        if self.indexer is not None and inputs.index_kv_gate is not None:
            projected.append(self.indexer.compressor.projected(inputs.index_kv_gate))
        self.state.pool(projected, self._entry_step(step.tokens, rope), pool, step)
        if self.indexer is None or inputs.index_weights is None:
            return plan.everything(pool.layers[self.layer.index][CacheRole.COMPRESSED], step.tokens)
        return self.indexer(inputs.index_weights, qr, step.tokens, plan, pool, rope.compressed)

    def _entry_step(self, tokens: TokenPlan, rope: RopeTables) -> EntryStep:
        return EntryStep(
            positions=tokens.positions,
            request_of_token=tokens.request_of_token,
            ratio=self.layer.compress_ratio,
            overlap=self.layer.overlap,
            eps=self.config.rms_norm_eps,
            entry_cos_sin=rope.entry[self.layer.compress_ratio],
        )


class V4DecoderLayer(nn.Module):
    def __init__(self, config: V4Config, layer: LayerSpec, quant: V4QuantConfig | None, prefix: str) -> None:
        super().__init__()
        self.name = prefix
        self.attn = V4Attention(config, layer, quant, add_prefix("attn", prefix))
        self.ffn = V4Moe(config, layer, quant, add_prefix("ffn", prefix))
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hc_attn, self.hc_ffn = HyperConnection(config), HyperConnection(config)

    def forward(self, before: Tensor | mhc.PendingPost, rope: RopeTables, input_ids: Tensor) -> mhc.PendingPost:
        """See `decoder_step`."""
        return decoder_step(
            before,
            name=self.name,
            attn_site=self.hc_attn.site(self.attn_norm.weight),
            attn=lambda x: self.attn(x, rope),
            ffn_site=self.hc_ffn.site(self.ffn_norm.weight),
            ffn=lambda x: self.ffn(x, input_ids),
        )


class V4Model(nn.Module):
    window_freq: Tensor
    compressed_freq: Tensor

    def __init__(self, config: V4Config, quant: V4QuantConfig | None, prefix: str) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            V4DecoderLayer(config, layer, quant, add_prefix(f"layers.{layer.index}", prefix)) for layer in config.layers
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hc_head = HyperConnection(config, is_head=True)
        self.register_buffer("window_freq", inv_freq(config, compressed=False), persistent=False)
        self.register_buffer("compressed_freq", inv_freq(config, compressed=True), persistent=False)

    def forward(self, input_ids: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """What the head reads, [T, D], and the streams that it is made of, [T, n, D]."""
        c = self.config
        streams: Tensor | mhc.PendingPost = self.embed_tokens(input_ids)[:, None].repeat(1, c.hc_mult, 1)  # [T, 4, D]
        rope = rope_tables(positions, self.window_freq, self.compressed_freq)
        for layer in self.layers:
            streams = layer(streams, rope, input_ids)
        if isinstance(streams, mhc.PendingPost):
            streams = mhc.post(streams)
        return mhc.head(streams, self.hc_head.site(self.norm.weight)), streams


class DeepseekV4PluginForCausalLM(nn.Module):
    """DeepSeek-V4-Flash and -Pro in SGLang."""

    def __init__(self, config: Any, quant_config: Fp8Config | None = None, prefix: str = "") -> None:
        super().__init__()
        self.config = config
        self.v4_config = released_config.read(config)
        self.quant_config = quant_config and V4QuantConfig.adopt(quant_config, self.v4_config.expert_dtype)
        self.model = V4Model(self.v4_config, self.quant_config, add_prefix("model", prefix))
        self.lm_head = ParallelLMHead(
            self.v4_config.vocab_size, self.v4_config.hidden_size, prefix=add_prefix("lm_head", prefix)
        )
        self.logits_processor = LogitsProcessor(config)
        self.released: ReleasedLoader | None = None  # once all is loaded
        self.has_draft = drafted_tokens() > 0
        reason = WITH_A_DRAFT if self.has_draft else None if on_cpu() else ON_A_GPU
        self._derived_weight_cache_error = reason  # SGLang's name: why no update is taken

    def get_attention_sliding_window_size(self) -> int:
        return self.v4_config.sliding_window

    def get_embed_and_head(self) -> tuple[Tensor, Tensor]:
        """What a draft shares."""
        return self.model.embed_tokens.weight, self.lm_head.weight

    @torch.no_grad()
    def prepare_before_cuda_graph_capture(self, model_runner: ModelRunner) -> None:
        """SGLang calls this once on a GPU, whether it captures graphs or not."""
        compile_kernels(self.v4_config, model_runner)

    @torch.no_grad()
    def forward(
        self, input_ids: Tensor, positions: Tensor, forward_batch: ForwardBatch, input_embeds: Tensor | None = None
    ) -> Any:
        if input_embeds is not None:
            raise Dsv4Error(
                "embeddings as input cannot be routed: V4 chooses the experts of its first layers by token id"
            )
        hidden, streams = self.model(input_ids, positions)
        out = self.logits_processor(
            input_ids,
            hidden,
            self.lm_head,
            forward_batch,
            hidden_states_before_norm=streams.flatten(1) if self.has_draft else None,  # what a draft goes on from
        )
        if out.next_token_logits is not None:
            of_requests = not forward_batch.forward_mode.is_target_verify()
            check.finite("logits", out.next_token_logits, of_requests=of_requests)
        return out

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Every tensor at first, and any part of them from then on. See `ReleasedLoader`."""
        if self.released is not None:
            return self.released.load_again(weights)
        loader = loader_of(self, self.v4_config, get_parallel().tp_rank)
        loaded = loader.load(weights)
        loader.finish(released_config.source(self.config))
        self.released = loader
        return loaded
