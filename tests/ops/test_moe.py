# SPDX-License-Identifier: Apache-2.0
"""Routing and the clamped activation equal the references."""

from __future__ import annotations

import pytest
import torch

from dsv4.ops import moe
from dsv4.ops.moe import mxfp4, reference
from tests.support.kernel_cases import assert_within

# sqrt, exp, series, sum and division: at most ten fp32 roundings.
TEN = 10 * 2.0**-24


@pytest.mark.parametrize(("num_tokens", "num_experts"), [(1, 256), (2, 384), (63, 8), (257, 256)])
def test_experts_are_chosen_by_score_and_bias(num_tokens: int, num_experts: int) -> None:
    logits, bias = torch.randn(num_tokens, num_experts) * 4, torch.randn(num_experts)
    weights, ids = moe.route_topk(logits, bias, 6, 2.5)
    want_weights, want_ids = reference.route_topk(logits, bias, 6, 2.5)
    assert torch.equal(ids, want_ids)
    torch.testing.assert_close(weights, want_weights, rtol=TEN, atol=0)


def test_ties_between_experts_go_to_the_lowest() -> None:
    logits, bias = torch.zeros(2, 16), torch.zeros(16)
    logits[1, 9:] = 1
    _, ids = moe.route_topk(logits, bias, 6, 1.0)
    assert ids.tolist() == [[0, 1, 2, 3, 4, 5], [9, 10, 11, 12, 13, 14]]


def test_scores_of_very_low_and_very_high_logits() -> None:
    logits = torch.tensor([[-80.0, -30.0, -8.0, -1e-6, 0.0, 1e-6, 8.0, 100.0]])
    weights, ids = moe.route_topk(logits, torch.zeros(8), 8, 1.0)
    want_weights, want_ids = reference.route_topk(logits, torch.zeros(8), 8, 1.0)
    assert torch.equal(ids, want_ids)
    exact = torch.nn.functional.softplus(logits.double(), threshold=1e3).sqrt()
    exact = (exact / exact.sum()).gather(1, ids.long()).float()
    torch.testing.assert_close(weights, exact, rtol=TEN, atol=0)
    torch.testing.assert_close(weights, want_weights, rtol=2 * TEN, atol=0)


@pytest.mark.parametrize(("num_tokens", "num_experts"), [(1, 256), (2, 384), (63, 32), (257, 8)])
def test_experts_of_hash_layers_come_from_the_table(num_tokens: int, num_experts: int) -> None:
    logits = torch.randn(num_tokens, num_experts) * 4
    table = torch.stack([torch.randperm(num_experts)[:6] for _ in range(50)]).int()
    input_ids = torch.randint(0, 50, (num_tokens,))
    weights, ids = moe.route_hash(logits, table, input_ids, 1.5)
    want_weights, want_ids = reference.route_hash(logits, table, input_ids, 1.5)
    assert torch.equal(ids, want_ids)
    torch.testing.assert_close(weights, want_weights, rtol=TEN, atol=0)


def test_token_ids_beyond_the_table_stay_inside_it() -> None:
    table = torch.tensor([[3, 1], [2, 0]], dtype=torch.int32)
    _, ids = moe.route_hash(torch.randn(3, 4), table, torch.tensor([2, -1, 1 << 40]), 1.0)
    assert ids.tolist() == [[3, 1]] * 3


@pytest.mark.parametrize(("num_tokens", "width"), [(1, 2048), (2, 3072), (63, 65), (257, 8)])
def test_swiglu_clamps_both_sides_of_up_and_the_top_of_gate(num_tokens: int, width: int) -> None:
    both = (torch.randn(num_tokens, 2 * width) * 12).bfloat16()
    both[0, 0], both[0, -1] = float("nan"), float("inf")
    gate, up = both.chunk(2, -1)
    assert_within(
        moe.swiglu(gate, up, 10.0), reference.swiglu(gate.double(), up.double(), 10.0), reference.swiglu(gate, up, 10.0)
    )


@pytest.mark.parametrize(
    ("num_tokens", "dim", "inner", "dtype"),
    [
        (1, 160, 96, torch.bfloat16),
        (2, 160, 96, torch.bfloat16),
        (63, 160, 96, torch.bfloat16),
        (257, 160, 96, torch.bfloat16),
        (3, 160, 96, torch.float32),
        # A tile of each product at Pro's width.
        (2, 7168, 64, torch.bfloat16),
        (2, 64, 3072, torch.bfloat16),
    ],
)
def test_experts_from_packed_weights(num_tokens: int, dim: int, inner: int, dtype: torch.dtype) -> None:
    """Experts with none, one and more than a block of tokens, ids that live elsewhere, and widths
    that are no multiple of a tile."""
    num_experts = 6
    w13, w2 = (
        torch.randint(0, 256, s, dtype=torch.uint8)
        for s in ((num_experts, 2 * inner, dim // 2), (num_experts, dim, inner // 2))
    )
    s13, s2 = (
        torch.randint(118, 124, s, dtype=torch.uint8)
        for s in ((num_experts, 2 * inner, dim // 32), (num_experts, dim, inner // 32))
    )
    x, weights = torch.randn(num_tokens, dim).to(dtype), torch.rand(num_tokens, 3)
    ids = torch.stack([torch.tensor([0, 2, 4]) if t % 3 else torch.tensor([2, -1, 5]) for t in range(num_tokens)]).int()
    args = (w13, s13, w2, s2, weights, ids, 10.0)
    want = reference.experts_mxfp4(x, *args)
    exact = reference.experts_mxfp4(x.double(), *args)
    if dtype is torch.float32:
        torch.testing.assert_close(
            moe.experts_mxfp4(x, *args), want, rtol=1e-5, atol=float(want.abs().max()) * (dim + inner) * 2.0**-24
        )
    else:
        assert_within(moe.experts_mxfp4(x, *args), exact, want)


def test_blocks_of_pairs_cover_every_pair_once() -> None:
    ids = torch.randint(-1, 5, (50, 3))
    blocks = mxfp4._blocks(ids, 5, 16)
    seen = []
    for expert, first, end in zip(blocks.expert.tolist(), blocks.first.tolist(), blocks.end.tolist(), strict=True):
        if expert == 5:
            continue
        pairs = blocks.order[first : min(first + 16, end)].tolist()
        assert pairs
        assert {int(ids.flatten()[p]) for p in pairs} == {expert}
        seen += pairs
    assert sorted(seen) == (ids.flatten() >= 0).nonzero().flatten().tolist()
