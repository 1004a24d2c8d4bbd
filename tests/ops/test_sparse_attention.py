# SPDX-License-Identifier: Apache-2.0
"""Attention over gathered rows equals the reference's, whatever the number of splits, and never
reads what it should not."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from dsv4.model.kv_layout import KvFormat
from dsv4.ops import attention
from dsv4.ops.attention import reference
from dsv4.ops.attention.split_kv import sparse_attention, splits_for
from dsv4.ops.kernels import pretending
from dsv4.ops.pages import Pages, Selection, load_rows
from dsv4.ops.rope import apply_rope, cos_sin
from tests.support.kernel_cases import assert_within, fill_pages, make_pages


@dataclass
class Case:
    """The operator's arguments."""

    q: Tensor
    window: Selection
    entries: Selection | None
    sink: Tensor

    def args(self) -> tuple[Tensor, Selection, Selection | None, Tensor]:
        return self.q, self.window, self.entries, self.sink


def keys_in(pages: Pages) -> tuple[Tensor, int]:
    """Random rows in half of the slots, the first and the last of a page among them, and the number
    of one of the others, which stay NaN."""
    num_slots = pages.data.shape[0] * pages.rows
    order = torch.randperm(num_slots - 2) + 1
    owned = torch.cat([torch.tensor([0, num_slots - 1]), order[: num_slots // 2 - 2]])
    fill_pages(pages, owned, torch.randn(owned.numel(), 512) * 2, 64)
    return owned.int(), int(order[-1])


def slots_of(num_lists: int, width: int, lens: Tensor, pages: Pages, holes: float = 0.0) -> Tensor:
    """Lists of owned slots of newly filled pages, of which a share is -1; beyond the length lie NaN
    rows."""
    owned, nobodys = keys_in(pages)
    slots = owned[torch.randint(0, owned.numel(), (num_lists, width))]
    slots = torch.where(torch.rand(num_lists, width) < holes, -1, slots)
    return torch.where(torch.arange(width) < lens[:, None], slots, nobodys).int()


def make(
    num_heads: int,
    window_lens: list[int],
    entry_lens: list[int] | None,
    row_format: KvFormat = KvFormat.FP8_DS_MLA,
    dtype: torch.dtype = torch.bfloat16,
    holes: float = 0.1,
    entry_rows: int = 64,
    width: int = 128,
) -> Case:
    num_tokens = len(window_lens)
    wl = torch.tensor(window_lens, dtype=torch.int32)
    q, sink = torch.randn(num_tokens, num_heads, 512).to(dtype), torch.randn(num_heads)
    window = make_pages(row_format, 5, 64, 512, dtype)
    case = Case(q, Selection(window, slots_of(num_tokens, width, wl, window), wl), None, sink)
    if entry_lens is not None:
        el = torch.tensor(entry_lens, dtype=torch.int32)
        entries = make_pages(row_format, 256 // entry_rows, entry_rows, 512, dtype)
        slots = slots_of(num_tokens, max(entry_lens) + 5, el, entries, holes)
        # One list per token, in another order than the tokens, as HCA's lists per request are.
        order = torch.randperm(num_tokens)
        case.entries = Selection(entries, slots[order], el, order.argsort().int())
    return case


def exact_and_low(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """o and LSE in fp64, and o in fp32 with the probabilities rounded to q's dtype as the official
    kernel does."""
    o = torch.zeros(case.q.shape, dtype=torch.float64)
    lse = torch.full(case.q.shape[:2], float("-inf"), dtype=torch.float64)
    low = torch.zeros(case.q.shape)
    for t in range(case.q.shape[0]):
        keys = []
        for keys_of in [case.window] if case.entries is None else [case.window, case.entries]:
            at = keys_of.slots[t if keys_of.row is None else keys_of.row[t]][: keys_of.lens[t]]
            keys.append(load_rows(keys_of.pages, at[(at >= 0) & (at < keys_of.pages.num_slots)], 512, 64))
        k = torch.cat(keys)
        if not k.numel():
            continue
        exact = case.q[t].double() @ k.double().T * 512**-0.5
        lse[t] = exact.logsumexp(-1)
        o[t] = torch.exp(exact - torch.logaddexp(lse[t], case.sink.double())[:, None]) @ k.double()
        scores = case.q[t].float() @ k.T * 512**-0.5
        m = scores.amax(-1, keepdim=True)
        p = (scores - m).exp()
        total = p.sum(-1, keepdim=True) + (case.sink[:, None] - m).exp()
        low[t] = (p.to(case.q.dtype).float() @ k) / total
    return o, lse, low.to(case.q.dtype)


def check(case: Case, num_splits: int | None) -> None:
    o, lse = sparse_attention(*case.args(), num_splits=num_splits)
    exact, exact_lse, low = exact_and_low(case)
    assert_within(o, exact, low, f"split {num_splits}")
    # The LSE sums fp32 exponentials of fp32 dot products of 512 exact products each: 512 roundings
    # of relative 2**-24.
    torch.testing.assert_close(lse.double(), exact_lse, rtol=512 * 2.0**-24, atol=512 * 2.0**-24)
    _, told_lse = reference.sparse_attention(*case.args())
    torch.testing.assert_close(told_lse.double(), exact_lse, rtol=512 * 2.0**-24, atol=512 * 2.0**-24)


@pytest.mark.parametrize("num_heads", [8, 16, 64, 128])
@pytest.mark.parametrize("num_splits", [1, 3])
def test_every_head_count_with_one_and_several_splits(num_heads: int, num_splits: int) -> None:
    check(make(num_heads, [128, 1], [17, 70]), num_splits)


@pytest.mark.parametrize("num_splits", [1, 2, 7])
def test_empty_rows_one_key_and_all_invalid(num_splits: int) -> None:
    case = make(8, [0, 1, 0, 128, 5, 0], [0, 0, 1, 33, 64, 9], holes=0.0)
    assert case.entries is not None
    assert case.entries.row is not None
    case.entries.slots[case.entries.row[5].long()] = -1  # a length, but no valid slot
    check(case, num_splits)
    o, lse = sparse_attention(*case.args(), num_splits=num_splits)
    assert (o[[0, 5]] == 0).all()
    assert (lse[[0, 5]] == float("-inf")).all()


@pytest.mark.parametrize("row_format", list(KvFormat))
def test_window_only_layers(row_format: KvFormat) -> None:
    check(make(16, [128, 64, 63], None, row_format), None)
    check(make(16, [128, 64, 63], None, row_format), 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_plain_rows(dtype: torch.dtype) -> None:
    check(make(8, [65, 128], [31, 32], KvFormat.PLAIN, dtype), 2)


def test_two_rows_a_page_as_hca_entries_have() -> None:
    check(make(8, [128, 128], [96, 3], entry_rows=2), 2)


@pytest.mark.parametrize("num_tokens", [1, 2, 63, 257])
def test_prefill_of_several_tokens(num_tokens: int) -> None:
    check(make(8, [min(t + 1, 16) for t in range(num_tokens)], [t // 4 % 9 for t in range(num_tokens)], width=16), 1)


@pytest.mark.slow
@pytest.mark.parametrize(("num_heads", "topk"), [(64, 512), (128, 1024)])
def test_flash_and_pro_decode_at_full_size(num_heads: int, topk: int) -> None:
    check(make(num_heads, [128, 128], [topk, topk - 1]), None)


@pytest.mark.slow
def test_prefill_of_257_tokens_with_whole_windows() -> None:
    check(make(8, [min(t + 1, 128) for t in range(257)], [t // 4 for t in range(257)]), 1)


def test_a_sink_much_larger_than_every_score() -> None:
    case = make(8, [4, 0], [2, 0])
    case.sink[:] = torch.tensor([1e4, -1e4, 0, 80, 100, 200, -1e30, 3])
    for num_splits in (1, 2):
        check(case, num_splits)


def test_slots_and_lengths_out_of_range_are_masked() -> None:
    case = make(8, [8, 8], [6, 6], holes=0.0)
    o, lse = attention.sparse_attention(*case.args())
    assert case.entries is not None
    slots = torch.cat([case.window.slots[:, :8], torch.full((2, 2), 1 << 30, dtype=torch.int32)], 1)
    case.window = replace(case.window, slots=slots, lens=torch.full((2,), 1 << 20, dtype=torch.int32))
    slots = torch.cat([case.entries.slots[:, :6], torch.full((2, 1), 256, dtype=torch.int32)], 1)
    case.entries = replace(case.entries, slots=slots, lens=torch.full((2,), 99, dtype=torch.int32))
    again, lse_again = attention.sparse_attention(*case.args())
    torch.testing.assert_close(again, o, rtol=2.0**-7, atol=2.0**-7)  # another split of the keys: one bf16 rounding
    torch.testing.assert_close(lse_again, lse, rtol=512 * 2.0**-24, atol=512 * 2.0**-24)


@pytest.mark.parametrize("num_splits", [1, 2])
@pytest.mark.parametrize("by_row", [False, True], ids=["own lists", "lists by row"])
def test_the_most_extreme_slots_are_skipped(num_splits: int, by_row: bool) -> None:
    """Kernel and reference read nothing by them, and a token with no other slots gets zeros."""
    case = make(8, [40, 40], [70, 70], holes=0.0)
    assert case.entries is not None
    if not by_row:
        assert case.entries.row is not None
        case.entries = Selection(case.entries.pages, case.entries.slots[case.entries.row.long()], case.entries.lens)
    extremes = torch.tensor([-(2**31), 2**31 - 1, case.window.pages.num_slots, -2], dtype=torch.int32)
    for selection in (case.window, case.entries):
        at = torch.arange(selection.slots.shape[1]) % 3 == 0
        selection.slots[:, at] = extremes[torch.randint(0, 4, (2, int(at.sum())))]
    check(case, num_splits)
    for selection in (case.window, case.entries):
        selection.slots[:] = extremes[torch.randint(0, 4, tuple(selection.slots.shape))]
    check(case, num_splits)
    o, lse = sparse_attention(*case.args(), num_splits=num_splits)
    assert (o == 0).all()
    assert (lse == float("-inf")).all()


@pytest.mark.parametrize("num_splits", [1, 2])
def test_infinite_sinks(num_splits: int) -> None:
    """-inf is no sink at all, +inf takes everything; neither makes a NaN, with and without a valid
    key."""
    case = make(8, [40, 0, 40], [70, 0, 70], holes=0.0)
    case.sink[:] = torch.tensor([float("-inf"), float("inf")] * 4)
    o, lse = sparse_attention(*case.args(), num_splits=num_splits)
    want, want_lse = reference.sparse_attention(*case.args())
    assert (o[:, 1::2] == 0).all()
    assert (want[:, 1::2] == 0).all()
    case.sink[:] = -1e30
    without, lse_without = sparse_attention(*case.args(), num_splits=num_splits)
    assert torch.equal(o[:, ::2], without[:, ::2])
    for got in (lse, want_lse):
        torch.testing.assert_close(got, lse_without, rtol=512 * 2.0**-24, atol=512 * 2.0**-24)
    exact, _, low = exact_and_low(case)
    assert_within(want[:, ::2], exact[:, ::2], low[:, ::2])
    assert (o[1] == 0).all()
    assert (want[1] == 0).all()


@pytest.mark.parametrize(
    ("tokens", "keys", "parts"),
    [
        (1, 128, 1),  # a window alone is one launch
        (1, 159, 1),
        (1, 192, 6),  # HCA at 8K: a tile each
        (1, 640, 20),  # CSA of Flash
        (1, 8320, 64),
        (32, 640, 7),
        (216, 640, 1),
    ],
)
def test_one_request_fills_a_device_tile_by_tile(tokens: int, keys: int, parts: int) -> None:
    with pretending("sm80"):  # of 108 multiprocessors
        assert splits_for(tokens, 1, keys, torch.device("cpu")) == parts


def test_rows_of_another_width_are_refused() -> None:
    case = make(8, [1], None)
    case.q = case.q[..., :256]
    with pytest.raises(ValueError, match="448 \\+ 64"):
        attention.sparse_attention(*case.args())


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("num_heads", [8, 64])
def test_outputs_rotated_back_in_the_same_launch(num_heads: int, num_splits: int) -> None:
    case = make(num_heads, [128, 0, 5], [17, 0, 70])
    table = cos_sin(torch.tensor([5, 1_000_000, 77]), 1e4 ** (-torch.arange(0, 64, 2) / 64))
    plain, lse = sparse_attention(*case.args(), num_splits=num_splits)
    rotated, lse_too = sparse_attention(*case.args(), cos_sin=table, num_splits=num_splits)
    assert torch.equal(rotated, apply_rope(plain, table, inverse=True))
    assert torch.equal(lse, lse_too)
    wo_a = torch.randn(2, 16, num_heads // 2 * 512).bfloat16()
    assert torch.equal(attention.output_a(rotated, None, wo_a), attention.output_a(plain, table, wo_a))
