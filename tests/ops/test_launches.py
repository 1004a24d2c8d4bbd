# SPDX-License-Identifier: Apache-2.0
"""Decode launches of our own kernels per layer, counted: at most 12 in a CSA layer, 8 in an HCA
layer, 6 in a window layer.

The engine's GEMMs and experts are not counted, nor the rotary tables and slots, which a step builds
once for all layers.
"""

from __future__ import annotations

import pytest
import torch
from triton.runtime.interpreter import GridExecutor

from dsv4.model.kv_layout import IndexFormat, KvFormat, StateMapping
from dsv4.ops import attention, indexer, mhc
from dsv4.ops.compressor import paged as compressor
from dsv4.ops.compressor import summary
from dsv4.ops.compressor.projected import EntryStep, Projected
from dsv4.ops.indexer.topk_triton import topk
from dsv4.ops.pages import BatchView, PageTable, Selection, SlotMapping
from tests.support.kernel_cases import fill_pages, make_pages

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
    fn, base, scale = torch.randn(24, 4 * DIM), torch.randn(24), torch.rand(3)
    site = mhc.Site(fn, base, scale, torch.ones(DIM), rms_eps=EPS, hc_eps=EPS, iters=ITERS)
    y, post, comb = torch.randn(T, DIM).bfloat16(), torch.rand(T, 4), torch.rand(T, 4, 4)
    return mhc.pre(mhc.PendingPost(streams, y, post, comb), site).streams


def pool(ratio: int, caches: list[tuple[int, KvFormat | IndexFormat]], mapping: StateMapping) -> None:
    """One token of each of two requests: the first completes an entry, and ends a page."""
    overlap = 2 if ratio == 4 else 1
    positions, request = torch.tensor([255, 126]), torch.arange(T, dtype=torch.int32)
    entry_slots, table = torch.tensor([3, -1], dtype=torch.int32), torch.arange(80, dtype=torch.int32).view(2, 40)
    step = EntryStep(
        positions=positions,
        request_of_token=request,
        ratio=ratio,
        overlap=overlap,
        eps=EPS,
        entry_cos_sin=torch.zeros(T, 64),
    )
    paged, summarised = [], []
    for dim, row_format in caches:
        kv, ape, cache = (
            torch.randn(T, overlap * dim),
            torch.randn(ratio, overlap * dim),
            make_pages(row_format, 2, 64, dim),
        )
        projected = Projected(kv, kv, ape, torch.ones(dim))
        pages = make_pages(KvFormat.PLAIN, 80, 8, 2 * overlap * dim, torch.float32)
        fill_pages(pages, torch.arange(640), torch.randn(640, 2 * overlap * dim), 0)
        slots = torch.tensor([255, 446], dtype=torch.int32)
        entries = SlotMapping(cache, entry_slots)
        paged.append(compressor.PagedState(projected, SlotMapping(pages, slots), table, entries))
        summarised.append(
            summary.SummaryState(
                projected,
                kept=summary.SummaryPages(torch.rand(2, overlap, 3, dim)),
                state_page=request,
                tail=torch.zeros(2, 3, dim) if overlap == 2 else None,
                block_table=request[:, None],
                entries=entries,
            )
        )
    if mapping is StateMapping.PAGED:
        compressor.update(paged, step)
    else:
        starts = torch.arange(T + 1, dtype=torch.int32)
        summary.compress(summarised, step, BatchView(starts, (positions + 1).int(), T, T, 256, 1))


