# SPDX-License-Identifier: Apache-2.0
"""Every division, logarithm, exponential and root, in references and kernels, against fp64 or HF's
formula on inputs far outside what a model meets: a reference and its kernel may share a fault."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv4.model.kv_layout import KvFormat
from dsv4.ops import attention, mhc, moe
from dsv4.ops.attention import reference as attention_reference
from dsv4.ops.mhc import Site
from dsv4.ops.mhc import reference as mhc_reference
from dsv4.ops.moe import reference as moe_reference
from dsv4.ops.pages import Selection, SlotMapping
from dsv4.ops.quant import reference as quant
from tests.support.kernel_cases import fill_pages, make_pages

EPS = 1e-6
HF_SUM_EPS = 1e-20  # transformers, modeling_deepseek_v4.py, both routers
ULP = 2.0**-24

SPREADS = (0.0, 1e-30, 1e-6, 1.0, 40.0, 3e3)
OFFSETS = (0.0, 50.0, -85.0, -104.0, -1e4, 1e4)
seeds = st.integers(0, 2**16)
sweep = settings(max_examples=25, deadline=None, derandomize=True)


def drawn(shape: tuple[int, ...], seed: int, spread: float, offset: float = 0.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * spread + offset


def close(got: Tensor, exact: Tensor, roundings: float) -> None:
    """Within so many fp32 roundings of the value; and of the smallest normal number, below which a
    rounding is larger than its share."""
    exact = exact.double()
    assert torch.isfinite(exact).all(), "the case itself is outside fp64"
    assert torch.isfinite(got).all(), (got, exact)
    assert ((got.double() - exact).abs() <= roundings * ULP * exact.abs() + 2.0**-126).all(), (got, exact)


both = pytest.mark.parametrize("module", [moe, moe_reference], ids=["kernel", "reference"])


def hf_weights(logits: Tensor, ids: Tensor, factor: float) -> Tensor:
    """HF's formula in fp64, from scores that underflow where fp32's do."""
    scores = torch.logaddexp(logits.double(), torch.zeros(())).sqrt()  # softplus, without an overflow
    # exp(x) below fp32's smallest number is 0 in every fp32 implementation.
    chosen = torch.where(logits < -103.5, 0.0, scores).gather(1, ids.long())
    return chosen / (chosen.sum(-1, keepdim=True) + HF_SUM_EPS) * factor


def assert_weights(got: Tensor, logits: Tensor, ids: Tensor, factor: float) -> None:
    want = hf_weights(logits, ids, factor)
    assert torch.isfinite(got).all(), got
    # Near the end of fp32's range a score has few bits left: below exp(-87) its exponential is
    # denormal, or 0 on hardware that has none.
    normal = (logits.gather(1, ids.long()) > -87).all(-1) | (want == 0).all(-1)
    torch.testing.assert_close(got[normal].double(), want[normal], rtol=2e-6, atol=1e-12)
    assert (got >= 0).all()
    assert (got.sum(-1) <= factor * (1 + 20 * ULP)).all()


@both
@sweep
@given(spread=st.sampled_from(SPREADS), offset=st.sampled_from(OFFSETS), seed=seeds)
def test_routing_by_score(module: ModuleType, spread: float, offset: float, seed: int) -> None:
    logits = drawn((3, 16), seed, spread, offset)
    weights, ids = module.route_topk(logits, torch.zeros(16), 6, 1.5)
    assert_weights(weights, logits, ids, 1.5)


@both
@sweep
@given(spread=st.sampled_from(SPREADS), offset=st.sampled_from(OFFSETS), seed=seeds)
def test_routing_by_token_id(module: ModuleType, spread: float, offset: float, seed: int) -> None:
    logits, table = drawn((3, 16), seed, spread, offset), torch.arange(24, dtype=torch.int32).view(4, 6) % 16
    weights, ids = module.route_hash(logits, table, torch.tensor([0, 1, 3]), 1.5)
    assert_weights(weights, logits, ids, 1.5)


@both
def test_tokens_whose_scores_all_underflow_get_nothing_from_the_routed_experts(module: ModuleType) -> None:
    """HF's 0 / (0 + 1e-20). Without the 1e-20 it was NaN, and every token 0."""
    logits = torch.full((2, 16), -110.0)
    table = torch.arange(6, dtype=torch.int32)[None]
    by_score, _ = module.route_topk(logits, torch.zeros(16), 6, 1.5)
    by_id, _ = module.route_hash(logits, table, torch.zeros(2, dtype=torch.int64), 1.5)
    assert by_score.eq(0).all()
    assert by_id.eq(0).all()


@both
@sweep
@given(spread=st.sampled_from((*SPREADS, 1e30)), offset=st.sampled_from((*OFFSETS, -1e30)), seed=seeds)
def test_swiglu(module: ModuleType, spread: float, offset: float, seed: int) -> None:
    gate, up = drawn((2, 33), seed, spread, offset), drawn((2, 33), seed + 1, spread)
    g = gate.double().clamp(max=10)
    exact = g / (1 + torch.exp(-g)) * up.double().clamp(-10, 10)
    got = module.swiglu(gate, up, 10.0)
    assert torch.isfinite(got).all()
    # exp of a gate of size g is off by g roundings; beyond 87 the result is 0 or denormal.
    assert ((got.double() - exact).abs() <= 100 * ULP * exact.abs() + 1e-34 * 1e2).all()


@pytest.mark.parametrize("function", [attention.norm_rope_store, attention_reference.norm_rope_store],
                         ids=["kernel", "reference"])  # fmt: skip
