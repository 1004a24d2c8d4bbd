# SPDX-License-Identifier: Apache-2.0
"""Routing and the clamped activation equal the twins."""

from __future__ import annotations

import pytest
import torch

from dsv4.ops import moe
from dsv4.ops.moe import reference
from kernel_cases import assert_within

# sqrt, exp, series, sum and division: at most ten fp32 roundings.
TEN = 10 * 2.0**-24


@pytest.mark.parametrize(("num_tokens", "num_experts"), [(1, 256), (2, 384), (63, 8), (257, 256)])
def test_experts_are_chosen_by_score_and_bias(num_tokens: int, num_experts: int) -> None:
    logits, bias = torch.randn(num_tokens, num_experts) * 4, torch.randn(num_experts)
    weights, ids = moe.route_topk(logits, bias, 6, 2.5)
    twin_weights, twin_ids = reference.route_topk(logits, bias, 6, 2.5)
    assert torch.equal(ids, twin_ids)
    torch.testing.assert_close(weights, twin_weights, rtol=TEN, atol=0)


def test_ties_between_experts_go_to_the_lowest() -> None:
    logits, bias = torch.zeros(2, 16), torch.zeros(16)
    logits[1, 9:] = 1
    _, ids = moe.route_topk(logits, bias, 6, 1.0)
    assert ids.tolist() == [[0, 1, 2, 3, 4, 5], [9, 10, 11, 12, 13, 14]]


def test_scores_of_very_low_and_very_high_logits() -> None:
    logits = torch.tensor([[-80.0, -30.0, -8.0, -1e-6, 0.0, 1e-6, 8.0, 100.0]])
    weights, ids = moe.route_topk(logits, torch.zeros(8), 8, 1.0)
    twin_weights, twin_ids = reference.route_topk(logits, torch.zeros(8), 8, 1.0)
    assert torch.equal(ids, twin_ids)
    exact = torch.nn.functional.softplus(logits.double(), threshold=1e3).sqrt()
    exact = (exact / exact.sum()).gather(1, ids.long()).float()
    torch.testing.assert_close(weights, exact, rtol=TEN, atol=0)
    torch.testing.assert_close(weights, twin_weights, rtol=2 * TEN, atol=0)


@pytest.mark.parametrize("num_tokens", [1, 63])
def test_experts_of_hash_layers_come_from_the_table(num_tokens: int) -> None:
    logits = torch.randn(num_tokens, 32) * 4
    table = torch.stack([torch.randperm(32)[:6] for _ in range(50)]).int()
    input_ids = torch.randint(0, 50, (num_tokens,))
    weights, ids = moe.route_hash(logits, table, input_ids, 1.5)
    twin_weights, twin_ids = reference.route_hash(logits, table, input_ids, 1.5)
    assert torch.equal(ids, twin_ids)
    torch.testing.assert_close(weights, twin_weights, rtol=TEN, atol=0)


def test_token_ids_beyond_the_table_stay_inside_it() -> None:
    table = torch.tensor([[3, 1], [2, 0]], dtype=torch.int32)
    _, ids = moe.route_hash(torch.randn(3, 4), table, torch.tensor([2, -1, 1 << 40]), 1.0)
    assert ids.tolist() == [[3, 1]] * 3


@pytest.mark.parametrize(("num_tokens", "width"), [(1, 2048), (2, 3072), (63, 65), (257, 8)])
def test_swiglu_clamps_both_sides_of_up_and_the_top_of_gate(num_tokens: int, width: int) -> None:
    both = (torch.randn(num_tokens, 2 * width) * 12).bfloat16()
    both[0, 0], both[0, -1] = float("nan"), float("inf")
    gate, up = both.chunk(2, -1)
    assert_within(moe.swiglu(gate, up, 10.0), reference.swiglu(gate.double(), up.double(), 10.0), reference.swiglu(gate, up, 10.0))
