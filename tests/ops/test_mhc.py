# SPDX-License-Identifier: Apache-2.0
"""Hyper-connections: projection, balancing, collapse, expansion and the head equal the twins."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dsv4.ops import mhc
from dsv4.ops.mhc import reference
from tests.support.kernel_cases import assert_within

EPS, HC_EPS, ITERS = 1e-6, 1e-3, 20  # the model's hc_eps, 1e-6, would be below the bounds


def parameters(rows: int, dim: int, scales: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """fn, base, scale and the norm's weight, with mixes large enough for the sigmoids and the matrix to matter."""
    return torch.randn(rows, 4 * dim) * (4 * dim) ** -0.5 * 2, torch.randn(rows), torch.rand(scales) + 0.5, torch.rand(dim) + 0.5


@pytest.mark.parametrize(
    ("num_tokens", "dim"), [(1, 256), (2, 4096), (1, 7168), (63, 256), (257, 64), pytest.param(63, 7168, marks=pytest.mark.slow)]
)
def test_pre_is_the_twins(num_tokens: int, dim: int) -> None:
    fn, base, scale, weight = parameters(24, dim, 3)
    streams = torch.randn(num_tokens, 4, dim).bfloat16()
    got = mhc.pre(streams, fn, base, scale, weight, EPS, HC_EPS, ITERS)
    twin = reference.pre(streams, fn, base, scale, weight, EPS, HC_EPS, ITERS)
    exact = reference.pre(streams.double(), fn.double(), base.double(), scale.double(), weight.double(), EPS, HC_EPS, ITERS, torch.float64)
    assert_within(got[0], exact[0], twin[0], "input")
    # A sum of 4 * dim fp32 products in another order, then about 100 roundings of the balancing.
    allowed = (4 * dim) ** 0.5 * 2.0**-24 + 100 * 2.0**-24
    assert (got[1] - exact[1]).abs().max() < 2 * allowed, "post"
    assert (got[2].flatten(1) - exact[2].flatten(1)).abs().max() < allowed, "comb"


def test_pre_of_fp32_streams_for_the_cpu_platform() -> None:
    fn, base, scale, weight = parameters(24, 256, 3)
    streams = torch.randn(3, 4, 256)
    args = (fn, base, scale, weight, EPS, HC_EPS, ITERS)
    for got, twin in zip(mhc.pre(streams, *args), reference.pre(streams, *args), strict=True):
        torch.testing.assert_close(got, twin, rtol=1024 * 2.0**-24, atol=1024 * 2.0**-24)  # sums of 1024 products


@pytest.mark.parametrize("iters", [1, 2, 20])
def test_every_iteration_of_the_balancing_counts(iters: int) -> None:
    fn, base, scale, weight = parameters(24, 64, 3)
    streams, scale = torch.randn(5, 4, 64).bfloat16(), scale * 4
    got = mhc.pre(streams, fn, base, scale, weight, EPS, HC_EPS, iters)[2]
    torch.testing.assert_close(
        got, reference.pre(streams, fn, base, scale, weight, EPS, HC_EPS, iters)[2], rtol=2.0**-16, atol=2.0**-20
    )  # 40 divisions and the sums of the logits


def test_no_iteration_is_refused() -> None:
    with pytest.raises(ValueError, match="iters is 0"):
        mhc.pre(torch.zeros(1, 4, 64), *parameters(24, 64, 3), EPS, HC_EPS, 0)


def test_another_number_of_streams_is_refused() -> None:
    with pytest.raises(ValueError, match="not 2"):
        mhc.post(torch.zeros(1, 2, 64), torch.zeros(1, 64), torch.zeros(1, 2), torch.zeros(1, 2, 2))


@pytest.mark.parametrize(("num_tokens", "dim"), [(1, 7168), (2, 4096), (63, 256), (257, 64)])
def test_post_is_the_twins(num_tokens: int, dim: int) -> None:
    streams, y = torch.randn(num_tokens, 4, dim).bfloat16(), torch.randn(num_tokens, dim).bfloat16()
    weight, comb = torch.rand(num_tokens, 4) * 2, torch.rand(num_tokens, 4, 4)
    exact = reference.post(streams.double(), y.double(), weight.double(), comb.double(), torch.float64)
    assert_within(mhc.post(streams, y, weight, comb), exact, reference.post(streams, y, weight, comb))


@pytest.mark.parametrize(("num_tokens", "dim"), [(1, 7168), (2, 4096), (63, 256), (257, 64)])
def test_head_is_the_twins(num_tokens: int, dim: int) -> None:
    fn, base, scale, weight = parameters(4, dim, 1)
    streams = torch.randn(num_tokens, 4, dim).bfloat16()
    exact = reference.head(streams.double(), fn.double(), base.double(), scale.double(), weight.double(), EPS, HC_EPS, torch.float64)
    twin = reference.head(streams, fn, base, scale, weight, EPS, HC_EPS)
    assert_within(mhc.head(streams, fn, base, scale, weight, EPS, HC_EPS), exact, twin)


def test_no_tokens() -> None:
    args = (*parameters(24, 64, 3), EPS, HC_EPS, ITERS)
    assert [tuple(x.shape) for x in mhc.pre(torch.zeros(0, 4, 64), *args)] == [(0, 64), (0, 4), (0, 4, 4)]


@pytest.mark.parametrize(
    ("num_tokens", "dim"), [(1, 4096), (2, 7168), (63, 256), (257, 64), pytest.param(63, 7168, marks=pytest.mark.slow)]
)
def test_post_and_the_next_pre_in_one_read(num_tokens: int, dim: int) -> None:
    fn, base, scale, weight = parameters(24, dim, 3)
    streams, y = torch.randn(num_tokens, 4, dim).bfloat16(), torch.randn(num_tokens, dim).bfloat16()
    post_weight, comb = torch.rand(num_tokens, 4) * 2, torch.rand(num_tokens, 4, 4)
    args = (fn, base, scale, weight, EPS, HC_EPS, ITERS)
    got = mhc.post_pre(streams, y, post_weight, comb, *args)
    assert torch.equal(got[0], mhc.post(streams, y, post_weight, comb))
    twin = reference.pre(got[0], *args)
    exact = reference.pre(got[0].double(), *(x.double() for x in args[:4]), EPS, HC_EPS, ITERS, torch.float64)
    assert_within(got[1], exact[0], twin[0], "input")
    allowed = (4 * dim) ** 0.5 * 2.0**-24 + 100 * 2.0**-24  # as for pre
    assert (got[2] - exact[1]).abs().max() < 2 * allowed
    assert (got[3] - exact[2]).abs().max() < allowed
    whole = reference.post_pre(streams, y, post_weight, comb, *args)
    assert_within(got[0].flatten(1), whole[0].double().flatten(1), whole[0].flatten(1))