@sweep
@given(spread=st.sampled_from((0.0, 1e-30, 1e-15, 1.0, 1e4, 1e17)), seed=seeds)
def test_norms(function: Callable[..., Tensor], spread: float, seed: int) -> None:
    """Up to 1e18, where fp32's squares overflow, in HF too; a norm of zeros is zeros."""
    q, kv = drawn((2, 3, 512), seed, spread), drawn((2, 512), seed + 1, spread)
    pages = make_pages(KvFormat.PLAIN, 1, 64, 512, torch.float32)
    table = torch.cat([torch.ones(2, 32), torch.zeros(2, 32)], 1)  # no rotation
    got = function(q, kv, torch.ones(512), EPS, table, SlotMapping(pages, torch.tensor([0, 5], dtype=torch.int32)))
    for x, y in ((q, got), (kv, pages.data[0, [0, 5]])):
        exact = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + EPS)
        close(y, exact, 600)  # a sum of 512 squares


@pytest.mark.parametrize("module", [mhc, mhc_reference], ids=["kernel", "reference"])
@sweep
@given(
    streams=st.sampled_from((0.0, 1e-30, 1.0, 1e15)),
    mixes=st.sampled_from((0.0, 1.0, 40.0, 3e3)),
    base=st.sampled_from((0.0, -90.0, 90.0, 1e4, -1e4)),
    seed=seeds,
)
def test_hyper_connections(module: ModuleType, streams: float, mixes: float, base: float, seed: int) -> None:
    dim = 64
    x = drawn((2, 4, dim), seed, streams)
    fn = drawn((24, 4 * dim), seed + 1, mixes * (4 * dim) ** -0.5)
    site = Site(
        fn, drawn((24,), seed + 2, 1.0, base), torch.ones(3), torch.ones(dim), rms_eps=EPS, hc_eps=EPS, iters=20
    )
    exact_site = Site(fn.double(), site.base.double(), torch.ones(3).double(), torch.ones(dim).double(),
                      rms_eps=EPS, hc_eps=EPS, iters=20)  # fmt: skip
    got, exact = module.pre(x, site), mhc_reference.pre(x.double(), exact_site, torch.float64)
    for name in ("x", "post", "comb"):
        value, want = getattr(got, name), getattr(exact, name)
        assert torch.isfinite(value).all(), name
        # A mix of size m is off by a sum's roundings of m, and its exponential by as much of
        # itself; the balancing multiplies that by its condition, below 1 / hc_eps of a rounding.
        if mixes <= 1 and abs(base) <= 90:
            assert ((value.double() - want).abs() <= 2e-3 * want.abs().max() + 1e-6).all(), name


@pytest.mark.parametrize("function", [attention.sparse_attention, attention_reference.sparse_attention],
                         ids=["kernel", "reference"])  # fmt: skip
@sweep
@given(
    scale=st.sampled_from((0.0, 1e-30, 1.0, 1e3, 1e10)),
    sink=st.sampled_from((float("-inf"), -1e4, 0.0, 88.0, 1e4, 1e30)),
    keys=st.integers(0, 5),
    seed=seeds,
)
def test_attention(
    function: Callable[..., tuple[Tensor, Tensor]], scale: float, sink: float, keys: int, seed: int
) -> None:
    q, rows = drawn((1, 8, 512), seed, scale), drawn((6, 512), seed + 1, 1.0)
    pages = make_pages(KvFormat.PLAIN, 1, 64, 512, torch.float32)
    fill_pages(pages, torch.arange(6), rows, 64)
    slots = torch.tensor([[0, 1, 2, 3, 4, -1]], dtype=torch.int32)
    lens = torch.tensor([keys], dtype=torch.int32)
    sinks = torch.full((8,), sink)
    o, lse = function(q, Selection(pages, slots, lens), None, sinks)
    scores = q[0].double() @ rows[:keys].double().T * 512**-0.5
    exact_lse = scores.logsumexp(-1) if keys else torch.full((8,), float("-inf"), dtype=torch.float64)
    total = torch.logaddexp(exact_lse, sinks.double())
    p = torch.exp(scores - total[:, None]) if keys else torch.zeros(8, 0, dtype=torch.float64)
    exact = p.nan_to_num(0.0) @ rows[:keys].double()
    assert torch.isfinite(o).all()
    assert torch.equal(torch.isfinite(lse[0]), torch.isfinite(exact_lse))
    # Products of size s are off by the roundings of 512 sums of s, an exponential by as much.
    size = float(scores.abs().max()) if keys else 0.0
    if size < 1e3:
        assert ((o[0].double() - exact).abs() <= 512 * ULP * (1 + size) * 5).all()


@sweep
@given(spread=st.sampled_from((0.0, 1e-42, 1e-30, 1e-4, 1.0, 1e30)), seed=seeds)
@pytest.mark.parametrize("kind", ["e4m3", "e2m1"])
def test_quantisation(kind: str, spread: float, seed: int) -> None:
    """What is decoded is within half a step of the largest of its group, and zeros are zeros."""
    x = drawn((2, 128), seed, spread)
    quantize, dequantize = getattr(quant, f"quantize_{kind}"), getattr(quant, f"dequantize_{kind}")
    group, floor, largest = (128, quant.E4M3_AMAX_FLOOR, 448) if kind == "e4m3" else (32, quant.E2M1_AMAX_FLOOR, 6)
    got = dequantize(*quantize(x, group)).double()
    top = x.double().unflatten(-1, (-1, group)).abs().amax(-1, keepdim=True).clamp(min=floor)
    step = (2 * top / largest * (16 if kind == "e4m3" else 1)).expand(-1, -1, group).flatten(-2)
    assert torch.isfinite(got).all()
    assert ((got - x.double()).abs() <= step).all()
