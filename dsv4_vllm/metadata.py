# SPDX-License-Identifier: Apache-2.0
"""What V4's operators need of a step, built once per group of caches.

Layouts that keep a block's layers together are required: without them vLLM equalises page sizes by
inflating block sizes, and prefix caching dies.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import KVCacheLayout, KVCacheSpec

from dsv4.model.kv_layout import PAGE_TOKENS, StateMapping
from dsv4.ops import plan, registry
from dsv4.ops.pages import BatchView
from dsv4_vllm.options import state_mapping


@dataclass
class StateMetadata(AttentionMetadata):
    """A step's rows of open windows.

    block_table: [R, n] int32; slot_mapping: [T] int32
    shared: whether a request may read a row that another writes in this step
    """

    block_table: Tensor
    slot_mapping: Tensor
    shared: bool


@dataclass
class SummaryMetadata(AttentionMetadata):
    """batch: the step; pages: [R] int32, each request's one page."""

    batch: BatchView
    pages: Tensor


class V4MetadataBuilder(AttentionMetadataBuilder[Any]):
    """Turns vLLM's per-group batch description into the plan of one cache role, without a host
    synchronisation."""

    def __init__(
        self, kv_cache_spec: KVCacheSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.buffers = plan.GraphBuffers()
        self.max_tokens = max(
            vllm_config.scheduler_config.max_num_batched_tokens,
            vllm_config.compilation_config.max_cudagraph_capture_size or 0,
        )
        self.max_reqs = vllm_config.scheduler_config.max_num_seqs
        self.max_model_len = vllm_config.model_config.max_model_len

    @classmethod
    def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: KVCacheSpec) -> AttentionCGSupport:
        """References read lengths on the host, so only a step made of kernels alone can be
        captured."""
        return AttentionCGSupport.UNIFORM_BATCH if _captures(vllm_config) else AttentionCGSupport.NEVER

    def batch_view(self, common: CommonAttentionMetadata) -> BatchView:
        return BatchView(
            common.query_start_loc,
            common.seq_lens,
            common.num_actual_tokens,
            common.num_reqs,
            common.max_seq_len,
            common.max_query_len,
        )

    def copy_tokens(self, name: str, value: Tensor) -> Tensor:
        """value: [T, ...], in a buffer with room for the longest step."""
        return self.buffers.copy_in(name, value, (self.max_tokens, *value.shape[1:]))

    def block_table(self, common: CommonAttentionMetadata) -> Tensor:
        # Places beyond a request's blocks may hold -1; clamping keeps address arithmetic inside the
        # pool.
        return common.block_table_tensor.clamp_(min=0)


class WindowBuilder(V4MetadataBuilder):
    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> plan.WindowPlan:
        tokens, table = plan.plan_tokens(self.batch_view(common_attn_metadata)), self.block_table(common_attn_metadata)
        window = plan.plan_window(table, tokens, self.kv_cache_spec.block_size, self.kv_cache_spec.sliding_window)
        return window.copied(self.copy_tokens)


class EntryBuilder(V4MetadataBuilder):
    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> plan.EntryPlan:
        batch, table = self.batch_view(common_attn_metadata), self.block_table(common_attn_metadata)
        ratio, max_tokens = int(self.kv_cache_spec.tokens_per_state), min(batch.max_seq_len, self.max_model_len)
        entries = plan.plan_entries(table, plan.plan_tokens(batch), self.kv_cache_spec.block_size, ratio, max_tokens)
        slots = entries.request_slots
        if slots is not None and entries.max_entries:
            slots = self.buffers.copy_in("request_slots", slots, (self.max_reqs, self.max_model_len // ratio))
        slot_mapping, lens = (
            self.copy_tokens("slot_mapping", entries.slot_mapping),
            self.copy_tokens("lens", entries.lens),
        )
        return replace(entries, slot_mapping=slot_mapping, lens=lens, request_slots=slots)


class StateBuilder(V4MetadataBuilder):
    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> StateMetadata:
        tokens, table = plan.plan_tokens(self.batch_view(common_attn_metadata)), self.block_table(common_attn_metadata)
        slot_mapping = self.copy_tokens("slot_mapping", plan.token_slots(table, tokens, self.kv_cache_spec.block_size))
        # vLLM caches a block when it schedules it, so another request of this step may hit it. One
        # new token completes no entry that reaches back to before a hit, which ends a page.
        return StateMetadata(table, slot_mapping, shared=common_attn_metadata.max_query_len > 1)


class SummaryBuilder(V4MetadataBuilder):
    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> SummaryMetadata:
        return SummaryMetadata(self.batch_view(common_attn_metadata), self.block_table(common_attn_metadata)[:, 0])


class V4Backend(AttentionBackend):
    """What the three storage backends share."""

    builder: ClassVar[type[V4MetadataBuilder]]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.BLHNC, KVCacheLayout.BLNHC)

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: KVCacheSpec | None = None) -> list[int | MultipleOf]:
        return [MultipleOf(1)]

    @staticmethod
    def get_impl_cls() -> type[Any]:
        raise NotImplementedError("dsv4's caches are read by the model's own operators")

    @classmethod
    def get_builder_cls(cls) -> type[V4MetadataBuilder]:
        return cls.builder


class WindowBackend(V4Backend):
    builder = WindowBuilder

    @staticmethod
    def get_name() -> str:
        return "DSV4_WINDOW"


class EntryBackend(V4Backend):
    builder = EntryBuilder

    @staticmethod
    def get_name() -> str:
        return "DSV4_ENTRY"

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: KVCacheSpec | None = None) -> list[int | MultipleOf]:
        # The platform reads the deployment's block size from here; 256 keeps prefix hits at
        # multiples of both ratios.
        return [PAGE_TOKENS]


class StateBackend(V4Backend):
    builder = StateBuilder

    @staticmethod
    def get_name() -> str:
        return "DSV4_STATE"


class SummaryBackend(V4Backend):
    builder = SummaryBuilder

    @staticmethod
    def get_name() -> str:
        return "DSV4_SUMMARY"


# Operators that the model does not call on a GPU: experts run in the engine, and the two halves of
# compressor.update.
NEVER_CALLED_OPS = frozenset({"moe.experts", "moe.experts_mxfp4", "compressor.save_state", "compressor.compress_store"})


def unused_ops(vllm_config: VllmConfig) -> frozenset[str]:
    """Operators that a deployment does not call; those of the state mapping that is not in use are
    among them."""
    other = "summary.compress" if state_mapping(vllm_config) is StateMapping.PAGED else "compressor.update"
    return NEVER_CALLED_OPS | {other}


def _captures(vllm_config: VllmConfig) -> bool:
    """Whether a decode step is made of kernels alone."""
    return registry.all_kernels(torch.device(vllm_config.device_config.device_type), unused_ops(vllm_config))
