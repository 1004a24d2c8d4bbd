# SPDX-License-Identifier: Apache-2.0
"""V4's caches in SGLang's hybrid pool, sized and laid out by `dsv4.model.kv_layout`.

SGLang allocates two kinds of 256-token pages: full ones, which live as long as the request, and
window ones, which it frees behind the window. Every cache hangs on one of the two or on the
request's slot, so no allocator of our own is needed:

    window rows         window page
    compressed entries  full page: the entry of token t is row t // ratio of its page
    index keys          full page
    CSA state           ring pages of a window page, two without drafts
    HCA state           ring pages of a request slot, one without drafts

A draft's pool has its layers' window rows alone, on the same window pages.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from sglang.srt.mem_cache.base_swa_memory_pool import BaseSWAKVPool
from sglang.srt.mem_cache.memory_pool import KVCache
from sglang.srt.model_executor.pool_configurator import MemoryPoolConfig, MemoryPoolConfigurator
from sglang.srt.runtime_context import get_exec, get_schedule
from torch import Tensor

from dsv4.errors import DeploymentError, Dsv4Error
from dsv4.machine.hardware import GIB
from dsv4.model.config import CSA_RATIO, LayerKind, LayerSpec, V4Config
from dsv4.model.kv_layout import (
    PAGE_TOKENS,
    CacheFormats,
    CacheRole,
    CacheSpec,
    IndexFormat,
    KvFormat,
    StateMapping,
    layer_caches,
    ring_pages,
)
from dsv4.ops.compressor.projected import EntryStep, Projected
from dsv4.ops.compressor.ring import RingState, compress_step
from dsv4.ops.pages import Pages, SlotMapping, row_storage, view_pages
from dsv4_sglang import released_config
from dsv4_sglang.options import deployed_formats, drafted_tokens
from dsv4_sglang.step import StepMetadata

logger = logging.getLogger(__name__)

_STATE_ROLES = (CacheRole.STATE, CacheRole.INDEX_STATE)


def ring_pages_per_owner(layer: LayerSpec, drafted: int) -> int:
    """State pages per window page (CSA) or request slot (HCA)."""
    return ring_pages(layer.overlap, layer.compress_ratio, drafted)


class V4Pool(BaseSWAKVPool):
    """Every cache of every layer, as `Pages` by layer and role.

    served: the layers, which are the backbone's or a draft's; drafted: tokens of a step that may be
    rejected
    """

    def __init__(
        self,
        *,
        config: V4Config,
        served: tuple[LayerSpec, ...],
        drafted: int,
        formats: CacheFormats,
        dtype: torch.dtype,
        full_tokens: int,
        window_tokens: int,
        num_slots: int,
        device: str,
        enable_memory_saver: bool,
    ) -> None:
        KVCache.__init__(
            self,
            size=full_tokens,
            page_size=PAGE_TOKENS,
            dtype=dtype,
            layer_num=len(served),
            device=device,
            enable_memory_saver=enable_memory_saver,
        )
        self.size_swa, self.num_slots = window_tokens, num_slots
        self.full_kv_pool = self.swa_kv_pool = None
        self.full_to_swa_index_mapping: Tensor | None = None
        self.config, self.served, self.drafted, self.formats = config, served, drafted, formats
        # One page more than there are tokens for: SGLang gives page 0 to padding.
        self._pages_of = {"full": full_tokens // PAGE_TOKENS + 1, "window": window_tokens // PAGE_TOKENS + 1}
        self.layers: dict[int, dict[CacheRole, Pages]] = {}  # a draft's are numbered behind the backbone's
        with self.memory_saver_adapter.region("kv_cache"):
            for layer in served:
                self.layers[layer.index] = {
                    spec.role: self._allocate(layer, spec)
                    for spec in layer_caches(config, layer, formats, StateMapping.RING)
                }
        self._scratch: dict[int, Tensor] = {}

    def _allocate(self, layer: LayerSpec, spec: CacheSpec) -> Pages:
        row_format, dtype = row_storage(spec.role, self.formats, self.dtype)
        pages = self._num_pages(layer, spec.role)
        memory = torch.zeros(pages, spec.page_bytes // dtype.itemsize, dtype=dtype, device=self.device)
        if row_format in (KvFormat.PLAIN, IndexFormat.PLAIN):
            memory = memory.unflatten(1, (spec.rows_per_page, -1))
        return view_pages(memory, spec, row_format)

    def _num_pages(self, layer: LayerSpec, role: CacheRole) -> int:
        if role in _STATE_ROLES:
            owners = self._pages_of["window"] if layer.kind is LayerKind.CSA else self.num_slots
            return owners * ring_pages_per_owner(layer, self.drafted)
        return self._pages_of["window" if role is CacheRole.WINDOW else "full"]

    def scratch(self, like: Pages, num_pages: int) -> Pages:
        """Working memory of at least `num_pages` pages shaped like a ring's; layers share it, and
        its contents last one call.

        It grows with the largest prefill step seen: 8 KiB (CSA) and 4 KiB (HCA) per token.
        """
        width = like.data.shape[-1]
        need = num_pages * like.rows * width
        memory = self._scratch.get(width)
        if memory is None or memory.numel() < need:
            memory = self._scratch[width] = like.data.new_zeros(need)
        return Pages(memory[:need].view(num_pages, like.rows, width), like.rows, like.format)

    # ---- SGLang's interface -----------------------------------------------------------------

    def register_mapping(self, full_to_swa_index_mapping: Tensor) -> None:
        self.full_to_swa_index_mapping = full_to_swa_index_mapping

    def translate_loc_from_full_to_swa(self, kv_indices: Tensor) -> Tensor:
        assert self.full_to_swa_index_mapping is not None
        return self.full_to_swa_index_mapping[kv_indices]

    def get_kv_size_bytes(self) -> int:
        return sum(pages.data.nbytes for layer in self.layers.values() for pages in layer.values())

    def get_key_buffer(self, layer_id: int) -> Tensor:
        return self.layers[layer_id][CacheRole.WINDOW].data

    get_value_buffer = get_key_buffer

    def get_kv_buffer(self, layer_id: int) -> tuple[Tensor, Tensor]:
        return self.get_key_buffer(layer_id), self.get_key_buffer(layer_id)

    def set_kv_buffer(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("V4's caches are written by its own operators")

    def get_state_buf_infos(self) -> Any:
        raise Dsv4Error(
            "dsv4's caches cannot be transferred: run without --disaggregation-mode and --enable-hierarchical-cache"
        )

    get_contiguous_buf_infos = get_state_buf_infos
    get_cpu_copy = load_cpu_copy = get_state_buf_infos


class LayerState:
    """The rings of a compressed layer's open windows, and the caches of the entries that they
    become."""

    def __init__(self, layer: LayerSpec) -> None:
        self.index, self.ratio = layer.index, layer.compress_ratio
        self.roles = [(CacheRole.STATE, CacheRole.COMPRESSED)]
        if layer.kind is LayerKind.CSA:
            self.roles.append((CacheRole.INDEX_STATE, CacheRole.INDEX_KEY))

    def pool(self, projected: Sequence[Projected], entry_step: EntryStep, pool: V4Pool, step: StepMetadata) -> None:
        """Pool and store the entries of all caches of the layer, and carry its open windows on.

        projected: one for each compressor of the layer, attention's own first
        """
        caches, states = pool.layers[self.index], []
        plan, slot_mapping = step.rings[self.ratio], step.entries[self.ratio].slot_mapping
        for (windows, entries), given in zip(self.roles, projected, strict=True):
            rings = caches[windows]
            scratch = pool.scratch(rings, plan.num_pages) if plan.num_pages else None
            states.append(RingState(given, rings, scratch, SlotMapping(caches[entries], slot_mapping)))
        compress_step(states, plan, entry_step)


class V4PoolConfigurator(MemoryPoolConfigurator):
    """Tokens of the pool from bytes, by the page sizes of `kv_layout`."""

    def __init__(self, kvc: Any) -> None:
        config = released_config.read(kvc.model_config.hf_config)
        formats = deployed_formats(kvc)
        schedule = get_schedule()
        self.max_requests = schedule.max_running_requests or 0
        slots, drafted = self.max_requests + 1, drafted_tokens()
        full, window, self.fixed_bytes = 0.0, 0.0, 0
        for layer in config.layers + (config.draft_layers if drafted else ()):
            for spec in layer_caches(config, layer, formats, StateMapping.RING):
                if spec.role is CacheRole.WINDOW:
                    window += spec.page_bytes / PAGE_TOKENS
                elif spec.role not in _STATE_ROLES:
                    full += spec.page_bytes / PAGE_TOKENS
                elif layer.compress_ratio == CSA_RATIO:
                    window += spec.page_bytes * ring_pages_per_owner(layer, drafted) / PAGE_TOKENS
                else:
                    self.fixed_bytes += spec.page_bytes * ring_pages_per_owner(layer, drafted) * slots
        self.window_ratio = schedule.swa_full_tokens_ratio
        self.sliding_window, self.drafted = config.sliding_window, drafted
        self.bytes_per_token = full + self.window_ratio * window

    def calculate_pool_sizes(self, available_bytes: int, page_size: int) -> MemoryPoolConfig:
        tokens = int((available_bytes - self.fixed_bytes) / self.bytes_per_token)
        if tokens < page_size:
            raise DeploymentError(
                f"--max-running-requests {self.max_requests}: the HCA layers' state of so many requests takes"
                f" {self.fixed_bytes / GIB:.2f} GiB, and weights leave {max(available_bytes, 0) / GIB:.2f} GiB to caches;"
                " lower it, or raise --mem-fraction-static"
            )
        return self._sizes(tokens, page_size)

    def calculate_pool_sizes_from_max_tokens(self, max_total_num_tokens: int, page_size: int) -> MemoryPoolConfig:
        return self._sizes(max_total_num_tokens, page_size)

    def _sizes(self, tokens: int, page_size: int) -> MemoryPoolConfig:
        full = tokens // page_size * page_size
        # The smallest pool that admits a request: a chunk page, and a window with a partly filled
        # page at either end; and a page that drafts are written ahead to.
        least = 5 if self.drafted else 4
        window = max(int(full * self.window_ratio) // page_size * page_size, least * page_size)
        self.validate_swa_pool_size(window, self.sliding_window, page_size)
        return MemoryPoolConfig(
            max_total_num_tokens=full, full_max_total_num_tokens=full, swa_max_total_num_tokens=window
        )


def build_pool(kvc: Any, sizes: Any, req_to_token_pool: Any) -> V4Pool:
    """The pool that SGLang asks for at start, of the backbone or of its draft."""
    formats, config = deployed_formats(kvc), released_config.read(kvc.model_config.hf_config)
    logger.info("dsv4: --kv-cache-dtype %s stores %s", kvc.kv_cache_dtype_str, formats.described())
    pool = V4Pool(
        config=config,
        served=config.draft_layers if kvc.is_draft_worker else config.layers,
        drafted=drafted_tokens(),
        formats=formats,
        dtype=kvc.model_config.dtype,
        full_tokens=sizes.full_max_total_num_tokens,
        window_tokens=sizes.swa_max_total_num_tokens,
        num_slots=req_to_token_pool.req_to_token.shape[0],
        device=kvc.device,
        enable_memory_saver=get_exec().features.enable_memory_saver,
    )
    pool._finalize_allocation_log(sizes.full_max_total_num_tokens)
    return pool
