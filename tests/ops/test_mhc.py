# SPDX-License-Identifier: Apache-2.0
"""Hyper-connections: projection, balancing, collapse, expansion and the head equal the
references."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dsv4.model.config import V4Config
from dsv4.ops import mhc
from dsv4.ops.mhc import PendingPost, Site, reference
from dsv4.ops.mhc.layer import HyperConnection
from tests.support.kernel_cases import assert_within

CONFIG = Path(__file__).parents[1] / "golden" / "configs" / "DeepSeek-V4-Flash.json"
EPS, HC_EPS, ITERS = 1e-6, 1e-3, 20  # the model's hc_eps, 1e-6, would be below the bounds


def site(dim: int, rows: int = 24, scales: int = 3, iters: int = ITERS) -> Site:
    """With mixes large enough for the sigmoids and the matrix to matter."""
    fn, base, scale = torch.randn(rows, 4 * dim) * (4 * dim) ** -0.5 * 2, torch.randn(rows), torch.rand(scales) + 0.5
    return Site(fn, base, scale, torch.rand(dim) + 0.5, rms_eps=EPS, hc_eps=HC_EPS, iters=iters)


def double(of: Site) -> Site:
    tensors = {name: getattr(of, name).double() for name in ("fn", "base", "scale", "norm_weight")}
    return replace(of, **tensors)


def pending(num_tokens: int, dim: int) -> PendingPost:
    streams, y = torch.randn(num_tokens, 4, dim).bfloat16(), torch.randn(num_tokens, dim).bfloat16()
    return PendingPost(streams, y, torch.rand(num_tokens, 4) * 2, torch.rand(num_tokens, 4, 4))


def double_pending(of: PendingPost) -> PendingPost:
    return PendingPost(of.streams.double(), of.y.double(), of.post.double(), of.comb.double())


@pytest.mark.parametrize(
    ("num_tokens", "dim"),
    [(1, 256), (2, 4096), (1, 7168), (63, 256), (257, 64), pytest.param(63, 7168, marks=pytest.mark.slow)],
)
def test_pre_is_the_references(num_tokens: int, dim: int) -> None:
    here = site(dim)
    streams = torch.randn(num_tokens, 4, dim).bfloat16()
    got, low = mhc.pre(streams, here), reference.pre(streams, here)
    exact = reference.pre(streams.double(), double(here), torch.float64)
    assert got.streams is streams
    assert_within(got.x, exact.x, low.x, "input")
    # A sum of 4 * dim fp32 products in another order, then about 100 roundings of the balancing.
    allowed = (4 * dim) ** 0.5 * 2.0**-24 + 100 * 2.0**-24
    assert (got.post - exact.post).abs().max() < 2 * allowed, "post"
    assert (got.comb.flatten(1) - exact.comb.flatten(1)).abs().max() < allowed, "comb"


def test_pre_of_fp32_streams_for_the_cpu_platform() -> None:
    streams, here = torch.randn(3, 4, 256), site(256)
    got, want = mhc.pre(streams, here), reference.pre(streams, here)
    for a, b in ((got.x, want.x), (got.post, want.post), (got.comb, want.comb)):
        torch.testing.assert_close(a, b, rtol=1024 * 2.0**-24, atol=1024 * 2.0**-24)  # sums of 1024 products


@pytest.mark.parametrize("iters", [1, 2, 20])
def test_every_iteration_of_the_balancing_counts(iters: int) -> None:
    here = site(64, iters=iters)
    here = replace(here, scale=here.scale * 4)
    streams = torch.randn(5, 4, 64).bfloat16()
    got, want = mhc.pre(streams, here).comb, reference.pre(streams, here).comb
    torch.testing.assert_close(got, want, rtol=2.0**-16, atol=2.0**-20)  # 40 divisions and the sums of the logits


def test_no_iteration_is_refused() -> None:
    with pytest.raises(ValueError, match="iters is 0"):
        mhc.pre(torch.zeros(1, 4, 64), site(64, iters=0))


def test_another_number_of_streams_is_refused() -> None:
    with pytest.raises(ValueError, match="not 2"):
        mhc.post(PendingPost(torch.zeros(1, 2, 64), torch.zeros(1, 64), torch.zeros(1, 2), torch.zeros(1, 2, 2)))


@pytest.mark.parametrize(("num_tokens", "dim"), [(1, 7168), (2, 4096), (63, 256), (257, 64)])
def test_post_is_the_references(num_tokens: int, dim: int) -> None:
    of = pending(num_tokens, dim)
    assert_within(mhc.post(of), reference.post(double_pending(of), torch.float64), reference.post(of))


@pytest.mark.parametrize(("num_tokens", "dim"), [(1, 7168), (2, 4096), (63, 256), (257, 64)])
def test_head_is_the_references(num_tokens: int, dim: int) -> None:
    here = site(dim, rows=4, scales=1)
    streams = torch.randn(num_tokens, 4, dim).bfloat16()
    exact = reference.head(streams.double(), double(here), torch.float64)
    assert_within(mhc.head(streams, here), exact, reference.head(streams, here))


def test_no_tokens() -> None:
    nothing, here = mhc.pre(torch.zeros(0, 4, 64), site(64)), site(64)
    assert [tuple(x.shape) for x in (nothing.x, nothing.post, nothing.comb)] == [(0, 64), (0, 4), (0, 4, 4)]
    assert mhc.pre(nothing.pending(nothing.x), here).x.shape == (0, 64)


@pytest.mark.parametrize(
    ("num_tokens", "dim"), [(1, 4096), (2, 7168), (63, 256), (257, 64), pytest.param(63, 7168, marks=pytest.mark.slow)]
)
def test_post_and_the_next_pre_in_one_read(num_tokens: int, dim: int) -> None:
    of, here = pending(num_tokens, dim), site(dim)
    got = mhc.pre(of, here)
    assert torch.equal(got.streams, mhc.post(of))
    low = reference.pre(got.streams, here)
    exact = reference.pre(got.streams.double(), double(here), torch.float64)
    assert_within(got.x, exact.x, low.x, "input")
    allowed = (4 * dim) ** 0.5 * 2.0**-24 + 100 * 2.0**-24  # as for pre
    assert (got.post - exact.post).abs().max() < 2 * allowed
    assert (got.comb - exact.comb).abs().max() < allowed
    whole = reference.post_pre(of, here)
    assert_within(got.streams.flatten(1), whole.streams.double().flatten(1), whole.streams.flatten(1))


def test_a_site_is_made_of_the_parameters_that_a_layer_has_now() -> None:
    """Engines load parameters in place, and may put others in their place."""
    config = V4Config.from_path(CONFIG)
    connection = HyperConnection(config)
    connection.scale.fill_(3.0)
    weight = torch.ones(config.hidden_size)
    assert connection.site(weight).scale.tolist() == [3.0] * 3
    connection.scale = torch.nn.Parameter(torch.full((3,), 5.0), requires_grad=False)
    assert connection.site(weight).scale.tolist() == [5.0] * 3
    assert {name: tuple(p.shape) for name, p in HyperConnection(config, is_head=True).named_parameters()} == {
        "fn": (4, 4 * config.hidden_size),
        "base": (4,),
        "scale": (1,),
    }
