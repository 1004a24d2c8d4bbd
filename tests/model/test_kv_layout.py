# SPDX-License-Identifier: Apache-2.0
"""Sizes are those that native vLLM allocates for the real checkpoints, measured in its own
allocator."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from dsv4.model.config import LayerKind, V4Config
from dsv4.model.kv_layout import (
    CacheFormats,
    CacheRole,
    IndexFormat,
    KvFormat,
    StateMapping,
    layer_caches,
    state_arena,
)

CONFIGS = Path(__file__).parents[1] / "golden" / "configs"
FLASH = V4Config.from_path(CONFIGS / "DeepSeek-V4-Flash.json")
PRO = V4Config.from_path(CONFIGS / "DeepSeek-V4-Pro.json")
FP8 = CacheFormats(KvFormat.FP8_DS_MLA, IndexFormat.FP8)
PLAIN = CacheFormats(KvFormat.PLAIN, IndexFormat.FP8)
SWA, CSA, HCA = (next(layer for layer in FLASH.layers if layer.kind is kind) for kind in LayerKind)


def page_bytes(layer, formats):
    return {cache.role: cache.page_bytes for cache in layer_caches(FLASH, layer, formats)}


@pytest.mark.parametrize(("formats", "window"), [(FP8, 37440), (PLAIN, 65536)])
def test_a_sliding_layer_has_its_window_only(formats, window):
    assert page_bytes(SWA, formats) == {CacheRole.WINDOW: window}


@pytest.mark.parametrize(
    ("formats", "sizes"), [(FP8, (37440, 37440, 32832, 8640, 8640)), (PLAIN, (65536, 65536, 32768, 8704, 8192))]
)
def test_pages_of_a_csa_layer_have_native_vllms_size(formats, sizes):
    roles = (CacheRole.WINDOW, CacheRole.COMPRESSED, CacheRole.STATE, CacheRole.INDEX_KEY, CacheRole.INDEX_STATE)
    assert page_bytes(CSA, formats) == dict(zip(roles, sizes, strict=True))


@pytest.mark.parametrize(("formats", "sizes"), [(FP8, (37440, 1728, 32832)), (PLAIN, (65536, 2048, 32768))])
def test_pages_of_an_hca_layer_have_native_vllms_size(formats, sizes):
    roles = (CacheRole.WINDOW, CacheRole.COMPRESSED, CacheRole.STATE)
    assert page_bytes(HCA, formats) == dict(zip(roles, sizes, strict=True))


@pytest.mark.parametrize(
    ("kv", "index", "row"),
    [("plain", "plain", (1024, 256)), ("fp8_ds_mla", "mxfp4", (584, 68)), ("plain", "fp8", (1024, 132))],
)
def test_bytes_of_one_row(kv, index, row):
    caches = {c.role: c.row.row_bytes for c in layer_caches(FLASH, CSA, CacheFormats(KvFormat(kv), IndexFormat(index)))}
    assert (caches[CacheRole.COMPRESSED], caches[CacheRole.INDEX_KEY]) == row


@pytest.mark.parametrize(
    ("config", "kv", "index", "bytes_per_token"),
    [
        (FLASH, "fp8_ds_mla", "fp8", 3850.25),
        (FLASH, "fp8_ds_mla", "mxfp4", 3514.25),
        (FLASH, "plain", "plain", 6880.0),
        (PRO, "fp8_ds_mla", "fp8", 5511.44),
        (PRO, "plain", "plain", 9848.0),
    ],
)
def test_bytes_per_token_that_grow_with_the_context_equal_the_specs_table(config, kv, index, bytes_per_token):
    formats = CacheFormats(KvFormat(kv), IndexFormat(index))
    total = sum(
        cache.row.row_bytes / cache.tokens_per_row
        for layer in config.layers
        for cache in layer_caches(config, layer, formats)
        if cache.sliding_window is None
    )
    assert total == pytest.approx(bytes_per_token, abs=0.005)


@pytest.mark.parametrize("formats", [FP8, PLAIN, CacheFormats(KvFormat.PLAIN, IndexFormat.PLAIN, itemsize=4)])
def test_rows_then_scales_fit_in_an_aligned_page(formats):
    for layer in (SWA, CSA, HCA):
        for cache in layer_caches(FLASH, layer, formats):
            assert cache.page_bytes % cache.alignment == 0
            scale_offset = cache.rows_per_page * cache.row.value_bytes
            assert scale_offset + cache.rows_per_page * cache.row.scale_bytes <= cache.page_bytes
            assert cache.page_bytes - cache.rows_per_page * cache.row.row_bytes < cache.alignment


@pytest.mark.parametrize("config", [FLASH, PRO], ids=["flash", "pro"])
@pytest.mark.parametrize("drafted", range(8))
def test_states_that_share_a_page_lie_beside_each_other(config: V4Config, drafted: int) -> None:
    """Those of every compressed layer are somewhere, in one page each, and none over another."""
    arena = state_arena(config, FP8, drafted)
    assert arena is not None
    taken: dict[int, list[tuple[int, int]]] = {}
    for layer in config.layers:
        for spec in layer_caches(config, layer, FP8, StateMapping.SUMMARY, drafted):
            if spec.per_request:
                place = arena.places[layer.index, spec.role]
                taken.setdefault(place.owner, []).append((place.offset, place.offset + spec.row.row_bytes))
    assert sum(map(len, taken.values())) == len(arena.places)
    for parts in taken.values():
        parts.sort()
        assert parts[0][0] == 0
        assert all(end <= start for (_, end), (start, _) in pairwise(parts))
        assert parts[-1][1] <= arena.page.page_bytes
