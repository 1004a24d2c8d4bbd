# SPDX-License-Identifier: Apache-2.0
"""V4's caches as vLLM KV-cache layers.

Each decoder layer registers one window cache; compressed layers add their entries and the
compressor's open windows, CSA layers the index keys and theirs. Open windows that are summaries
share pages with other layers'. vLLM groups, allocates, hashes and evicts the pages; geometry comes
from `dsv4.model.kv_layout`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.kv_cache_interface import CircularBufferSpec, KVCacheSpec, MLAAttentionSpec, SlidingWindowMLASpec

from dsv4.model import kv_layout
from dsv4.model.config import LayerSpec, V4Config
from dsv4.model.kv_layout import CacheFormats, CacheRole, CacheSpec, IndexFormat, KvFormat, StateMapping
from dsv4.ops.compressor import paged, summary
from dsv4.ops.compressor.projected import EntryStep, Projected
from dsv4.ops.pages import Pages, SlotMapping, row_storage, view_pages
from dsv4.ops.plan import EntryPlan
from dsv4_vllm.metadata import (
    EntryBackend,
    StateBackend,
    StateMetadata,
    SummaryBackend,
    SummaryMetadata,
    V4Backend,
    WindowBackend,
)
from dsv4_vllm.options import cache_formats, num_drafted, state_mapping

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
        self.row_format, _ = row_storage(spec.role, formats, dtype)
        self.kv_cache = torch.tensor([])
        context = get_current_vllm_config().compilation_config.static_forward_context
        if prefix in context:
            raise ValueError(f"Duplicate layer name: {prefix}")
        context[prefix] = self

    @property
    def kv_cache(self) -> Tensor:
        """What vLLM allocated, [pages, 1, rows, content]; empty before, and after it is taken
        back."""
        return self._kv_cache

    @kv_cache.setter
    def kv_cache(self, memory: Tensor) -> None:
        # vLLM assigns an empty tensor to free the cache: nothing here may hold on to it.
        self._kv_cache = memory
        self._pages: Pages | None = None
        self._tail: Tensor | None = None

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

    def empty_pages(self, num_pages: int, device: torch.device) -> Tensor:
        """Memory as vLLM binds it, for so many pages, of zeros."""
        _, dtype = row_storage(self.spec.role, self.formats, self.dtype)
        rows, width, page = self.spec.rows_per_page, self.spec.row.row_bytes, self.spec.page_bytes
        memory = torch.zeros(num_pages * page, dtype=torch.uint8, device=device).view(dtype)
        strides = [n // dtype.itemsize for n in (page, rows * width, width)]
        return memory.as_strided((num_pages, 1, rows, width // dtype.itemsize), (*strides, 1))

    def get_attn_backend(self) -> type[AttentionBackend]:
        return SummaryBackend if self.spec.per_request else _BACKENDS[self.spec.role]

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        return kv_cache_spec(self.spec, self.formats, self.dtype)


@dataclass(frozen=True)
class PageSlice:
    """A layer's part of pages that several share: so many bytes from `offset` on."""

    cache: V4Cache
    offset: int
    num_bytes: int

    @property
    def memory(self) -> Tensor:
        """[P, num_bytes / 4] fp32."""
        data = self.cache.pages.data[:, 0]
        first, size = (n // data.element_size() for n in (self.offset, self.num_bytes))
        return data[:, first : first + size]


class LayerState(nn.Module, ABC):
    """Where a layer's open windows live.

    pairs: for each of its compressors, attention's own first, the cache of its open windows and
    that of its entries
    """

    def __init__(self, pairs: Sequence[tuple[V4Cache, V4Cache]]) -> None:
        super().__init__()
        self.pairs = tuple(pairs)
        # Who walks over the model's modules for its caches must find those of the open windows.
        self.caches = nn.ModuleList(cache for pair in pairs for cache in pair)

    @abstractmethod
    def pool(self, projected: Sequence[Projected], step: EntryStep, metadata: Mapping[str, Any]) -> None:
        """Pool and store the entries of all caches of the layer, and carry its open windows on.

        projected: one for each compressor
        metadata: vLLM's, by the name of the cache
        """


class PagedLayerState(LayerState):
    """Open windows as rows, one per token, in pages of vLLM's."""

    def pool(self, projected: Sequence[Projected], step: EntryStep, metadata: Mapping[str, Any]) -> None:
        given = zip(self.pairs, projected, strict=True)
        states = [self._state(windows, entries, each, metadata) for (windows, entries), each in given]
        rows: StateMetadata = metadata[self.pairs[0][0].prefix]
        paged.update(states, step, shared=rows.shared)

    def _state(
        self,
        windows: V4Cache,
        entries: V4Cache,
        projected: Projected,
        metadata: Mapping[str, Any],
    ) -> paged.PagedState:
        rows: StateMetadata = metadata[windows.prefix]
        entry: EntryPlan = metadata[entries.prefix]
        return paged.PagedState(
            projected,
            rows=SlotMapping(windows.pages, rows.slot_mapping),
            block_table=rows.block_table,
            entries=SlotMapping(entries.pages, entry.slot_mapping),
        )


class SummaryLayerState(LayerState):
    """Open windows as summaries: in a page of the request, and a tail behind each page of a CSA
    layer's entries."""

    def __init__(self, pairs: Sequence[tuple[V4Cache, V4Cache]], slices: Sequence[PageSlice], overlap: int) -> None:
        """slices: of the pages of each pair's open windows, the layer's part."""
        super().__init__(pairs)
        self.slices, self.overlap = tuple(slices), overlap

    def pool(self, projected: Sequence[Projected], step: EntryStep, metadata: Mapping[str, Any]) -> None:
        given = zip(self.slices, (entries for _, entries in self.pairs), projected, strict=True)
        states = [self._state(kept, entries, each, metadata) for kept, entries, each in given]
        requests: SummaryMetadata = metadata[self.pairs[0][0].prefix]
        summary.compress(states, step, requests.batch)

    def _state(
        self,
        kept: PageSlice,
        entries: V4Cache,
        projected: Projected,
        metadata: Mapping[str, Any],
    ) -> summary.SummaryState:
        requests: SummaryMetadata = metadata[kept.cache.prefix]
        entry: EntryPlan = metadata[entries.prefix]
        dim = projected.norm_weight.shape[0]
        return summary.SummaryState(
            projected,
            kept=summary.SummaryPages.view(kept.memory, self.overlap, dim),
            state_page=requests.pages,
            tail=None if entries.tail is None else entries.tail.unflatten(-1, (3, dim)),
            block_table=entry.block_table,
            entries=SlotMapping(entries.pages, entry.slot_mapping),
        )


@dataclass(frozen=True)
class LayerCaches:
    """The caches of one decoder layer.

    by_role: open windows that are summaries may be in one cache with others', of this layer too
    slices: of such caches, what is this layer's
    """

    by_role: Mapping[CacheRole, V4Cache]
    slices: Mapping[CacheRole, PageSlice]

    def pages(self, role: CacheRole) -> Pages:
        """What the layer has of a role, as vLLM allocated it."""
        whole = self.by_role[role].pages
        return replace(whole, data=self.slices[role].memory[:, None]) if role in self.slices else whole

    def state(self, overlap: int) -> LayerState:
        """The state of a compressed layer."""
        roles = [(CacheRole.STATE, CacheRole.COMPRESSED)]
        if CacheRole.INDEX_STATE in self.by_role:
            roles.append((CacheRole.INDEX_STATE, CacheRole.INDEX_KEY))
        pairs = [(self.by_role[windows], self.by_role[entries]) for windows, entries in roles]
        if not self.slices:
            return PagedLayerState(pairs)
        return SummaryLayerState(pairs, [self.slices[windows] for windows, _ in roles], overlap)


def layer_caches(config: V4Config, layer: LayerSpec, vllm_config: VllmConfig, prefix: str) -> LayerCaches:
    """Register a layer's caches under `prefix`, which names the layer by its index. A page of
    several layers' summaries has the name of the first."""
    formats, dtype, mapping = cache_formats(vllm_config), vllm_config.model_config.dtype, state_mapping(vllm_config)
    drafted = num_drafted(vllm_config)
    arena = kv_layout.state_arena(config, formats, drafted) if mapping is StateMapping.SUMMARY else None
    known = get_current_vllm_config().compilation_config.static_forward_context
    caches: dict[CacheRole, V4Cache] = {}
    slices: dict[CacheRole, PageSlice] = {}
    for spec in kv_layout.layer_caches(config, layer, formats, mapping, drafted):
        if not spec.per_request:
            caches[spec.role] = V4Cache(f"{prefix}.{spec.role.value}_cache", spec, formats, dtype)
            continue
        assert arena is not None
        place = arena.places[layer.index, spec.role]
        name = f"{prefix}.{arena.page.role.value}_cache".replace(f".{layer.index}.", f".{place.owner}.", 1)
        caches[spec.role] = cache = known.get(name) or V4Cache(name, arena.page, formats, dtype)
        slices[spec.role] = PageSlice(cache, place.offset, spec.row.row_bytes)
    return LayerCaches(caches, slices)


def kv_cache_spec(cache: CacheSpec, formats: CacheFormats, model_dtype: torch.dtype) -> KVCacheSpec:
    """`cache` in vLLM's terms."""
    row_format, dtype = row_storage(cache.role, formats, model_dtype)
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
    assert spec.page_size_bytes == cache.page_bytes, (
        f"{cache}: vLLM plans {spec.page_size_bytes} B a page, kv_layout {cache.page_bytes}"
    )
    return spec


def view_tail(memory: Tensor, spec: CacheSpec) -> Tensor:
    """The bytes behind each page's rows, as fp32 [pages, tail_bytes / 4]: memory is the engine's
    view [pages, 1, rows, content]."""
    storage = torch.empty(0, dtype=torch.uint8, device=memory.device).set_(memory.untyped_storage())
    page_stride = memory.stride(0) * memory.element_size()
    offset = memory.storage_offset() * memory.element_size() + spec.tail_offset
    return torch.as_strided(storage, (memory.shape[0], spec.tail_bytes), (page_stride, 1), offset).view(torch.float32)
