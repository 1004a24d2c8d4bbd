# SPDX-License-Identifier: Apache-2.0
"""What V4's operators need of a step, for each group of caches.

Layouts that keep a block's layers together are required: without them vLLM equalises page sizes by
inflating block sizes, and prefix caching dies.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
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

from dsv4.model.config import HCA_RATIO
from dsv4.model.kv_layout import PAGE_TOKENS, StateMapping
from dsv4.ops import plan, registry
from dsv4.ops.pages import BatchView
from dsv4_vllm.options import num_drafted, state_mapping


@dataclass
class WindowMetadata(AttentionMetadata):
    """A step's tokens and windows."""

    tokens: plan.TokenPlan
    window: plan.WindowPlan


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


class PlannedStep:
    """A step's metadata for all groups of caches, made in one launch when the first is asked for.

    It lives as long as vLLM prepares that step, and knows no other.
    """

    def __init__(self, tables: Sequence[tuple[V4MetadataBuilder, Tensor]]) -> None:
        """tables: each group's builder, and the group's block table."""
        self.tables = tables
        self._made: dict[int, Any] | None = None

    def metadata(self, builder: V4MetadataBuilder, common: CommonAttentionMetadata) -> Any:
        """Of one group. common: any group's description of the step."""
        if self._made is None:
            self._made = self.make(_batch_view(common))
        return self._made[id(builder)]

    def make(self, batch: BatchView) -> dict[int, Any]:
        """Launch; the metadata of each builder, by its id."""
        first = self.tables[0][0]
        tokens = plan.TokenPlan.empty(first.token_buffers.room(batch))
        caches = self.caches()
        rooms = [builder.buffers.room(batch) for builder, _ in self.tables]
        made = [None if c is None else c.empty(batch, room) for c, room in zip(caches, rooms, strict=True)]
        kept = [(c, m) for c, m in zip(caches, made, strict=True) if c is not None and m is not None]
        if kept:
            plan.step(batch, [c for c, _ in kept], plan.StepPlan(tokens, tuple(m for _, m in kept)))
        return {
            id(builder): builder.described(batch, table, tokens, each)
            for (builder, table), each in zip(self.tables, made, strict=True)
        }

    def caches(self) -> list[plan.Cache | None]:
        """What is planned, of each group."""
        return [builder.cache(table) for builder, table in self.tables]


class BlockStep(PlannedStep):
    """A step of a DSpark draft, whose requests have one block of tokens each.

    vLLM ends the last block at the longest context, so that the drafts of a request's last few
    tokens are planned a little too early: fewer of them are right.
    """

    def caches(self) -> list[plan.Cache | None]:
        return [builder.block_cache(table) for builder, table in self.tables if isinstance(builder, WindowBuilder)]


def _batch_view(common: CommonAttentionMetadata) -> BatchView:
    return BatchView(
        common.query_start_loc,
        common.seq_lens,
        common.num_actual_tokens,
        common.num_reqs,
        common.max_seq_len,
        common.max_query_len,
    )


class V4MetadataBuilder(AttentionMetadataBuilder[Any], ABC):
    """Turns vLLM's description of a step into the plan of one group of caches, without a host
    synchronisation.

    planned_step: the step that is being prepared, where it is planned for all groups at once
    """

    planned_step: PlannedStep | None = None

    def __init__(
        self, kv_cache_spec: KVCacheSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        max_tokens = max(
            vllm_config.scheduler_config.max_num_batched_tokens,
            vllm_config.compilation_config.max_cudagraph_capture_size or 0,
        )
        max_reqs = vllm_config.scheduler_config.max_num_seqs
        self.buffers, self.token_buffers = (plan.GraphBuffers(max_tokens, max_reqs) for _ in range(2))
        self.max_model_len = vllm_config.model_config.max_model_len

    @classmethod
    def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: KVCacheSpec) -> AttentionCGSupport:
        """References read lengths on the host, so only a step made of kernels alone can be
        captured."""
        return AttentionCGSupport.UNIFORM_BATCH if _captures(vllm_config) else AttentionCGSupport.NEVER

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Any:
        step = self.planned_step
        if step is None:
            # Model runner V1 may leave -1 behind a request's blocks; clamping keeps address
            # arithmetic inside the pool.
            planned = PlannedStep if common_attn_metadata.causal else BlockStep
            step = planned([(self, common_attn_metadata.block_table_tensor.clamp_(min=0))])
        return step.metadata(self, common_attn_metadata)

    @abstractmethod
    def cache(self, block_table: Tensor) -> plan.Cache | None:
        """What is to be planned; None for nothing."""

    @abstractmethod
    def described(self, batch: BatchView, block_table: Tensor, tokens: plan.TokenPlan, made: Any) -> Any:
        """The metadata that layers read. made: the plan of `cache`."""


