# SPDX-License-Identifier: Apache-2.0
"""The DSpark draft of 0731 and 0813 in vLLM: a block of tokens at once, over what three layers of
the backbone made of the context. Source: docs/model.md, 3.10.

vLLM's second model runner drafts with it: it stores the context's rows, runs the block, and chooses
its tokens one after another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ReplicatedLinear

from dsv4.model.config import LayerSpec, V4Config
from dsv4.ops import attention, mhc
from dsv4.ops.mhc.layer import HyperConnection
from dsv4.ops.pages import SlotMapping
from dsv4_vllm.draft import V4Draft
from dsv4_vllm.model import V4Attention, V4DecoderLayer


class Weight(nn.Module):
    """One parameter, whole on every rank."""

    weight: Tensor

    def __init__(self, *shape: int, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)


class MarkovHead(nn.Module):
    """What a token says of the next one: [V, rank] twice."""

    def __init__(self, config: V4Config) -> None:
        super().__init__()
        self.markov_w1, self.markov_w2 = (Weight(config.vocab_size, config.dspark_markov_rank) for _ in range(2))


class ConfidenceHead(nn.Module):
    """How sure the draft is of a token, in fp32. It is loaded, and not read: drafts are verified in
    full, and vLLM's adaptive verification is refused."""

    def __init__(self, config: V4Config) -> None:
        super().__init__()
        self.proj = Weight(1, config.hidden_size + config.dspark_markov_rank, dtype=torch.float32)


class V4DsparkStage(V4DecoderLayer):
    """A block. The first has what makes the context of all of them, the last what reads tokens."""

    def __init__(self, config: V4Config, layer: LayerSpec, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__(config, vllm_config, prefix)
        size, eps = config.hidden_size, config.rms_norm_eps
        if layer == config.draft_layers[0]:
            self.main_proj = ReplicatedLinear(
                size * len(config.dspark_target_layer_ids),
                size,
                bias=False,
                quant_config=vllm_config.quant_config,
                prefix=f"{prefix}.main_proj",
            )
            self.main_norm = RMSNorm(size, eps)
        if layer == config.draft_layers[-1]:
            self.norm, self.hc_head = RMSNorm(size, eps), HyperConnection(config, is_head=True)
            self.markov_head, self.confidence_head = MarkovHead(config), ConfidenceHead(config)


class DSparkDeepseekV4ForCausalLM(V4Draft):
    """As vLLM's own class of this name is called.

    draft_id_to_target_id: None, both have one vocabulary
    """

    draft_id_to_target_id = None

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config, prefix, V4DsparkStage)

    def get_draft_kv_cache_layer_names(self) -> list[str]:
        return [stage.attn.window.prefix for stage in self.model.blocks]

    def get_draft_attn_causal(self) -> list[bool]:
        """A block's tokens attend each other in both directions, in every stage."""
        return [False for _ in self.model.blocks]

    def combine_hidden_states(self, outputs: Tensor) -> Tensor:
        """outputs: of the backbone's three layers, side by side, [T, 3 * D]. The context [T, D]."""
        first = self.model.blocks[0]
        return first.main_norm(first.main_proj(outputs)[0])

    @torch.inference_mode()
    def precompute_and_store_context_kv(
        self, context: Tensor, positions: Tensor, slot_mappings: Sequence[Tensor | None] | None = None
    ) -> None:
        """Store each stage's window rows of the context, which alone they are made of.

        context: [T, D]; positions: [T]; slot_mappings: of each stage, [T] int64, -1 for tokens that
        were refused; None in vLLM's memory profile
        """
        table = self.model.rope(positions).window
        for stage, slots in zip(self.model.blocks, slot_mappings or [None] * len(self.model.blocks), strict=True):
            _store_context(stage.attn, context, table, slots)

    def forward(self, input_ids: Tensor, positions: Tensor, inputs_embeds: Tensor | None = None) -> Tensor:
        """input_ids: [T], of each request its last token, then noise. The streams [T, n * D]."""
        embedded = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        streams: Any = embedded[:, None].repeat(1, self.v4_config.hc_mult, 1)
        rope = self.model.rope(positions)
        for stage in self.model.blocks:
            streams = stage(streams, rope, input_ids)
        return mhc.post(streams).flatten(1)

    def compute_draft_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Before the Markov head's say. hidden_states: what `forward` returned, of some rows."""
        return self.compute_logits(hidden_states)

    def map_draft_to_target(self, draft_ids: Tensor) -> Tensor:
        return draft_ids

    def markov_embed(self, token_ids: Tensor) -> Tensor:
        """Of the tokens before, [R]: [R, rank]."""
        return nn.functional.embedding(token_ids, self.model.blocks[-1].markov_head.markov_w1.weight)

    def markov_bias(self, markov_embed: Tensor) -> Tensor:
        """What is added to the logits, [R, V]."""
        return nn.functional.linear(markov_embed, self.model.blocks[-1].markov_head.markov_w2.weight)


def _store_context(attn: V4Attention, context: Tensor, table: Tensor, slots: Tensor | None) -> None:
    kv = attn.fused_wqa_wkv(context)[0][:, attn.config.q_lora_rank :]
    if slots is None:
        return
    norm, window = attn.kv_norm, SlotMapping(attn.window.pages, slots.int())
    # The operator rotates queries too, and there are none: a row stands for them.
    attention.norm_rope_store(kv[:, None], kv, norm.weight, norm.variance_epsilon, table, window)
