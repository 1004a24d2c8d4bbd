# SPDX-License-Identifier: Apache-2.0
"""What V4's drafts are in vLLM, and the MTP draft of the April checkpoints: one block over the
backbone's streams and the next token. Source: docs/model.md, 3.9.

A draft's embedding and head are the backbone's, which vLLM puts in once both are loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.models.utils import maybe_prefix

from dsv4.errors import DeploymentError
from dsv4.loading import ReleasedLoader
from dsv4.model.config import LayerSpec, V4Config
from dsv4.ops import mhc
from dsv4.ops.mhc.layer import HyperConnection
from dsv4.ops.plan import RopeTables, rope_tables
from dsv4.ops.rope import inv_freq
from dsv4_vllm.loading import load_weights, loader_of
from dsv4_vllm.model import DeepseekV4ForCausalLM, V4DecoderLayer
from dsv4_vllm.support import v4_config

MakeBlock = Callable[[V4Config, LayerSpec, VllmConfig, str], V4DecoderLayer]


class V4DraftModel(nn.Module):
    """The blocks of a draft, by their number behind the backbone's.

    embed_tokens: the backbone's
    """

    window_freq: Tensor
    compressed_freq: Tensor
    embed_tokens: nn.Module

    def __init__(self, config: V4Config, vllm_config: VllmConfig, prefix: str, make: MakeBlock) -> None:
        super().__init__()
        blocks = {str(layer.index): layer for layer in config.draft_layers}
        self.layers = nn.ModuleDict(
            {name: make(config, layer, vllm_config, f"{prefix}.layers.{name}") for name, layer in blocks.items()}
        )
        device = vllm_config.device_config.device
        self.register_buffer("window_freq", inv_freq(config, compressed=False, device=device), persistent=False)
        self.register_buffer("compressed_freq", inv_freq(config, compressed=True, device=device), persistent=False)

    @property
    def blocks(self) -> list[Any]:
        return list(self.layers.values())

    def rope(self, positions: Tensor) -> RopeTables:
        return rope_tables(positions, self.window_freq, self.compressed_freq)


class V4Draft(nn.Module):
    """What vLLM's draft loops ask of both drafts.

    lm_head: the backbone's
    """

    packed_modules_mapping = DeepseekV4ForCausalLM.packed_modules_mapping
    lm_head: nn.Module

    def __init__(self, vllm_config: VllmConfig, prefix: str, make: MakeBlock) -> None:
        super().__init__()
        self.config = vllm_config.model_config.hf_config
        self.v4_config = v4_config(vllm_config)
        self.checkpoint, self.may_load = vllm_config.model_config.model, True
        self.model = V4DraftModel(self.v4_config, vllm_config, maybe_prefix(prefix, "model"), make)
        self.logits_processor = LogitsProcessor(self.v4_config.vocab_size)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.model.embed_tokens(input_ids)

    def streams(self, flat: Tensor) -> Tensor:
        """[T, n * D] as [T, n, D]."""
        return flat.unflatten(-1, (self.v4_config.hc_mult, self.v4_config.hidden_size))

    def compute_logits(self, hidden_states: Tensor, spec_step_idx: int = 0) -> Tensor | None:
        """hidden_states: the streams that the blocks have made, [T, n * D]."""
        last = self.model.blocks[-1]
        site = last.hc_head.site(last.norm.weight)
        return self.logits_processor(self.lm_head, mhc.head(self.streams(hidden_states), site))

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Every tensor of the draft, once."""
        if not self.may_load:
            raise DeploymentError(
                "load_weights: a draft cannot be loaded again, its kernels may have repacked it; restart the server"
            )
        self.may_load = False
        return load_weights(self, self.loader(), self.checkpoint, weights)

    def loader(self) -> ReleasedLoader:
        """The loader of this rank's parameters, as they are now."""
        return loader_of(self, self.v4_config, get_tensor_model_parallel_rank(), draft=True)


class V4MtpLayer(V4DecoderLayer):
    """The block with what mixes its input and collapses its output."""

    def __init__(self, config: V4Config, layer: LayerSpec, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__(config, vllm_config, prefix)
        eps, size = config.rms_norm_eps, config.hidden_size
        self.enorm, self.hnorm, self.norm = RMSNorm(size, eps), RMSNorm(size, eps), RMSNorm(size, eps)
        self.e_proj, self.h_proj = (
            ReplicatedLinear(size, size, bias=False, quant_config=vllm_config.quant_config, prefix=f"{prefix}.{name}")
            for name in ("e_proj", "h_proj")
        )
        self.hc_head = HyperConnection(config, is_head=True)

    def mix(self, embedded: Tensor, streams: Tensor) -> Tensor:
        """embedded: [T, D], of the next tokens; streams: [T, n, D], each normed by itself."""
        return self.e_proj(self.enorm(embedded))[0][:, None] + self.h_proj(self.hnorm(streams))[0]


class DeepSeekV4MTP(V4Draft):
    """As vLLM's own class of this name is called, by the draft loop of both model runners."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config, prefix, V4MtpLayer)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        hidden_states: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        spec_step_idx: int = 0,
    ) -> Tensor:
        """hidden_states: [T, n * D], the streams that the backbone or the step before has made;
        input_ids: of the tokens one further. The new streams, [T, n * D].
        """
        (block,) = self.model.blocks
        embedded = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        mixed = block.mix(embedded, self.streams(hidden_states))
        return mhc.post(block(mixed, self.model.rope(positions), input_ids)).flatten(1)
