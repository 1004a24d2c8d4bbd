# SPDX-License-Identifier: Apache-2.0
"""The MTP draft of V4's April checkpoints in SGLang: one block over the backbone's streams and the
next token. Source: docs/model.md, 3.9.

Its embedding and head are the backbone's, which SGLang hands over once both are loaded.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.linear import ReplicatedLinear
from sglang.srt.layers.logits_processor import LogitsProcessor
from sglang.srt.layers.quantization.fp8 import Fp8Config
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from sglang.srt.runtime_context import get_parallel
from sglang.srt.utils import add_prefix
from torch import Tensor, nn

from dsv4.errors import DeploymentError
from dsv4.model.config import LayerSpec, V4Config
from dsv4.ops import mhc
from dsv4.ops.mhc.layer import HyperConnection
from dsv4.ops.plan import rope_tables
from dsv4.ops.rope import inv_freq
from dsv4_sglang import released_config
from dsv4_sglang.loading import WITH_A_DRAFT, loader_of
from dsv4_sglang.model import V4DecoderLayer
from dsv4_sglang.quant import V4QuantConfig, on_cpu

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


class V4MtpLayer(V4DecoderLayer):
    """The block with what mixes its input and collapses its output."""

    def __init__(self, config: V4Config, layer: LayerSpec, quant: V4QuantConfig | None, prefix: str) -> None:
        super().__init__(config, layer, quant, prefix)
        eps, size = config.rms_norm_eps, config.hidden_size
        self.enorm, self.hnorm, self.norm = RMSNorm(size, eps), RMSNorm(size, eps), RMSNorm(size, eps)
        self.e_proj, self.h_proj = (
            ReplicatedLinear(size, size, bias=False, quant_config=quant, prefix=add_prefix(name, prefix))
            for name in ("e_proj", "h_proj")
        )
        self.hc_head = HyperConnection(config, is_head=True)

    def mix(self, embedded: Tensor, streams: Tensor) -> Tensor:
        """embedded: [T, D], of the next tokens; streams: [T, n, D], each normed by itself."""
        normed = self.hnorm(streams.reshape(-1, streams.shape[-1]))
        return self.e_proj(self.enorm(embedded))[0][:, None] + self.h_proj(normed)[0].view(streams.shape)


class V4MtpModel(nn.Module):
    window_freq: Tensor
    compressed_freq: Tensor
    embed_tokens: VocabParallelEmbedding  # the backbone's

    def __init__(self, config: V4Config, quant: V4QuantConfig | None, prefix: str) -> None:
        super().__init__()
        (layer,) = config.draft_layers
        name = str(layer.index)
        self.layers = nn.ModuleDict({name: V4MtpLayer(config, layer, quant, add_prefix(f"layers.{name}", prefix))})
        self.register_buffer("window_freq", inv_freq(config, compressed=False), persistent=False)
        self.register_buffer("compressed_freq", inv_freq(config, compressed=True), persistent=False)

    @property
    def block(self) -> V4MtpLayer:
        (block,) = self.layers.values()
        assert isinstance(block, V4MtpLayer)
        return block


class DeepseekV4PluginForCausalLMNextN(nn.Module):
    """The draft of DeepSeek-V4-Flash and -Pro, as SGLang's EAGLE worker runs it."""

    def __init__(self, config: Any, quant_config: Fp8Config | None = None, prefix: str = "") -> None:
        super().__init__()
        if on_cpu():
            from dsv4_sglang import draft_ops

            draft_ops.install()  # the worker that drafts with this model is in this process
        self.config = config
        self.v4_config = released_config.read(config)
        self.quant_config = quant_config and V4QuantConfig.adopt(quant_config, self.v4_config.expert_dtype)
        self.model = V4MtpModel(self.v4_config, self.quant_config, add_prefix("model", prefix))
        self.lm_head: ParallelLMHead
        self.logits_processor = LogitsProcessor(config)
        self.may_load = True
        self._derived_weight_cache_error = WITH_A_DRAFT

    def get_attention_sliding_window_size(self) -> int:
        return self.v4_config.sliding_window

    def set_embed_and_head(self, embed: Tensor, head: Tensor) -> None:
        """Share this rank's part of the backbone's embedding and head."""
        c = self.v4_config
        with torch.device("meta"):
            self.model.embed_tokens = VocabParallelEmbedding(c.vocab_size, c.hidden_size)
            self.lm_head = ParallelLMHead(c.vocab_size, c.hidden_size)
        self.model.embed_tokens.weight, self.lm_head.weight = (
            nn.Parameter(weight, requires_grad=False) for weight in (embed, head)
        )

    @torch.no_grad()
    def forward(self, input_ids: Tensor, positions: Tensor, forward_batch: ForwardBatch) -> Any:
        """input_ids: of the tokens one further than the streams, [T, n * D], that the backbone or
        the step before has made."""
        c, m = self.v4_config, self.model
        streams = forward_batch.spec_info.hidden_states.unflatten(-1, (c.hc_mult, c.hidden_size))
        rope = rope_tables(positions, m.window_freq, m.compressed_freq)
        made = mhc.post(m.block(m.block.mix(m.embed_tokens(input_ids), streams), rope, input_ids))
        hidden = mhc.head(made, m.block.hc_head.site(m.block.norm.weight))
        return self.logits_processor(
            input_ids, hidden, self.lm_head, forward_batch, hidden_states_before_norm=made.flatten(1)
        )

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Every tensor of the draft, once."""
        if not self.may_load:
            raise DeploymentError(WITH_A_DRAFT)
        self.may_load = False
        loader = loader_of(self, self.v4_config, get_parallel().tp_rank, draft=True)
        loaded = loader.load(weights)
        loader.finish(released_config.source(self.config))
        return loaded
