# SPDX-License-Identifier: Apache-2.0
"""Bytes, rows, pages and strides of every cache: the only place where KV geometry is computed.

A cache is a list of pages; a page holds `rows_per_page` rows; a row holds one entry (a token, a
compressed entry, an index key or one token's compressor state). Quantised pages store all rows'
values first, then all rows' scales, then padding, which is the byte layout of the engines' native
V4. Source: docs/model.md, 5.1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from dsv4.model.config import LayerKind, LayerSpec, V4Config

KV_QUANT_GROUP = 64  # e4m3 values that share one ue8m0 scale
INDEX_MXFP4_GROUP = 32  # e2m1 values that share one ue8m0 scale
# The indexer scores a step in slices whose logits fit in this many bytes: its workspace does
# not grow with the context. Captured decode graphs hold it too (docs/kernels.md).
INDEX_SCORES_BYTES = 64 << 20

PAGE_TOKENS = (
    256  # tokens of a compressed or index page, of a window page beside rings, and the step of prefix-cache hits
)
WINDOW_PAGE_TOKENS = 64  # tokens of a window page beside PAGED or SUMMARY state
SINCE_BYTES = 16  # of a position, int32 and padding, in a page of summaries that drafted rows lie beside
STATE_PAGE_TOKENS = {LayerKind.CSA: 4, LayerKind.HCA: 8}  # of PAGED state


class KvFormat(str, Enum):
    """How a window or compressed KV row is stored."""

    PLAIN = "plain"  # head_dim elements of the model's dtype
    FP8_DS_MLA = "fp8_ds_mla"  # 448 e4m3 + 64 bf16, then 7 ue8m0 scales + 1 pad byte: 584 bytes


class IndexFormat(str, Enum):
    """How an index key is stored."""

    PLAIN = "plain"  # index_head_dim elements of the model's dtype
    FP8 = "fp8"  # 128 e4m3, then one fp32 scale: 132 bytes
    MXFP4 = "mxfp4"  # 64 bytes of e2m1 pairs, then 4 ue8m0 scales: 68 bytes


class StateMapping(str, Enum):
    """Where a request's open compressor windows live between steps."""

    PAGED = "paged"  # every token's raw row, in sliding-window pages with a block table of their own
    RING = "ring"  # raw rows in rings: a CSA ring belongs to a window page, an HCA ring to a request's slot
    SUMMARY = "summary"  # one small block per request, and a summary at the end of each CSA page (docs/kv-mapping.md)


class CacheRole(str, Enum):
    """What a cache holds."""

    WINDOW = "window"
    COMPRESSED = "compressed"
    STATE = "state"
    INDEX_KEY = "index_key"
    INDEX_STATE = "index_state"


@dataclass(frozen=True)
class RowFormat:
    """Bytes of one row: `value_bytes` in the page's first part, `scale_bytes` in its second."""

    value_bytes: int
    scale_bytes: int = 0

    @property
    def row_bytes(self) -> int:
        return self.value_bytes + self.scale_bytes


@dataclass(frozen=True, kw_only=True)
class CacheSpec:
    """One cache of one layer.

    page_tokens: tokens one page covers.
    tokens_per_row: 1, or the compress ratio.
    sliding_window: tokens after which a row is dead, None when rows live as long as the request.
    alignment: page_bytes is a multiple of it.
    tail_bytes: fp32 values after the page's rows and scales.
    per_request: a request has exactly one page, whatever its length.
    """

    role: CacheRole
    row: RowFormat
    page_tokens: int
    tokens_per_row: int = 1
    sliding_window: int | None = None
    alignment: int = 1
    tail_bytes: int = 0
    per_request: bool = False

    @property
    def rows_per_page(self) -> int:
        return self.page_tokens // self.tokens_per_row

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, tail and padding included."""
        return round_up(self.tail_offset + self.tail_bytes, self.alignment)

    @property
    def tail_offset(self) -> int:
        """Byte in the page where the tail starts."""
        return self.rows_per_page * self.row.row_bytes


@dataclass(frozen=True)
class CacheFormats:
    """The two storage choices of a deployment, and the bytes of one plain element (2 for bf16, 4
    for fp32).
    """

    kv: KvFormat
    index: IndexFormat
    itemsize: int = 2

    @staticmethod
    def plain(itemsize: int) -> CacheFormats:
        """Rows of the model's dtype."""
        return CacheFormats(KvFormat.PLAIN, IndexFormat.PLAIN, itemsize)

    @staticmethod
    def packed(itemsize: int, mxfp4_keys: bool) -> CacheFormats:
        """The native 584-byte rows, and fp8 or mxfp4 index keys."""
        return CacheFormats(KvFormat.FP8_DS_MLA, IndexFormat.MXFP4 if mxfp4_keys else IndexFormat.FP8, itemsize)

    def described(self) -> str:
        """In words, for a log."""
        if self.kv is KvFormat.PLAIN:
            return f"plain rows of {8 * self.itemsize}-bit values"
        return f"packed {self.kv.value} rows and {self.index.value} index keys"

    @property
    def alignment(self) -> int:
        """Page alignment the native kernels expect: 576 for fp8_ds_mla, else 512."""
        return 576 if self.kv is KvFormat.FP8_DS_MLA else 512


