# SPDX-License-Identifier: Apache-2.0
"""V4's caches as vLLM KV-cache layers, and the metadata their operators need, built once per step.

Each decoder layer registers one window cache; compressed layers add their entries and the compressor's open windows,
CSA layers the index keys and theirs. vLLM groups, allocates, hashes and evicts the pages; geometry comes from
`dsv4.kv_layout`. Layouts that keep a block's layers together are required: without them vLLM equalises page sizes by
inflating block sizes, and prefix caching dies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import CircularBufferSpec, KVCacheLayout, KVCacheSpec, MLAAttentionSpec, SlidingWindowMLASpec

from dsv4 import env
from dsv4.config import HCA_RATIO
from dsv4.errors import Dsv4Error
from dsv4.kv_layout import PAGE_TOKENS, CacheFormats, CacheRole, CacheSpec, IndexFormat, KvFormat, StateMapping
from dsv4.ops import registry
from dsv4.ops.attention import plan
from dsv4.ops.pages import BatchView, Pages, RowsFormat, view_pages


@dataclass
class WindowMetadata(AttentionMetadata):
    """tokens: the step's tokens; store_slots: [T] int32; slots: [T, 128] int32; lens: [T] int32."""

    tokens: plan.TokenPlan
    store_slots: Tensor
    slots: Tensor
    lens: Tensor


@dataclass
class EntryMetadata(AttentionMetadata):
    """block_table: [R, n] int32; store_slots, lens: [T] int32; max_entries: host bound. request_slots: [R, E] int32, where
    every entry is attended (HCA); None where an indexer chooses, as E is 262,144 a request there."""

    block_table: Tensor
    store_slots: Tensor
    lens: Tensor
    request_slots: Tensor | None
    max_entries: int


@dataclass
class StateMetadata(AttentionMetadata):
    """block_table: [R, n] int32; store_slots: [T] int32."""

    block_table: Tensor
    store_slots: Tensor


@dataclass
class SummaryMetadata(AttentionMetadata):
    """batch: the step; pages: [R] int32, each request's one page."""

    batch: BatchView
    pages: Tensor


class V4MetadataBuilder(AttentionMetadataBuilder[Any]):
    """Turns vLLM's per-group batch description into the plan of one cache role, without a host synchronisation."""

    def __init__(self, kv_cache_spec: KVCacheSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.buffers = plan.Persistent()
        self.max_tokens = max(
            vllm_config.scheduler_config.max_num_batched_tokens, vllm_config.compilation_config.max_cudagraph_capture_size or 0
        )
        self.max_reqs = vllm_config.scheduler_config.max_num_seqs
        self.max_model_len = vllm_config.model_config.max_model_len

    @classmethod
    def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: KVCacheSpec) -> AttentionCGSupport:
        """Twins read lengths on the host, so only a step made of kernels alone can be captured."""
        return AttentionCGSupport.UNIFORM_BATCH if _captures(vllm_config) else AttentionCGSupport.NEVER

    def batch_view(self, common: CommonAttentionMetadata) -> BatchView:
        return BatchView(
            common.query_start_loc, common.seq_lens, common.num_actual_tokens, common.num_reqs, common.max_seq_len, common.max_query_len
        )

    def keep_tokens(self, name: str, value: Tensor) -> Tensor:
        return self.buffers.keep(name, value, (self.max_tokens, *value.shape[1:]))

    def block_table(self, common: CommonAttentionMetadata) -> Tensor:
        # Places beyond a request's blocks may hold -1; clamping keeps address arithmetic inside the pool.
        return common.block_table_tensor.clamp_(min=0)


class WindowBuilder(V4MetadataBuilder):
    def build(self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False) -> WindowMetadata:
        tokens = plan.plan_tokens(self.batch_view(common_attn_metadata))
        table, page_tokens = self.block_table(common_attn_metadata), self.kv_cache_spec.block_size
        slots, lens = plan.window_slots(table, tokens, page_tokens, self.kv_cache_spec.sliding_window)
        kept = plan.TokenPlan(
            self.keep_tokens("request", tokens.request_of_token),
            self.keep_tokens("positions", tokens.positions),
            self.keep_tokens("valid", tokens.valid),
        )
        store = plan.token_slots(table, tokens, page_tokens)
        return WindowMetadata(kept, self.keep_tokens("store", store), self.keep_tokens("slots", slots), self.keep_tokens("lens", lens))


