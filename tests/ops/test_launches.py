# SPDX-License-Identifier: Apache-2.0
"""Decode launches of our own kernels per layer, counted: at most 12 in a CSA layer, 8 in an HCA layer, 6 in a window layer.

The engine's GEMMs and experts are not counted, nor the rotary tables and slots, which a step builds once for all layers.
"""

from __future__ import annotations

import pytest
import torch
from triton.runtime.interpreter import GridExecutor

from dsv4.kv_layout import IndexFormat, KvFormat
from dsv4.ops import attention, compressor, indexer, mhc
from dsv4.ops.indexer.topk import topk
from kernel_cases import fill_pages, make_pages

DIM, HEADS, TOPK, T = 64, 8, 512, 2
EPS, ITERS = 1e-6, 2


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels launched, in order."""
    names: list[str] = []
    run = GridExecutor.__call__

    def counted(self: GridExecutor, *args: object, **kwargs: object) -> None:
        names.append(self.fn.__name__.removesuffix("_kernel"))
        run(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", counted)
    return names


def mix_streams(streams: torch.Tensor) -> torch.Tensor:
    """One site: the sublayer before is spread, this one's input collapsed."""
    parameters = (torch.randn(24, 4 * DIM), torch.randn(24), torch.rand(3), torch.ones(DIM))
    y, post, comb = torch.randn(T, DIM).bfloat16(), torch.rand(T, 4), torch.rand(T, 4, 4)
    return mhc.post_pre(streams, y, post, comb, *parameters, EPS, EPS, ITERS)[0]


def pool(ratio: int, dim: int, row_format: KvFormat | IndexFormat) -> None:
    overlap = 2 if ratio == 4 else 1
    state = make_pages(KvFormat.PLAIN, 40, 8, 2 * overlap * dim, torch.float32)
    fill_pages(state, torch.arange(320), torch.randn(320, 2 * overlap * dim), 0)
    positions, request = torch.tensor([127, 126]), torch.arange(T, dtype=torch.int32)
    table = torch.arange(40, dtype=torch.int32).view(2, 20)
    slots = torch.tensor([127, 286], dtype=torch.int32)
    kv = torch.randn(T, overlap * dim)
    cache = make_pages(row_format, 2, 64, dim)
    entry_slots = torch.tensor([3, -1], dtype=torch.int32)
    ape = torch.randn(ratio, overlap * dim)
    compressor.update(
        kv, kv, ape, positions, request, state, slots, table, entry_slots, overlap, torch.ones(dim), EPS, torch.zeros(T, 64), cache
    )


def decode_layer(kind: str) -> None:
    """What one layer of the model calls, on one token of each of two requests."""
    streams = mix_streams(torch.randn(T, 4, DIM).bfloat16())
    q, kv, table = torch.randn(T, HEADS, 512).bfloat16(), torch.randn(T, 512).bfloat16(), torch.randn(T, 64)
    window = make_pages(KvFormat.FP8_DS_MLA, 4, 64, 512)
    fill_pages(window, torch.arange(256), torch.randn(256, 512), 64)
    q = attention.norm_rope_store(q, kv, torch.ones(512), EPS, table, window, torch.tensor([5, 200], dtype=torch.int32))
    slots, lens = torch.arange(256, dtype=torch.int32).view(2, 128), torch.full((T,), 128, dtype=torch.int32)
    entries = entry_slots = rows = entry_lens = None
    if kind != "window":
        pool(4 if kind == "csa" else 128, 512, KvFormat.FP8_DS_MLA)
        entries, rows = window, torch.arange(T, dtype=torch.int32)
        entry_slots, entry_lens = torch.arange(2 * TOPK, dtype=torch.int32).view(T, TOPK) % 256, torch.tensor([70, 200], dtype=torch.int32)
    if kind == "csa":
        pool(4, 128, IndexFormat.FP8)
        keys = make_pages(IndexFormat.FP8, 20, 64, 128)
        fill_pages(keys, torch.arange(1280), torch.randn(1280, 128), 0)
        query = indexer.prepare_query(torch.randn(T, 16, 128).bfloat16(), torch.randn(T, 16), table, IndexFormat.FP8)
        pages = torch.arange(20, dtype=torch.int32).view(2, 10)
        entry_slots = indexer.select(query, keys, pages, rows, torch.tensor([600, 70], dtype=torch.int32), 600, TOPK, pages % 4, 64)
    o, _ = attention.sparse_attention(q, window, slots, lens, entries, entry_slots, rows, entry_lens, torch.zeros(HEADS), 64, table)
    attention.output_a(o, None, torch.randn(2, 16, 4 * 512).bfloat16())
    mix_streams(streams)


MIX = ["post_project", "pre"]
EXPECTED = {
    "window": [*MIX, "norm_rope_store", "attend", *MIX],
    "hca": [*MIX, "norm_rope_store", "compress_store", "attend", "combine", *MIX],
    "csa": [
        *MIX, "norm_rope_store", "compress_store", "compress_store", "prepare_query", "decode_logits", "topk", "attend", "combine", *MIX,
    ],
}  # fmt: skip
LIMIT = {"window": 6, "hca": 8, "csa": 12}


@pytest.mark.parametrize("kind", list(EXPECTED))
def test_a_decode_layer_launches_no_more_than_its_limit(kind: str, launches: list[str]) -> None:
    decode_layer(kind)
    assert launches == EXPECTED[kind]
    assert len(launches) <= LIMIT[kind]


@pytest.mark.parametrize(("entries", "count"), [(8192, 1), (8193, 2), (131_072, 2), (262_144, 3)])
def test_top_k_of_long_contexts_takes_more_launches(entries: int, count: int, launches: list[str]) -> None:
    topk(torch.randn(1, entries), torch.tensor([600], dtype=torch.int32), TOPK)
    assert launches == ["topk"] * count