class WindowBuilder(V4MetadataBuilder):
    def __init__(
        self, kv_cache_spec: KVCacheSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.num_drafted = num_drafted(vllm_config)

    def cache(self, block_table: Tensor) -> plan.WindowCache:
        return plan.WindowCache(block_table, self.kv_cache_spec.block_size, self.kv_cache_spec.sliding_window)

    def block_cache(self, block_table: Tensor) -> plan.BlockCache:
        spec = self.kv_cache_spec
        return plan.BlockCache(block_table, spec.block_size, spec.sliding_window, self.num_drafted)

    def described(self, batch: BatchView, block_table: Tensor, tokens: plan.TokenPlan, made: Any) -> WindowMetadata:
        return WindowMetadata(tokens, made)


class EntryBuilder(V4MetadataBuilder):
    def __init__(
        self, kv_cache_spec: KVCacheSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.index_topk = int(vllm_config.model_config.hf_config.index_topk)

    def cache(self, block_table: Tensor) -> plan.EntryCache:
        ratio = int(self.kv_cache_spec.tokens_per_state)
        topk = None if ratio == HCA_RATIO else self.index_topk
        return plan.EntryCache(block_table, self.kv_cache_spec.block_size, ratio, self.max_model_len, topk)

    def described(self, batch: BatchView, block_table: Tensor, tokens: plan.TokenPlan, made: Any) -> plan.EntryPlan:
        entries: plan.EntryPlan = made
        return entries


class StateBuilder(V4MetadataBuilder):
    def cache(self, block_table: Tensor) -> plan.RowCache:
        return plan.RowCache(block_table, self.kv_cache_spec.block_size)

    def described(self, batch: BatchView, block_table: Tensor, tokens: plan.TokenPlan, made: Any) -> StateMetadata:
        # vLLM caches a block when it schedules it, so another request of this step may hit it. One
        # new token completes no entry that reaches back to before a hit, which ends a page.
        return StateMetadata(block_table, made, shared=batch.max_query_len > 1)


class SummaryBuilder(V4MetadataBuilder):
    def cache(self, block_table: Tensor) -> None:
        return None

    def described(self, batch: BatchView, block_table: Tensor, tokens: plan.TokenPlan, made: Any) -> SummaryMetadata:
        return SummaryMetadata(batch, block_table[:, 0])


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


# Operators that the model does not call on a GPU: experts run in the engine, page tables are its
# own, and the two halves of compressor.update.
NEVER_CALLED_OPS = frozenset(
    {"moe.experts", "moe.experts_mxfp4", "plan.page_tables", "compressor.save_state", "compressor.compress_store"}
)


def unused_ops(vllm_config: VllmConfig) -> frozenset[str]:
    """Operators that a deployment does not call; those of the state mapping that is not in use are
    among them."""
    other = "summary.compress" if state_mapping(vllm_config) is StateMapping.PAGED else "compressor.update"
    return NEVER_CALLED_OPS | {other}


def _captures(vllm_config: VllmConfig) -> bool:
    """Whether a decode step is made of kernels alone."""
    return registry.all_kernels(torch.device(vllm_config.device_config.device_type), unused_ops(vllm_config))