class EntryBuilder(V4MetadataBuilder):
    def build(self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False) -> EntryMetadata:
        batch, table = self.batch_view(common_attn_metadata), self.block_table(common_attn_metadata)
        tokens = plan.plan_tokens(batch)
        ratio = int(self.kv_cache_spec.tokens_per_state)
        rows = self.kv_cache_spec.block_size // ratio
        max_entries = min(batch.max_seq_len, self.max_model_len) // ratio
        store = self.keep_tokens("store", plan.entry_store_slots(table, tokens, rows, ratio))
        lens = self.keep_tokens("lens", plan.entry_lens(tokens, ratio))
        request_slots = None
        if ratio == HCA_RATIO:
            request_slots = plan.request_entry_slots(table, rows, max_entries)
            if max_entries:
                request_slots = self.buffers.keep("request_slots", request_slots, (self.max_reqs, self.max_model_len // ratio))
        return EntryMetadata(table, store, lens, request_slots, max_entries)


class StateBuilder(V4MetadataBuilder):
    def build(self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False) -> StateMetadata:
        tokens = plan.plan_tokens(self.batch_view(common_attn_metadata))
        table = self.block_table(common_attn_metadata)
        return StateMetadata(table, self.keep_tokens("store", plan.token_slots(table, tokens, self.kv_cache_spec.block_size)))


class SummaryBuilder(V4MetadataBuilder):
    def build(self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False) -> SummaryMetadata:
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
        # The platform reads the deployment's block size from here; 256 keeps prefix hits at multiples of both ratios.
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


_BACKENDS: dict[CacheRole, type[V4Backend]] = {
    CacheRole.WINDOW: WindowBackend,
    CacheRole.COMPRESSED: EntryBackend,
    CacheRole.INDEX_KEY: EntryBackend,
    CacheRole.STATE: StateBackend,
    CacheRole.INDEX_STATE: StateBackend,
}


class V4Cache(nn.Module, AttentionLayerBase):
    """One cache of one decoder layer, registered with vLLM under `prefix`."""

    def __init__(self, prefix: str, spec: CacheSpec, formats: CacheFormats, dtype: torch.dtype) -> None:
        super().__init__()
        self.prefix = prefix
        self.spec = spec
        self.formats = formats
        self.dtype = dtype
        self.row_format, _ = _storage(spec.role, formats, dtype)
        self.kv_cache = torch.tensor([])
        self._pages: Pages | None = None
        self._tail: Tensor | None = None
        context = get_current_vllm_config().compilation_config.static_forward_context
        if prefix in context:
            raise ValueError(f"Duplicate layer name: {prefix}")
        context[prefix] = self

    @property
    def pages(self) -> Pages:
        assert self._pages is not None, f"{self.prefix}: vLLM has not allocated this cache yet"
        return self._pages

    @property
    def tail(self) -> Tensor | None:
        """The pages' tails, fp32 [pages, tail_bytes / 4]; None where pages have none."""
        return self._tail

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        """kv_cache: [pages, 1, rows, content], contiguous inside a page."""
        self.kv_cache = kv_cache
        self._pages = view_pages(kv_cache.squeeze(1), self.spec, self.row_format)
        self._tail = view_tail(kv_cache, self.spec) if self.spec.tail_bytes else None

    def get_attn_backend(self) -> type[AttentionBackend]:
        return SummaryBackend if self.spec.per_request else _BACKENDS[self.spec.role]

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        return kv_cache_spec(self.spec, self.formats, self.dtype)


def kv_cache_spec(cache: CacheSpec, formats: CacheFormats, model_dtype: torch.dtype) -> KVCacheSpec:
    """`cache` in vLLM's terms."""
    row_format, dtype = _storage(cache.role, formats, model_dtype)
    packed = row_format not in (KvFormat.PLAIN, IndexFormat.PLAIN)
    common: dict[str, Any] = {
        "block_size": cache.page_tokens,
        "num_kv_heads": 1,
        "max_tp_shards": 1,  # one KV head: every tensor-parallel rank holds a replica
        "head_size": cache.row.row_bytes // dtype.itemsize,
        "dtype": dtype,
        "state_content_bytes": cache.row.row_bytes if packed else None,
    }
    if cache.role in (CacheRole.WINDOW, CacheRole.COMPRESSED):
        common |= {"cache_dtype_str": formats.kv.value if packed else "auto", "model_version": "deepseek_v4"}
    if cache.per_request or cache.tail_bytes:  # vLLM knows pages of rows only; tail and alignment are padding to it
        common["page_size_padded"] = cache.page_bytes
    else:
        common["alignment"] = cache.alignment
    if cache.per_request:
        spec: KVCacheSpec = CircularBufferSpec(**common, head_size_v=0, tokens_per_state=cache.tokens_per_row)
    elif cache.sliding_window is not None:
        spec = SlidingWindowMLASpec(**common, sliding_window=cache.sliding_window)
    else:
        spec = MLAAttentionSpec(**common, tokens_per_state=cache.tokens_per_row)
    assert spec.page_size_bytes == cache.page_bytes, f"{cache}: vLLM plans {spec.page_size_bytes} B a page, kv_layout {cache.page_bytes}"
    return spec


def view_tail(memory: Tensor, spec: CacheSpec) -> Tensor:
    """The bytes behind each page's rows, as fp32 [pages, tail_bytes / 4]: memory is the engine's view [pages, 1, rows, content]."""
    storage = torch.empty(0, dtype=torch.uint8, device=memory.device).set_(memory.untyped_storage())
    page_stride = memory.stride(0) * memory.element_size()
    offset = memory.storage_offset() * memory.element_size() + spec.tail_offset
    return torch.as_strided(storage, (memory.shape[0], spec.tail_bytes), (page_stride, 1), offset).view(torch.float32)


def state_mapping(vllm_config: VllmConfig) -> StateMapping:
    """DSV4_STATE, where auto takes the summaries wherever they are possible; asks no device.

    Raises Dsv4Error for summaries on the V1 runner of a GPU, whose slot-mapping kernel would read past a request's one block.
    """
    chosen, device_type = env.get("DSV4_STATE"), vllm_config.device_config.device_type
    possible = device_type == "cpu" or vllm_config.use_v2_model_runner
    if chosen == "summary" and not possible:
        raise Dsv4Error("DSV4_STATE=summary needs model runner V2 on a GPU: leave VLLM_USE_V2_MODEL_RUNNER unset, or set DSV4_STATE=paged")
    if chosen != "auto":
        return StateMapping(chosen)
    return StateMapping.SUMMARY if possible else StateMapping.PAGED


def _captures(vllm_config: VllmConfig) -> bool:
    """Whether a decode step is made of kernels alone; the operators of the state mapping that is not in use do not count."""
    unused = {"summary.compress"} if state_mapping(vllm_config) is StateMapping.PAGED else {"compressor.update"}
    return registry.all_kernels(torch.device(vllm_config.device_config.device_type), NEVER_CALLED_OPS | unused)


def _storage(role: CacheRole, formats: CacheFormats, dtype: torch.dtype) -> tuple[RowsFormat, torch.dtype]:
    """How rows of a role are stored, and the dtype vLLM allocates."""
    if role in (CacheRole.STATE, CacheRole.INDEX_STATE):
        return KvFormat.PLAIN, torch.float32
    row_format: RowsFormat = formats.index if role is CacheRole.INDEX_KEY else formats.kv
    return row_format, dtype if row_format in (KvFormat.PLAIN, IndexFormat.PLAIN) else torch.uint8


# Operators that the model does not call on a GPU: experts run in the engine, and the two halves of compressor.update.
NEVER_CALLED_OPS = frozenset({"moe.experts", "moe.experts_mxfp4", "compressor.save_state", "compressor.compress_store"})
_PACKED_CACHE_DTYPES = ("fp8", "fp8_e4m3", "fp8_ds_mla")


def cache_formats(vllm_config: VllmConfig) -> CacheFormats:
    """The storage formats that --kv-cache-dtype and --attention-config.indexer_kv_dtype ask for.

    auto and the model's own dtype store plain rows; fp8, fp8_e4m3 and fp8_ds_mla store the native 584-byte rows with
    fp8 index keys (or mxfp4 ones on request). Raises Dsv4Error for anything else.
    """
    itemsize = vllm_config.model_config.dtype.itemsize
    dtype, index = vllm_config.cache_config.cache_dtype, getattr(vllm_config.attention_config, "indexer_kv_dtype", None)
    if dtype in ("auto", str(vllm_config.model_config.dtype).removeprefix("torch.")):
        return CacheFormats(KvFormat.PLAIN, IndexFormat.PLAIN, itemsize)
    if dtype not in _PACKED_CACHE_DTYPES:
        raise Dsv4Error(f"--kv-cache-dtype {dtype}: dsv4 stores auto (plain rows) or {', '.join(_PACKED_CACHE_DTYPES)}")
    return CacheFormats(KvFormat.FP8_DS_MLA, IndexFormat.MXFP4 if index == "mxfp4" else IndexFormat.FP8, itemsize)