def round_up(n: int, multiple: int) -> int:
    """Smallest multiple of `multiple` that is at least `n`."""
    return -(-n // multiple) * multiple


def kv_row(config: V4Config, formats: CacheFormats) -> RowFormat:
    """A window or compressed KV row."""
    if formats.kv is KvFormat.PLAIN:
        return RowFormat(config.head_dim * formats.itemsize)
    groups = config.qk_nope_head_dim // KV_QUANT_GROUP
    return RowFormat(config.qk_nope_head_dim + 2 * config.qk_rope_head_dim, groups + 1)  # 576 + 8 in V4


def index_row(config: V4Config, formats: CacheFormats) -> RowFormat:
    """An index key."""
    dim = config.index_head_dim
    if formats.index is IndexFormat.PLAIN:
        return RowFormat(dim * formats.itemsize)
    if formats.index is IndexFormat.FP8:
        return RowFormat(dim, 4)
    return RowFormat(dim // 2, dim // INDEX_MXFP4_GROUP)


def state_row(layer: LayerSpec, head_dim: int) -> RowFormat:
    """One token's raw compressor state: kv and score, fp32, each `overlap * head_dim` wide."""
    return RowFormat(2 * layer.overlap * head_dim * 4)


def state_window(layer: LayerSpec) -> int:
    """Tokens whose raw state an entry needs: 8 for CSA (two windows of 4), 128 for HCA."""
    return layer.overlap * layer.compress_ratio


def state_ring_rows(layer: LayerSpec, speculative: bool) -> int:
    """Rows of one ring of raw state in SGLang's own pool: the window that an entry needs, twice
    where drafted tokens may be rejected.
    """
    return state_window(layer) * (2 if speculative else 1)


def ring_pages(overlap: int, ratio: int, drafted: int) -> int:
    """Pages of one window of `ratio` rows in a ring of ours: the `overlap` windows that an entry
    needs, and what the rows of up to `drafted` rejected tokens overwrite beyond them.
    """
    return overlap + -(-drafted // ratio)


def summary_bytes(head_dim: int) -> int:
    """A pooling summary: per channel the running maximum, sum and accumulator, fp32."""
    return 3 * head_dim * 4


def summary_row(layer: LayerSpec, head_dim: int, drafted: int) -> RowFormat:
    """What a request keeps of one cache: `overlap` summaries, and where a step may have to take
    back `drafted` rows these, raw, and the position of the first."""
    kept = drafted * state_row(layer, head_dim).row_bytes + SINCE_BYTES if drafted else 0
    return RowFormat(layer.overlap * summary_bytes(head_dim) + kept)


def layer_caches(
    config: V4Config,
    layer: LayerSpec,
    formats: CacheFormats,
    mapping: StateMapping = StateMapping.PAGED,
    drafted: int = 0,
) -> tuple[CacheSpec, ...]:
    """Every cache of `layer`: WINDOW; compressed layers add COMPRESSED and STATE; CSA layers add
    INDEX_KEY and INDEX_STATE.

    drafted: rows that a step of SUMMARY may have to take back.
    mapping: PAGED and RING keep raw rows. A ring has `ring_pages` pages of one window of
    `compress_ratio` rows; beside rings, window pages are as long as the others, and only packed KV
    pages are aligned. SUMMARY keeps one state row per request and, because a prefix hit resumes at
    a page end, the previous CSA window's summary in each CSA and index page.
    """
    ring = mapping is StateMapping.RING
    kv_alignment = 1 if ring and formats.kv is KvFormat.PLAIN else formats.alignment
    index_alignment = 1 if ring else formats.alignment
    row = kv_row(config, formats)
    caches = [
        CacheSpec(
            role=CacheRole.WINDOW,
            row=row,
            page_tokens=PAGE_TOKENS if ring else WINDOW_PAGE_TOKENS,
            sliding_window=config.sliding_window,
            alignment=kv_alignment,
        )
    ]
    if layer.kind is LayerKind.SWA:
        return tuple(caches)
    compressors = [(CacheRole.COMPRESSED, row, kv_alignment, CacheRole.STATE, config.head_dim)]
    if layer.kind is LayerKind.CSA:
        keys = index_row(config, formats)
        compressors.append((CacheRole.INDEX_KEY, keys, index_alignment, CacheRole.INDEX_STATE, config.index_head_dim))
    for role, entry_row, alignment, state_role, head_dim in compressors:
        caches.append(
            CacheSpec(
                role=role,
                row=entry_row,
                page_tokens=PAGE_TOKENS,
                tokens_per_row=layer.compress_ratio,
                alignment=alignment,
                tail_bytes=summary_bytes(head_dim) if mapping is StateMapping.SUMMARY and layer.overlap == 2 else 0,
            )
        )
        if mapping is StateMapping.SUMMARY:
            caches.append(_page_per_request(state_role, summary_row(layer, head_dim, drafted), formats))
        else:
            caches.append(_raw_state(layer, state_role, head_dim, formats, mapping))
    return tuple(caches)


def _page_per_request(role: CacheRole, row: RowFormat, formats: CacheFormats) -> CacheSpec:
    return CacheSpec(
        role=role,
        row=row,
        page_tokens=PAGE_TOKENS,
        tokens_per_row=PAGE_TOKENS,
        alignment=formats.alignment,
        per_request=True,
    )


def _raw_state(
    layer: LayerSpec, role: CacheRole, head_dim: int, formats: CacheFormats, mapping: StateMapping
) -> CacheSpec:
    row, window = state_row(layer, head_dim), state_window(layer)
    if mapping is StateMapping.RING:
        return CacheSpec(role=role, row=row, page_tokens=layer.compress_ratio, sliding_window=window)
    tokens = STATE_PAGE_TOKENS[layer.kind]
    return CacheSpec(role=role, row=row, page_tokens=tokens, sliding_window=window, alignment=formats.alignment)


@dataclass(frozen=True)
class StatePlace:
    """Where a cache keeps what belongs to a request: in one of the request's pages, at a byte.

    owner: index of the first layer that keeps anything there, which the page is named after
    """

    owner: int
    offset: int


@dataclass(frozen=True)
class StateArena:
    """A request's SUMMARY state of all layers, in pages of one size: each has room for one layer of
    every compressed kind. vLLM, which deals pages out to its groups, loses some of several sizes.

    places: by layer index and role
    """

    page: CacheSpec
    places: Mapping[tuple[int, CacheRole], StatePlace]


def state_arena(config: V4Config, formats: CacheFormats, drafted: int = 0) -> StateArena | None:
    """None for a model without compressed layers."""
    offsets: dict[LayerKind, dict[CacheRole, int]] = {}
    members: dict[LayerKind, list[LayerSpec]] = {}
    size = 0
    for layer in config.layers:
        if layer.kind is LayerKind.SWA:
            continue
        members.setdefault(layer.kind, []).append(layer)
        if layer.kind not in offsets:
            offsets[layer.kind] = {}
            for cache in layer_caches(config, layer, formats, StateMapping.SUMMARY, drafted):
                if cache.per_request:
                    offsets[layer.kind][cache.role] = size
                    size += cache.row.row_bytes
    if not size:
        return None
    places = {
        (layer.index, role): StatePlace(owner=min(m[i].index for m in members.values() if i < len(m)), offset=offset)
        for kind, layers in members.items()
        for i, layer in enumerate(layers)
        for role, offset in offsets[kind].items()
    }
    return StateArena(_page_per_request(CacheRole.STATE, RowFormat(size), formats), places)


@dataclass(frozen=True)
class ModelCache:
    """One cache of the whole model. layers: indices of the decoder layers that keep something
    there; drafts follow the backbone.
    """

    layers: tuple[int, ...]
    spec: CacheSpec


def model_caches(
    config: V4Config, formats: CacheFormats, num_draft_layers: int, mapping: StateMapping, drafted: int = 0
) -> tuple[ModelCache, ...]:
    """In the order in which vLLM's layers register them: the first layer that needs a page of
    several layers' states does it for all."""
    arena = state_arena(config, formats, drafted) if mapping is StateMapping.SUMMARY else None
    members: dict[int, set[int]] = {}
    for (index, _), place in ({} if arena is None else arena.places).items():
        members.setdefault(place.owner, set()).add(index)
    found = []
    for layer in (*config.layers, *config.draft_layers[:num_draft_layers]):
        for spec in layer_caches(config, layer, formats, mapping, drafted):
            if not spec.per_request:
                found.append(ModelCache((layer.index,), spec))
            elif arena is not None and layer.index in members:
                found.append(ModelCache(tuple(sorted(members.pop(layer.index))), arena.page))
    return tuple(found)