def decode_layer(kind: str, mapping: StateMapping, max_tokens: int) -> None:
    """What one layer of the model calls, on one token of each of two requests, with room for a
    context of max_tokens."""
    streams = mix_streams(torch.randn(T, 4, DIM).bfloat16())
    q, kv, table = torch.randn(T, HEADS, 512).bfloat16(), torch.randn(T, 512).bfloat16(), torch.randn(T, 64)
    window = make_pages(KvFormat.FP8_DS_MLA, 4, 64, 512)
    fill_pages(window, torch.arange(256), torch.randn(256, 512), 64)
    q = attention.norm_rope_store(
        q, kv, torch.ones(512), EPS, table, SlotMapping(window, torch.tensor([5, 200], dtype=torch.int32))
    )
    slots, lens = torch.arange(256, dtype=torch.int32).view(2, 128), torch.full((T,), 128, dtype=torch.int32)
    entries, rows = None, torch.arange(T, dtype=torch.int32)
    if kind != "window":
        index = [(128, IndexFormat.FP8)] if kind == "csa" else []
        pool(4 if kind == "csa" else 128, [(512, KvFormat.FP8_DS_MLA), *index], mapping)
        entry_slots, entry_lens = (
            torch.arange(2 * TOPK, dtype=torch.int32).view(T, TOPK) % 256,
            torch.tensor([70, 200], dtype=torch.int32),
        )
        entries = Selection(window, entry_slots, entry_lens, rows)
    if kind == "csa":
        keys = make_pages(IndexFormat.FP8, 20, 64, 128)
        fill_pages(keys, torch.arange(1280), torch.randn(1280, 128), 0)
        query = indexer.prepare_query(torch.randn(T, 16, 128).bfloat16(), torch.randn(T, 16), table, IndexFormat.FP8)
        pages = torch.arange(20, dtype=torch.int32).view(2, 10)
        entries = indexer.select(
            query,
            PageTable(keys, pages),
            PageTable(window, pages % 4),
            rows,
            torch.tensor([600, 70], dtype=torch.int32),
            max_entries=max_tokens // 4,
            k=TOPK,
        )
    o, _ = attention.sparse_attention(q, Selection(window, slots, lens), entries, torch.zeros(HEADS), table)
    attention.output_a(o, None, torch.randn(2, 16, 4 * 512).bfloat16())
    mix_streams(streams)


MIX = ["post_project", "pre"]
LIMIT = {"window": 6, "hca": 8, "csa": 12}


def expected(kind: str, mapping: StateMapping, max_tokens: int) -> list[str]:
    select = (
        ["prepare_query", "decode_logits", "topk", *(["topk"] if max_tokens > 32_768 else [])] if kind == "csa" else []
    )
    pooling = [] if kind == "window" else ["compress_store" if mapping is StateMapping.PAGED else "summary"]
    combine = [] if kind == "window" else ["combine"]
    return [*MIX, "norm_rope_store", *pooling, *select, "attend", *combine, *MIX]


# Only a CSA layer's launches depend on the context.
CONTEXTS = [("window", 2400), ("hca", 2400), *(("csa", n) for n in (2400, 32_768, 32_772, 524_292, 1_048_576))]


@pytest.mark.parametrize("mapping", list(StateMapping))
@pytest.mark.parametrize(("kind", "max_tokens"), CONTEXTS)
def test_a_decode_layer_launches_no_more_than_its_limit(
    kind: str, max_tokens: int, mapping: StateMapping, launches: list[str]
) -> None:
    decode_layer(kind, mapping, max_tokens)
    assert launches == expected(kind, mapping, max_tokens)
    assert len(launches) <= LIMIT[kind]


@pytest.mark.parametrize(
    ("k", "entries", "count"),
    [(512, 8192, 1), (512, 8193, 2), (1024, 16_384, 1), (1024, 16_385, 2)]
    + [(k, n, 2) for k in (512, 1024) for n in (131_073, 262_144)],
)
def test_top_k_takes_a_second_launch_for_more_than_a_chunk_and_never_a_third(
    k: int, entries: int, count: int, launches: list[str]
) -> None:
    """262,144 entries are those of 1,048,576 tokens."""
    topk(torch.randn(1, entries), torch.tensor([1500], dtype=torch.int32), k)
    assert launches == ["topk"] * count
