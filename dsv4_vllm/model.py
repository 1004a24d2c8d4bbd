# SPDX-License-Identifier: Apache-2.0
"""DeepSeek-V4 wired from vLLM's parallel layers and dsv4's operators. Source: docs/model.md, 3."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from vllm.compilation.breakable_cudagraph import eager_break_during_capture, is_breakable_cudagraph_enabled
from vllm.config import VllmConfig
from vllm.distributed import (
    get_pp_group,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    get_tp_group,
)
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.fused_moe import FusedMoEFactory
from vllm.model_executor.layers.fused_moe.router.gate_linear import GateLinear
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import EagleModelMixin, SupportsEagle3, SupportsPP
from vllm.model_executor.models.utils import PPMissingLayer, make_layers, maybe_prefix
from vllm.model_executor.warmup.jit_warmup import JitWarmupRegistry
from vllm.platforms import current_platform
from vllm.sequence import IntermediateTensors

from dsv4.errors import CompatError, DeploymentError
from dsv4.loading import ReleasedLoader
from dsv4.model.config import LayerKind, LayerSpec, Routing, V4Config
from dsv4.model.kv_layout import CacheRole
from dsv4.ops import attention, check, indexer, mhc, moe
from dsv4.ops.compressor.layer import Compressor
from dsv4.ops.compressor.projected import EntryInputs, EntryStep, entry_widths
from dsv4.ops.linear import linear_fp32
from dsv4.ops.mhc.layer import HyperConnection, decoder_step
from dsv4.ops.pages import PageTable, Selection
from dsv4.ops.plan import EntryPlan, RopeTables, TokenPlan, rope_tables
from dsv4.ops.rope import inv_freq
from dsv4_vllm.caches import V4Cache, layer_caches
from dsv4_vllm.loading import load_weights, loader_of
from dsv4_vllm.metadata import WindowMetadata
from dsv4_vllm.options import cache_formats, draft_method
from dsv4_vllm.quant import V4Router
from dsv4_vllm.rehearsal import stage
from dsv4_vllm.support import check_deployment
from dsv4_vllm.warm_up import KernelWarmUp

logger = logging.getLogger(__name__)


class V4Mlp(nn.Module):
    """The shared expert."""

    def __init__(self, config: V4Config, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        size = config.moe_intermediate_size * config.n_shared_experts
        quant = vllm_config.quant_config
        self.gate_up_proj = MergedColumnParallelLinear(
            config.hidden_size, [size] * 2, bias=False, quant_config=quant, prefix=f"{prefix}.gate_up_proj"
        )
        # FusedMoE adds this output to the routed experts' and reduces once.
        self.down_proj = RowParallelLinear(
            size, config.hidden_size, bias=False, quant_config=quant, reduce_results=False, prefix=f"{prefix}.down_proj"
        )
        self.limit = config.swiglu_limit

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x)[0].chunk(2, -1)
        return self.down_proj(moe.swiglu(gate, up, self.limit))[0]


class V4Moe(nn.Module):
    """Routed experts and the shared one, through vLLM's FusedMoE."""

    def __init__(self, config: V4Config, layer: LayerSpec, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.gate = GateLinear(
            config.hidden_size, config.n_routed_experts, out_dtype=torch.float32, prefix=f"{prefix}.gate"
        )
        self.gate.tid2eid = self.gate.e_score_correction_bias = None
        if layer.routing is Routing.HASH:
            # Not torch.empty: with --load-format dummy garbage ids would address experts that do
            # not exist.
            table = torch.randint(
                0, config.n_routed_experts, (config.vocab_size, config.num_experts_per_tok), dtype=torch.int32
            )
            self.gate.tid2eid = nn.Parameter(table, requires_grad=False)
        else:
            self.gate.e_score_correction_bias = nn.Parameter(
                torch.zeros(config.n_routed_experts, dtype=torch.float32), requires_grad=False
            )
        self.shared_experts = V4Mlp(config, vllm_config, f"{prefix}.shared_experts")
        router = (
            V4Router(config, self.gate.e_score_correction_bias, self.gate.tid2eid)
            if current_platform.is_cpu()
            else None
        )
        self.experts = FusedMoEFactory(
            num_experts=config.n_routed_experts,
            top_k=config.num_experts_per_tok,
            hidden_size=config.hidden_size,
            intermediate_size=config.moe_intermediate_size,
            renormalize=True,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.experts",
            ckpt_names=("w1", "w2", "w3"),
            scoring_func="sqrtsoftplus",
            routed_scaling_factor=config.routed_scaling_factor,
            e_score_correction_bias=self.gate.e_score_correction_bias,
            hash_indices_table=self.gate.tid2eid,
            swiglu_limit=config.swiglu_limit,
            router_logits_dtype=torch.float32,
            router=router,
            gate=self.gate,
            shared_experts=self.shared_experts,
        )

    def forward(self, x: Tensor, input_ids: Tensor | None) -> Tensor:
        return self.experts(hidden_states=x, router_logits=x, input_ids=input_ids)


class V4Indexer(nn.Module):
    """Chooses the entries a CSA query attends. Replicated on every tensor-parallel rank."""

    def __init__(self, config: V4Config, layer: LayerSpec, vllm_config: VllmConfig, prefix: str, keys: V4Cache) -> None:
        super().__init__()
        self.topk, self.num_heads, self.dim = config.index_topk, config.index_n_heads, config.index_head_dim
        self.wq_b = ReplicatedLinear(
            config.q_lora_rank,
            self.num_heads * self.dim,
            bias=False,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.wq_b",
        )
        self.compressor = Compressor(layer, RMSNorm(self.dim, config.rms_norm_eps))
        self.keys = keys
        tp = get_tp_group()
        self.ranks = indexer.Ranks.of(tp.rank_in_group, tp.world_size, lambda x: tp.all_gather(x, dim=0))

    def forward(
        self, inputs: IndexInputs, tokens: TokenPlan, plan: EntryPlan, entries: PageTable, cos_sin: Tensor
    ) -> Selection:
        """plan: of the index keys; entries: what is selected."""
        query = indexer.prepare_query(inputs.q, inputs.weights, cos_sin, self.keys.formats.index)
        keys = plan.table(self.keys.pages)
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


@dataclass(frozen=True)
class IndexInputs:
    """q: [T, Hi, 128]; weights: [T, Hi] fp32; kv_gate: [T, 2 * overlap * 128] fp32, what the index
    keys are pooled from."""

    q: Tensor
    weights: Tensor
    kv_gate: Tensor

    def first(self, n: int) -> IndexInputs:
        """Of the first n tokens."""
        return IndexInputs(self.q[:n], self.weights[:n], self.kv_gate[:n])


@dataclass(frozen=True)
class LayerInputs:
    """What one layer's attention reads of a step.

    q: [T, H, 512]; kv: [T, 512]
    kv_gate: [T, 2 * overlap * 512] fp32, what entries are pooled from; None in window-only layers
    index: in CSA layers
    table: [T, rope_dim] fp32, cosines and sines at the tokens' positions, of the layer's kind
    entry_table: the same at the first position of the entry that each token belongs to; None in
    window-only layers
    """

    q: Tensor
    kv: Tensor
    kv_gate: Tensor | None
    index: IndexInputs | None
    table: Tensor
    entry_table: Tensor | None

    def first(self, n: int) -> LayerInputs:
        """Of the first n tokens."""
        kv_gate = None if self.kv_gate is None else self.kv_gate[:n]
        index = None if self.index is None else self.index.first(n)
        entry_table = None if self.entry_table is None else self.entry_table[:n]
        return LayerInputs(self.q[:n], self.kv[:n], kv_gate, index, self.table[:n], entry_table)


class V4Attention(nn.Module):
    """Window, compressed entries and sink; heads are sharded over tensor-parallel ranks, caches are
    replicated."""

    def __init__(self, config: V4Config, layer: LayerSpec, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        tp = get_tensor_model_parallel_world_size()
        self.config, self.layer, self.prefix = config, layer, prefix
        self.num_heads, self.num_groups = config.num_attention_heads // tp, config.o_groups // tp
        quant, eps = vllm_config.quant_config, config.rms_norm_eps
        self.fused_wqa_wkv = MergedColumnParallelLinear(
            config.hidden_size,
            [config.q_lora_rank, config.head_dim],
            bias=False,
            quant_config=quant,
            disable_tp=True,
            prefix=f"{prefix}.fused_wqa_wkv",
        )
        self.q_norm = RMSNorm(config.q_lora_rank, eps)
        self.kv_norm = RMSNorm(config.head_dim, eps)
        self.wq_b = ColumnParallelLinear(
            config.q_lora_rank,
            config.num_attention_heads * config.head_dim,
            bias=False,
            quant_config=quant,
            prefix=f"{prefix}.wq_b",
        )
        self.attn_sink = nn.Parameter(torch.empty(self.num_heads, dtype=torch.float32), requires_grad=False)
        self.wo_a = ColumnParallelLinear(
            config.heads_per_group * config.head_dim,
            config.o_groups * config.o_lora_rank,
            bias=False,
            quant_config=quant,
            prefix=f"{prefix}.wo_a",
        )
        self.wo_b = RowParallelLinear(
            config.o_groups * config.o_lora_rank,
            config.hidden_size,
            bias=False,
            quant_config=quant,
            prefix=f"{prefix}.wo_b",
        )
        self.caches = layer_caches(config, layer, vllm_config, prefix)
        caches = self.caches.by_role
        self.max_model_len = vllm_config.model_config.max_model_len
        self.window = caches[CacheRole.WINDOW]
        self.compressor = self.indexer = self.entries = self.state = self.entry_proj = None
        if layer.kind is not LayerKind.SWA:
            self.entries = caches[CacheRole.COMPRESSED]
            self.entry_proj = MergedColumnParallelLinear(
                config.hidden_size,
                entry_widths(config, layer),
                bias=False,
                quant_config=None,
                disable_tp=True,
                prefix=f"{prefix}.entry_proj",
            )
            self.compressor = Compressor(layer, RMSNorm(config.head_dim, config.rms_norm_eps))
            self.state = self.caches.state(layer.overlap)
        if layer.kind is LayerKind.CSA:
            self.indexer = V4Indexer(config, layer, vllm_config, f"{prefix}.indexer", caches[CacheRole.INDEX_KEY])

        # Here and not at the class: vLLM 0.32 leaves the function as it is unless its variable was
        # set before, which the engine does long after it has imported plugins.
        self.attend = eager_break_during_capture(self._attend_in_step)

    def forward(self, x: Tensor, rope: RopeTables) -> Tensor:
        c = self.config
        qr, kv = self.fused_wqa_wkv(x)[0].split([c.q_lora_rank, c.head_dim], -1)
        qr = self.q_norm(qr)
        q = self.wq_b(qr)[0].unflatten(-1, (self.num_heads, c.head_dim))
        kv_gate, index_kv_gate, index_weights = self.project(x)
        index_q = None
        if self.indexer is not None:
            index_q = self.indexer.wq_b(qr)[0].unflatten(-1, (c.index_n_heads, c.index_head_dim))
        o = torch.empty_like(q)
        self.attend(
            q=q,
            kv=kv,
            kv_gate=kv_gate,
            index_q=index_q,
            index_weights=index_weights,
            index_kv_gate=index_kv_gate,
            table=rope.window if self.layer.kind is LayerKind.SWA else rope.compressed,
            entry_table=rope.entry.get(self.layer.compress_ratio),
            out=o,
        )
        wo_a = self.wo_a.weight.unflatten(0, (self.num_groups, c.o_lora_rank))
        return self.wo_b(attention.output_a(o, None, wo_a))[0]  # `attend` has rotated back already

    def project(self, x: Tensor) -> EntryInputs:
        """Of a layer's input, in one product."""
        if self.entry_proj is None:
            return EntryInputs()
        return EntryInputs.split(linear_fp32(x, self.entry_proj.weight), self.entry_proj.output_sizes)

    def _attend_in_step(
        self,
        *,
        q: Tensor,
        kv: Tensor,
        kv_gate: Tensor | None,
        index_q: Tensor | None,
        index_weights: Tensor | None,
        index_kv_gate: Tensor | None,
        table: Tensor,
        entry_table: Tensor | None,
        out: Tensor,
    ) -> None:
        """Attend as `_attend` does; the result goes to `out` [T, H, 512].

        `attend` is this, run eagerly between the captured graph segments of mixed batches, so that
        it reads the step's own metadata. Arguments are tensors: vLLM holds on to a container, and
        with it to the graph's memory.
        """
        index = None
        if index_q is not None and index_weights is not None and index_kv_gate is not None:
            index = IndexInputs(index_q, index_weights, index_kv_gate)
        inputs = LayerInputs(q, kv, kv_gate, index, table, entry_table)
        metadata = get_forward_context().attn_metadata
        if not isinstance(metadata, dict):  # a profile or warm-up run
            self._rehearse(inputs, out)
            out.zero_()
            return
        step: WindowMetadata = metadata[self.window.prefix]
        n = step.window.slot_mapping.shape[0]
        self._attend(inputs.first(n), step, metadata, out[:n])
        out[n:].zero_()

    def _rehearse(self, inputs: LayerInputs, out: Tensor) -> None:
        """Take the memory of a step during vLLM's memory profile; the KV pool gets what is left. A
        CPU's pool does not depend on it."""
        if inputs.q.device.type != "cpu":
            self.attend_padding(inputs, out)

    def attend_padding(self, inputs: LayerInputs, out: Tensor) -> None:
        """Attend as in a step whose tokens are all padding."""
        with stage(self.caches.by_role, inputs.q.shape[0], self.max_model_len, inputs.q.device) as metadata:
            self._attend(inputs, metadata[self.window.prefix], metadata, out)

    def _attend(self, inputs: LayerInputs, step: WindowMetadata, metadata: dict[str, Any], out: Tensor) -> None:
        """Write the caches, select entries, attend and rotate back, into `out` [T, H, 512]."""
        if check.enabled():
            check.enter_layer(self.prefix, step.tokens.request_of_token)
        norm, window, table = self.kv_norm, self.window.pages, inputs.table
        q = attention.norm_rope_store(
            inputs.q, inputs.kv, norm.weight, norm.variance_epsilon, table, step.window.written(window)
        )
        entries = self._entries(inputs, step.tokens, metadata)
        attention.sparse_attention(q, step.window.read(window), entries, self.attn_sink, table, out=out)

    def _entries(self, inputs: LayerInputs, tokens: TokenPlan, metadata: dict[str, Any]) -> Selection | None:
        """Store the entries that the step completes, and select those that each token attends."""
        if self.compressor is None or self.entries is None or self.state is None:
            return None
        assert inputs.kv_gate is not None
        assert inputs.entry_table is not None
        projected = [self.compressor.projected(inputs.kv_gate)]
        if self.indexer is not None and inputs.index is not None:
            projected.append(self.indexer.compressor.projected(inputs.index.kv_gate))
        self.state.pool(projected, self._entry_step(tokens, inputs.entry_table), metadata)
        plan: EntryPlan = metadata[self.entries.prefix]
        if self.indexer is None or inputs.index is None:
            return plan.everything(self.entries.pages, tokens)
        keys: EntryPlan = metadata[self.indexer.keys.prefix]
        return self.indexer(inputs.index, tokens, keys, plan.table(self.entries.pages), inputs.table)

    def _entry_step(self, tokens: TokenPlan, entry_table: Tensor) -> EntryStep:
        return EntryStep(
            positions=tokens.positions,
            request_of_token=tokens.request_of_token,
            ratio=self.layer.compress_ratio,
            overlap=self.layer.overlap,
            eps=self.config.rms_norm_eps,
            entry_cos_sin=entry_table,
        )


class V4DecoderLayer(nn.Module):
    def __init__(self, config: V4Config, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        layer = (*config.layers, *config.draft_layers)[int(prefix.rsplit(".", 1)[1])]
        self.name = prefix
        self.attn = V4Attention(config, layer, vllm_config, f"{prefix}.attn")
        self.ffn = V4Moe(config, layer, vllm_config, f"{prefix}.ffn")
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hc_attn, self.hc_ffn = HyperConnection(config), HyperConnection(config)

    def forward(self, before: Tensor | mhc.PendingPost, rope: RopeTables, input_ids: Tensor | None) -> mhc.PendingPost:
        """See `decoder_step`."""
        return decoder_step(
            before,
            name=self.name,
            attn_site=self.hc_attn.site(self.attn_norm.weight),
            attn=lambda x: self.attn(x, rope),
            ffn_site=self.hc_ffn.site(self.ffn_norm.weight),
            ffn=lambda x: self.ffn(x, input_ids),
        )


class V4Model(nn.Module, EagleModelMixin):
    """The backbone.

    aux_hidden_state_layers: whose output a DSpark draft reads, counted from 1; vLLM's mixin sets it
    """

    aux_hidden_state_layers: tuple[int, ...]
    window_freq: Tensor
    compressed_freq: Tensor

    def __init__(self, config: V4Config, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.config = config
        first, last = get_pp_group().is_first_rank, get_pp_group().is_last_rank
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size) if first else PPMissingLayer()
        self.start_layer, self.end_layer, self.layers = make_layers(
            config.num_hidden_layers,
            lambda prefix: V4DecoderLayer(config, vllm_config, prefix),
            prefix=f"{prefix}.layers",
        )
        self.streams = None  # [max_num_batched_tokens, 4 * D], what an MTP draft goes on from
        if last and draft_method(vllm_config) == "mtp":
            rows, width = vllm_config.scheduler_config.max_num_batched_tokens, config.hc_mult * config.hidden_size
            self.streams = torch.zeros(
                rows, width, dtype=vllm_config.model_config.dtype, device=vllm_config.device_config.device
            )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps) if last else PPMissingLayer()
        self.hc_head = HyperConnection(config, is_head=True) if last else PPMissingLayer()
        device = vllm_config.device_config.device
        self.register_buffer("window_freq", inv_freq(config, compressed=False, device=device), persistent=False)
        self.register_buffer("compressed_freq", inv_freq(config, compressed=True, device=device), persistent=False)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate: IntermediateTensors | None,
        inputs_embeds: Tensor | None,
    ) -> Tensor | tuple[Tensor, list[Tensor]] | IntermediateTensors:
        c = self.config
        if get_pp_group().is_first_rank:
            x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
            streams = x[:, None].repeat(1, c.hc_mult, 1)  # [T, 4, D]
        else:
            assert intermediate is not None
            streams = intermediate["hidden_states"].unflatten(-1, (c.hc_mult, c.hidden_size))
            input_ids = intermediate["input_ids"] if self.routes_by_id(self.start_layer) else None
        rope = rope_tables(positions, self.window_freq, self.compressed_freq)
        outputs = []  # what DSpark reads; the streams go on as without it
        for number, layer in enumerate(islice(self.layers, self.start_layer, self.end_layer), self.start_layer + 1):
            streams = layer(streams, rope, input_ids)
            if number in self.aux_hidden_state_layers:
                outputs.append(mhc.post(streams).mean(1))
        if isinstance(streams, mhc.PendingPost):
            streams = mhc.post(streams)
        if not get_pp_group().is_last_rank:
            handed = {"hidden_states": streams.flatten(1)}
            if self.routes_by_id(self.end_layer):
                assert input_ids is not None
                handed["input_ids"] = input_ids.int()
            return IntermediateTensors(handed)
        if self.streams is not None:
            self.streams[: streams.shape[0]] = streams.flatten(1)
        hidden = mhc.head(streams, self.hc_head.site(self.norm.weight))
        return (hidden, outputs) if outputs else hidden

    def routes_by_id(self, first: int) -> bool:
        """Whether a layer from `first` on chooses experts by token id.

        Model runner V2 gives ids to the first stage alone, so that stages hand them on.
        """
        return any(layer.routing is Routing.HASH for layer in self.config.layers[first:])


def check_breaks(model: nn.Module) -> None:
    """Raise CompatError where vLLM breaks graphs at attention and would capture ours whole.

    A captured attention repeats the batch that was captured, in every later step, without a word.
    """
    layers = [m for m in model.modules() if isinstance(m, V4Attention)]
    whole = [m.prefix for m in layers if not hasattr(m.attend, "__wrapped__")]
    if is_breakable_cudagraph_enabled() and whole:
        raise CompatError(
            f"{len(whole)} of {len(layers)} attention layers would be captured with the batch of the capture, although"
            " VLLM_USE_BREAKABLE_CUDAGRAPH is on: import nothing of dsv4_vllm before the engine is configured, or start"
            " with --enforce-eager"
        )


class DeepseekV4ForCausalLM(nn.Module, SupportsPP, SupportsEagle3):
    """DeepSeek-V4-Flash and -Pro in vLLM."""

    packed_modules_mapping: ClassVar = {
        "gate_up_proj": ["w1", "w3"],
        "fused_wqa_wkv": ["wq_a", "wkv"],
        "entry_proj": ["wkv", "wgate", "weights_proj"],
    }

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.config = vllm_config.model_config.hf_config
        self.v4_config = check_deployment(vllm_config)
        asked, stored = vllm_config.cache_config.cache_dtype, cache_formats(vllm_config).described()
        logger.info("dsv4: --kv-cache-dtype %s stores %s", asked, stored)
        self.model_config, self.may_load = vllm_config.model_config, True
        self.model = V4Model(self.v4_config, vllm_config, maybe_prefix(prefix, "model"))
        check_breaks(self)
        attentions = {m.layer.index: m for m in self.model.modules() if isinstance(m, V4Attention)}
        self.kernel_warm_up = KernelWarmUp(self.v4_config, vllm_config, attentions)
        JitWarmupRegistry.register(self.kernel_warm_up)
        last = get_pp_group().is_last_rank
        self.lm_head = (
            ParallelLMHead(
                self.v4_config.vocab_size, self.v4_config.hidden_size, prefix=maybe_prefix(prefix, "lm_head")
            )
            if last
            else PPMissingLayer()
        )
        self.logits_processor = LogitsProcessor(self.v4_config.vocab_size)

    @staticmethod
    def get_model_state_cls() -> type[Any]:
        """vLLM asks its model runner V2's models; V1 has nothing of the kind, nor its modules."""
        from dsv4_vllm.model_state import V4ModelState

        return V4ModelState

    def make_empty_intermediate_tensors(
        self, batch_size: int, dtype: torch.dtype, device: torch.device
    ) -> IntermediateTensors:
        width = self.v4_config.hc_mult * self.v4_config.hidden_size
        empty = {"hidden_states": torch.zeros(batch_size, width, dtype=dtype, device=device)}
        if self.model.routes_by_id(self.model.start_layer):
            empty["input_ids"] = torch.zeros(batch_size, dtype=torch.int32, device=device)
        return IntermediateTensors(empty)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, list[Tensor]] | IntermediateTensors:
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def get_mtp_target_hidden_states(self) -> Tensor | None:
        """The last step's streams, of all rows that a step may have: [.., 4 * D]; None without an
        MTP draft. vLLM asks by this name.
        """
        return self.model.streams

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        logits = self.logits_processor(self.lm_head, hidden_states)
        return None if logits is None else check.finite("logits", logits, of_requests=True)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Every tensor, once, and again where vLLM reloads them."""
        if not self.may_load:
            raise DeploymentError(
                "load_weights: the model is loaded, and its kernels may have repacked it; call reload_weights"
                " (collective_rpc) with weights_path or a list of all weights"
            )
        self.may_load = False
        return load_weights(self, self.loader(), self.model_config.model, weights)

    def loader(self) -> ReleasedLoader:
        """The loader of this rank's parameters, as they are now."""
        return loader_of(self, self.v4_config, get_tensor_model_parallel_rank())
