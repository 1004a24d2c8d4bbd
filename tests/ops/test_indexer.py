# SPDX-License-Identifier: Apache-2.0
"""Index queries, scores and selection equal the references'."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dsv4.model.kv_layout import IndexFormat, KvFormat
from dsv4.ops import indexer, registry
from dsv4.ops.indexer import reference
from dsv4.ops.indexer import topk_triton as topk_kernels
from dsv4.ops.indexer.query import IndexQuery
from dsv4.ops.pages import PageTable, Selection, load_rows
from dsv4.ops.quant.reference import dequantize_e2m1, hadamard, quantize_e2m1, quantize_e4m3
from dsv4.ops.rope import apply_rope, cos_sin
from tests.support.kernel_cases import assert_within, fill_pages, make_pages

FREQ = 1.6e5 ** (-torch.arange(0, 64, 2) / 64)
CPU = torch.device("cpu")


def queries(num_tokens: int, num_heads: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    table = cos_sin(torch.randint(0, 1_000_000, (num_tokens,)), FREQ)
    return torch.randn(num_tokens, num_heads, 128).to(dtype), torch.randn(num_tokens, num_heads).to(dtype), table


@pytest.mark.parametrize(("num_tokens", "num_heads"), [(1, 64), (2, 16), (63, 16), (63, 64), (257, 8)])
@pytest.mark.parametrize("index_format", list(IndexFormat))
def test_prepared_queries_are_the_references(num_tokens: int, num_heads: int, index_format: IndexFormat) -> None:
    q, weights, table = queries(num_tokens, num_heads)
    got, want = (
        prepare(q, weights, table, index_format) for prepare in (indexer.prepare_query, reference.prepare_query)
    )
    if index_format is IndexFormat.PLAIN:
        assert_within(got.values, apply_rope(q.float(), table), want.values)
        assert torch.equal(got.weights, want.weights)
        return
    # A sum of 128 bf16 numbers in another order may round to the neighbouring bf16, which may
    # quantise to another code.
    row = hadamard(apply_rope(q, table)).bfloat16().float()
    near = [row * f for f in (1.0, 1 + 2.0**-8, 1 - 2.0**-8)]
    if index_format is IndexFormat.FP8:
        options = [quantize_e4m3(x, 128)[0] for x in near]
        torch.testing.assert_close(got.weights, want.weights, rtol=2.0**-23, atol=0)
        assert (got.weights == want.weights).all(), "scales are powers of two"
    else:
        options = [quantize_e2m1(x)[0] for x in near]
        assert torch.equal(got.weights, want.weights)
        assert torch.equal(got.scales, want.scales)
    assert (got.values == want.values).float().mean() > 0.995
    if index_format is IndexFormat.FP8:
        assert torch.stack([got.values == o for o in options]).any(0).all()
    else:
        ones = torch.full_like(got.scales, 127)
        assert (
            torch.stack([dequantize_e2m1(got.values, ones) == dequantize_e2m1(o, ones) for o in options]).any(0).all()
        )


def keys_of(
    index_format: IndexFormat, lens: list[int], rows: int = 64, dtype: torch.dtype = torch.bfloat16
) -> PageTable:
    """Random keys of requests of these lengths on shuffled pages, NaN everywhere else, and the
    block table [R, n]."""
    width = max(1, -(-max(lens) // rows))
    pages = make_pages(index_format, len(lens) * width + 1, rows, 128, dtype)
    table = torch.randperm(len(lens) * width).int().view(len(lens), width) + 1
    for r, n in enumerate(lens):
        entry = torch.arange(n)
        fill_pages(pages, table[r, entry // rows] * rows + (entry % rows).int(), torch.randn(n, 128) * 2, 0)
    return PageTable(pages, table)


def check_scores(query: IndexQuery, keys: PageTable, request: Tensor, lens: Tensor, max_entries: int) -> None:
    got = registry.OPERATORS["indexer.logits"].choice(CPU).function(query, keys, request, lens, max_entries)
    want = reference.logits(query, keys, request, lens, max_entries)
    valid = torch.arange(max_entries) < lens[:, None]
    assert got.shape == want.shape
    # Products of quantised numbers are exact in fp32; the two sums (128 channels, then the heads)
    # come in another order: (128 + Hi) roundings of 2**-24, of the sum of magnitudes.
    q = reference.query_values(query)
    bound = torch.zeros_like(want)
    for t in range(lens.shape[0]):
        entry = torch.arange(int(lens[t]))
        rows = keys.pages.rows
        k = load_rows(keys.pages, keys.block_table[request[t], entry // rows] * rows + entry % rows, 128, 0)
        bound[t, : len(entry)] = query.weights[t].abs() @ (q[t].abs() @ k.abs().T)
    error = (got - want).abs()
    allowed = bound * (128 + query.weights.shape[1]) * 2.0**-24
    assert (error[valid] <= allowed[valid]).all()


@pytest.mark.parametrize("index_format", list(IndexFormat))
@pytest.mark.parametrize("num_heads", [16, 64])
def test_decode_scores(index_format: IndexFormat, num_heads: int) -> None:
    """Several query tokens per request, lengths at and around page ends, an empty row."""
    lens = torch.tensor([129, 130, 64, 0, 1, 63], dtype=torch.int32)
    request = torch.tensor([0, 0, 1, 2, 2, 3], dtype=torch.int32)
    keys = keys_of(index_format, [130, 64, 1, 63])
    query = reference.prepare_query(*queries(6, num_heads), index_format)
    check_scores(query, keys, request, lens, 130)


@pytest.mark.parametrize("index_format", list(IndexFormat))
@pytest.mark.parametrize("rows", [2, 32, 128])
def test_scores_of_pages_of_any_size(index_format: IndexFormat, rows: int) -> None:
    """A tile of keys is several pages, or part of one."""
    lens = torch.tensor([129, 130, 64, 1], dtype=torch.int32)
    request = torch.tensor([0, 0, 1, 1], dtype=torch.int32)
    keys = keys_of(index_format, [130, 64], rows)
    check_scores(reference.prepare_query(*queries(4, 16), index_format), keys, request, lens, 130)


@pytest.mark.parametrize("index_format", list(IndexFormat))
def test_prefill_scores_share_keys_between_neighbours(index_format: IndexFormat) -> None:
    """Blocks of tokens inside one request and across three, with a last block that is not full."""
    counts = [30, 1, 18]
    request = torch.repeat_interleave(torch.arange(3), torch.tensor(counts)).int()
    lens = torch.cat([torch.arange(c) * 7 // 2 + i for i, c in enumerate(counts)]).int()
    keys = keys_of(index_format, [106, 2, 64])
    query = reference.prepare_query(*queries(49, 16), index_format)
    check_scores(query, keys, request, lens, 106)


@pytest.mark.parametrize("index_format", list(IndexFormat))
@pytest.mark.parametrize("requests", [1, 64], ids=["prefill", "decode"])
def test_scores_of_257_tokens(index_format: IndexFormat, requests: int) -> None:
    """64 requests are too many for neighbours to share keys. Lengths around page ends, empty rows
    and rows of one among them."""
    lens = torch.arange(257, dtype=torch.int32) * 7 % 131
    request = (torch.arange(257) * requests // 257).int()
    keys = keys_of(index_format, [130] * requests)
    check_scores(reference.prepare_query(*queries(257, 8), index_format), keys, request, lens, 130)


def test_prefill_scores_stay_inside_their_rows() -> None:
    """Rows of 112 lie side by side, and the last tile of keys reaches over the end."""
    keys = keys_of(IndexFormat.FP8, [112])
    query = reference.prepare_query(*queries(20, 16), IndexFormat.FP8)
    check_scores(query, keys, torch.zeros(20, dtype=torch.int32), torch.full((20,), 112, dtype=torch.int32), 112)


def test_fp32_keys_for_the_cpu_platform() -> None:
    lens = torch.tensor([5, 70], dtype=torch.int32)
    keys = keys_of(IndexFormat.PLAIN, [5, 70], dtype=torch.float32)
    query = reference.prepare_query(*queries(2, 16, torch.float32), IndexFormat.PLAIN)
    check_scores(query, keys, torch.tensor([0, 1], dtype=torch.int32), lens, 70)


def test_block_table_entries_out_of_range_are_not_followed() -> None:
    keys = keys_of(IndexFormat.FP8, [64])
    bad = replace(keys, block_table=torch.cat([keys.block_table, torch.tensor([[1 << 30]], dtype=torch.int32)], 1))
    query = reference.prepare_query(*queries(1, 16), IndexFormat.FP8)
    score = registry.OPERATORS["indexer.logits"].choice(CPU).function
    request = torch.zeros(1, dtype=torch.int32)
    got = score(query, bad, request, torch.tensor([90], dtype=torch.int32), 128)
    expected = score(query, keys, request, torch.tensor([64], dtype=torch.int32), 64)
    assert torch.equal(got[:, :64], expected)
    assert (got[:, 64:90] == 0).all()


# ---- selection -----------------------------------------------------------------------------


def check_topk(scores: Tensor, lens: Tensor, k: int) -> None:
    got = registry.OPERATORS["indexer.topk"].choice(CPU).function(scores, lens, k)
    want = reference.topk(scores, lens, k)
    big = 1 << 30
    in_order = torch.where(want < 0, big, want).sort(-1).values
    assert torch.equal(got, torch.where(in_order == big, -1, in_order)), (
        "another set, or not in index order with -1 last"
    )


@pytest.mark.parametrize(
    ("n", "k", "lens"),
    [
        (1, 16, [0, 1]),
        (16, 16, [0, 15, 16]),
        (300, 16, [0, 1, 16, 17, 299, 300]),
        (2048, 512, [513, 2048, 512]),
        (2049, 512, [2049, 2048, 3]),
        (8193, 512, [8193, 8192, 8191, 513, 512, 511, 1, 0]),
        (40_000, 1024, [40_000, 1025, 16_384, 1024]),
    ],
)
def test_the_largest_are_chosen_exactly(n: int, k: int, lens: list[int]) -> None:
    scores = torch.randn(len(lens), n)
    at = torch.arange(n) >= torch.tensor(lens)[:, None]
    scores[at] = float("nan")  # what lies beyond a row's length means nothing
    check_topk(scores, torch.tensor(lens, dtype=torch.int32), k)


def test_257_rows_at_once() -> None:
    check_topk(torch.randn(257, 20), torch.arange(257, dtype=torch.int32) % 21, 16)


@pytest.mark.parametrize(("n", "k"), [(20_000, 512), (40_000, 2048), (262_144, 512), (262_144, 1024), (262_145, 1024)])
def test_long_rows_up_to_a_million_tokens_and_beyond(n: int, k: int) -> None:
    """The last launch takes 2048, 8192 or 16,384 candidates; what is more than that is reduced by
    one launch more."""
    scores = torch.randn(2, n)
    scores[1] = scores[1].round()  # nothing but ties
    check_topk(scores, torch.tensor([n, n - 8191], dtype=torch.int32), k)
    check_topk(scores, torch.tensor([8193, k + 1], dtype=torch.int32), k)


def test_ranks_that_chose_nothing_merge_to_nothing() -> None:
    nothing = torch.empty(3, 0, dtype=torch.int32)
    assert torch.equal(topk_kernels.merge(nothing.float(), nothing, 4), torch.full((3, 4), -1, dtype=torch.int32))


def test_ranks_choices_merge_in_two_launches_too() -> None:
    """Candidates of 40 ranks, most of which have fewer than k: index -1 behind them."""
    k, ranks = 512, 40
    scores, indices = torch.randn(2, ranks * k).round(), torch.arange(ranks * k, dtype=torch.int32).repeat(2, 1)
    indices[:, torch.arange(ranks * k) % k >= 200] = -1
    indices[1, k:] = -1
    got = topk_kernels.merge(scores, indices, k)
    for row, candidates, chosen in zip(scores, indices, got, strict=True):
        valid = candidates[candidates >= 0].long()
        order = row[valid].sort(descending=True, stable=True).indices[:k]
        assert chosen[: len(order)].tolist() == valid[order].sort().values.tolist()
        assert (chosen[len(order) :] == -1).all()


def test_ties_go_to_the_lowest_index() -> None:
    scores = torch.zeros(5, 9000)
    scores[1] = -torch.zeros(9000)  # -0 equals 0
    scores[1, ::2] = 0.0
    scores[2, 5000:] = 1.0
    scores[3] = float("-inf")  # valid entries all the same
    scores[4, 100:8900] = float("-inf")
    check_topk(scores, torch.full((5,), 9000, dtype=torch.int32), 600)


def test_nan_and_infinity_order_as_in_torch() -> None:
    scores = torch.randn(2, 9000)
    scores[:, 77] = float("nan")
    scores[1, 8999] = -float("nan")
    scores[:, 5] = float("inf")
    check_topk(scores, torch.full((2,), 9000, dtype=torch.int32), 16)


def test_a_row_stride_larger_than_the_row() -> None:
    scores = torch.randn(3, 8300)[:, :8200]
    check_topk(scores, torch.tensor([8200, 4, 8000], dtype=torch.int32), 64)


def test_scores_of_ranks_that_split_a_request_merge_to_the_same_choice() -> None:
    """Each rank scores whole pages by its part of the block table; the merge keeps ties at the
    lowest index."""
    lens = torch.tensor([300, 200, 70, 10], dtype=torch.int32)
    keys = keys_of(IndexFormat.FP8, [300])
    query = reference.prepare_query(*queries(4, 16), IndexFormat.FP8)
    request, k = torch.zeros(4, dtype=torch.int32), 32
    score, choose = (
        registry.OPERATORS["indexer.logits"].choice(CPU).function,
        registry.OPERATORS["indexer.topk"].choice(CPU).function,
    )
    whole = choose(score(query, keys, request, lens, 300), lens, k)
    scores, indices = [], []
    for first, last in ((0, 2), (2, 5)):
        part = (lens - first * 64).clamp(0, (last - first) * 64)
        logits = score(
            query, replace(keys, block_table=keys.block_table[:, first:last]), request, part, (last - first) * 64
        )
        chosen = choose(logits, part, k)
        scores.append(logits.gather(1, chosen.clamp(min=0).long()))
        indices.append(torch.where(chosen >= 0, chosen + first * 64, -1))
    assert torch.equal(topk_kernels.merge(torch.cat(scores, 1), torch.cat(indices, 1), k), whole)


def entries_of(num_reqs: int, max_entries: int) -> PageTable:
    """An entry cache where entry j of every request is slot j, so that a selection's slots are
    indices."""
    width = -(-max_entries // 64)
    return PageTable(
        make_pages(KvFormat.PLAIN, width, 64, 512), torch.arange(width, dtype=torch.int32).repeat(num_reqs, 1)
    )


def test_selection_end_to_end() -> None:
    lens = torch.tensor([300, 299, 5, 0], dtype=torch.int32)
    request = torch.tensor([0, 0, 1, 1], dtype=torch.int32)
    keys = keys_of(IndexFormat.MXFP4, [300, 5])
    query = reference.prepare_query(*queries(4, 16), IndexFormat.MXFP4)
    entries = entries_of(2, 300)
    got = indexer.select(query, keys, entries, request, lens, max_entries=300, k=32)
    want = reference.topk(reference.logits(query, keys, request, lens, 300), lens, 32)
    assert got.pages is entries.pages
    assert got.row is None
    assert got.lens.tolist() == [32, 32, 5, 0]
    for a, b in zip(got.slots.tolist(), want.tolist(), strict=True):
        assert set(a) == set(b)


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("bytes_at_once", [indexer.INDEX_SCORES_BYTES, 5 * 304 * 4])
def test_ranks_that_share_the_tokens_choose_what_one_would(
    monkeypatch: pytest.MonkeyPatch, size: int, bytes_at_once: int
) -> None:
    """Bit for bit, whatever the share, and the scores of a rank are those of its share alone."""
    monkeypatch.setattr(indexer, "INDEX_SCORES_BYTES", bytes_at_once)
    tokens = 21
    lens = torch.arange(304 - tokens, 304, dtype=torch.int32)
    request = torch.zeros(tokens, dtype=torch.int32)
    keys, entries = keys_of(IndexFormat.FP8, [304]), entries_of(1, 304)
    query = reference.prepare_query(*queries(tokens, 16), IndexFormat.FP8)
    scored: list[int] = []

    def watched(query: indexer.IndexQuery, *args: object) -> Tensor:
        scored.append(query.weights.shape[0])
        return registry.OPERATORS["indexer.logits"](query, *args)

    monkeypatch.setattr(indexer, "logits", watched)

    def choose(ranks: indexer.Ranks | None) -> Selection:
        return indexer.select(query, keys, entries, request, lens, max_entries=304, k=32, ranks=ranks)

    whole = choose(None)
    told: list[Tensor] = []
    for rank in range(size):
        scored.clear()
        choose(indexer.Ranks(rank, size, lambda x: (told.append(x), x.repeat(size, 1))[1], when="on"))
        assert sum(scored) <= -(-tokens // (4 * size)) * 4
    shared = choose(indexer.Ranks(0, size, lambda x: torch.cat(told), when="on"))
    assert torch.equal(shared.slots, whole.slots)
    assert torch.equal(shared.lens, whole.lens)


@pytest.mark.parametrize(
    ("tokens", "context", "shared"),
    [(8192, 131_072, True), (8192, 8192, False), (512, 1 << 20, False), (1024, 16_384, True), (600, 16_384, False)],
)
def test_ranks_share_where_it_pays(tokens: int, context: int, shared: bool) -> None:
    """Not in a step that may have been captured, whose bound is the longest context."""
    assert indexer.Ranks(0, 8, lambda x: x).share(tokens, context // 4) is shared


def test_scores_are_taken_in_slices_no_larger_than_said(monkeypatch: pytest.MonkeyPatch) -> None:
    lens = torch.tensor([304, 303, 302, 5, 0], dtype=torch.int32)
    request = torch.tensor([0, 0, 0, 1, 1], dtype=torch.int32)
    keys = keys_of(IndexFormat.FP8, [304, 5])
    query = reference.prepare_query(*queries(5, 16), IndexFormat.FP8)
    entries = entries_of(2, 304)
    whole = indexer.select(query, keys, entries, request, lens, max_entries=304, k=32)
    monkeypatch.setattr(indexer, "INDEX_SCORES_BYTES", 2 * 304 * 4 + 1)
    taken: list[int] = []

    def watched(*args: object) -> Tensor:
        out = registry.OPERATORS["indexer.logits"](*args)
        taken.append(out.untyped_storage().nbytes())
        return out

    monkeypatch.setattr(indexer, "logits", watched)
    again = indexer.select(query, keys, entries, request, lens, max_entries=304, k=32)
    assert torch.equal(again.slots, whole.slots)
    assert torch.equal(again.lens, whole.lens)
    assert len(taken) == 3
    assert max(taken) <= indexer.INDEX_SCORES_BYTES


@pytest.mark.parametrize("n", [40, 9000])
def test_selection_as_slots_of_the_entry_cache(n: int) -> None:
    lens = torch.tensor([n, 17, 3, 0], dtype=torch.int32)
    request = torch.tensor([0, 1, 1, 2], dtype=torch.int32)
    scores, entries = (
        torch.randn(4, n),
        PageTable(make_pages(KvFormat.PLAIN, 3 * 200, 64, 1), torch.randperm(3 * 200).int().view(3, 200)),
    )
    choose = registry.OPERATORS["indexer.topk"].choice(CPU).function
    got = choose(scores, lens, 16, entries, request)
    want = reference.topk(scores, lens, 16, entries, request)
    assert [set(row) for row in got.tolist()] == [set(row) for row in want.tolist()]
    chosen = choose(scores, lens, 16)
    assert torch.equal(got < 0, chosen < 0), "-1 stays last"
