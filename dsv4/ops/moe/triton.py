# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of the router and the activation; every function here has its reference in
`moe/reference.py`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.ops.moe.mxfp4 import experts_mxfp4
from dsv4.ops.moe.reference import SUM_EPS as _SUM_EPS

__all__ = ["experts_mxfp4", "route_hash", "route_topk", "swiglu"]

SWIGLU_BLOCK = 1024
SUM_EPS: tl.constexpr = tl.constexpr(_SUM_EPS)


@triton.jit
def _log1p(u):
    """log(1 + u) for u in [0, 1], within 1.5 ulp: 2 artanh(u / (2 + u)) as a series, whose ninth
    term is below 2**-29.

    Triton's log has an absolute error, which for the small u of low scores is a relative one of
    many ulp.
    """
    s = u / (2.0 + u)
    z = s * s
    p = z * (1.0 / 17.0) + 1.0 / 15.0
    p = p * z + 1.0 / 13.0
    p = p * z + 1.0 / 11.0
    p = p * z + 1.0 / 9.0
    p = p * z + 1.0 / 7.0
    p = p * z + 1.0 / 5.0
    p = p * z + 1.0 / 3.0
    return 2.0 * (s + s * z * p)


@triton.jit
def _score(x):
    """sqrt(softplus(x)); NaN stays NaN."""
    return tl.sqrt(tl.where(x > 0, x, 0.0) + _log1p(tl.exp(-tl.abs(x))))


@triton.jit
def route_topk_kernel(
    logits,
    logits_stride,
    bias,
    weights,
    ids,
    factor,
    E: tl.constexpr,
    EB: tl.constexpr,
    K: tl.constexpr,
    KB: tl.constexpr,
):
    """grid (T,): K rounds of the largest score plus bias, ties to the lowest id. EB, KB: powers of
    two >= E, K."""
    t = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, EB)
    k = tl.arange(0, KB)
    inside = e < E
    score = _score(tl.load(logits + t * logits_stride + e, mask=inside, other=0.0).to(tl.float32))
    choice = score + tl.load(bias + e, mask=inside, other=0.0)
    # NaN ranks first, as in torch.topk. A chosen expert falls to -inf and is barred by `taken`,
    # since a bias may be -inf too.
    choice = tl.where(choice != choice, float("inf"), choice)
    choice = tl.where(inside, choice, float("-inf"))
    topk_ids = tl.zeros([KB], tl.int32)
    weight = tl.zeros([KB], tl.float32)
    taken = e >= E
    for i in tl.static_range(K):
        best = tl.max(choice, 0)
        at = tl.min(tl.where((choice == best) & (taken == 0), e, EB), 0)
        topk_ids = tl.where(k == i, at, topk_ids)
        weight = tl.where(k == i, tl.sum(tl.where(e == at, score, 0.0), 0), weight)
        taken = taken | (e == at)
        choice = tl.where(taken, float("-inf"), choice)
    weight = weight / (tl.sum(weight, 0) + SUM_EPS) * factor
    tl.store(ids + t * K + k, topk_ids, mask=k < K)
    tl.store(weights + t * K + k, weight, mask=k < K)


@triton.jit
def route_hash_kernel(
    logits,
    logits_stride,
    table,
    input_ids,
    num_rows,
    weights,
    ids,
    factor,
    K: tl.constexpr,
    KB: tl.constexpr,
    E: tl.constexpr,
):
    """grid (T,): the K experts of the token id's table row. A token id beyond the table takes row
    0, an expert id expert 0."""
    t = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, KB)
    inside = k < K
    token = tl.load(input_ids + t).to(tl.int64)
    token = tl.where((token >= 0) & (token < num_rows), token, 0)
    topk_ids = tl.load(table + token * K + k, mask=inside, other=0).to(tl.int32)
    topk_ids = tl.where((topk_ids >= 0) & (topk_ids < E), topk_ids, 0)
    score = _score(tl.load(logits + t * logits_stride + topk_ids, mask=inside, other=0.0).to(tl.float32))
    score = tl.where(inside, score, 0.0)
    tl.store(ids + t * K + k, topk_ids, mask=inside)
    tl.store(weights + t * K + k, score / (tl.sum(score, 0) + SUM_EPS) * factor, mask=inside)


@triton.jit
def swiglu_kernel(gate, gate_stride, up, up_stride, out, width, limit, BLOCK: tl.constexpr):
    """grid (T, cdiv(width, BLOCK)): silu(min(gate, limit)) * clamp(up, -limit, limit)."""
    t = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = c < width
    g = tl.load(gate + t * gate_stride + c, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + t * up_stride + c, mask=inside, other=0.0).to(tl.float32)
    # Comparisons, not tl.minimum, so that NaN passes.
    g = tl.where(g > limit, limit, g)
    u = tl.where(u > limit, limit, tl.where(u < -limit, -limit, u))
    y = g / (1.0 + tl.exp(-g)) * u
    tl.store(out + t * width + c, y.to(out.dtype.element_ty), mask=inside)


def _routing(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    num_tokens = logits.shape[0]
    weights = torch.empty(num_tokens, top_k, dtype=torch.float32, device=logits.device)
    return weights, torch.empty(num_tokens, top_k, dtype=torch.int32, device=logits.device)


def route_topk(logits: Tensor, bias: Tensor, top_k: int, scaling_factor: float) -> tuple[Tensor, Tensor]:
    """See `reference.route_topk`; ties go to the lowest expert."""
    weights, ids = _routing(logits, top_k)
    num_tokens, num_experts = logits.shape
    if num_tokens:
        route_topk_kernel[(num_tokens,)](
            logits,
            logits.stride(0),
            bias,
            weights,
            ids,
            scaling_factor,
            E=num_experts,
            EB=triton.next_power_of_2(num_experts),
            K=top_k,
            KB=triton.next_power_of_2(top_k),
            num_warps=2,
        )
    return weights, ids


def route_hash(logits: Tensor, tid2eid: Tensor, input_ids: Tensor, scaling_factor: float) -> tuple[Tensor, Tensor]:
    """See `reference.route_hash`."""
    top_k = tid2eid.shape[1]
    weights, ids = _routing(logits, top_k)
    if logits.shape[0]:
        route_hash_kernel[(logits.shape[0],)](
            logits, logits.stride(0), tid2eid, input_ids, tid2eid.shape[0], weights, ids, scaling_factor,
            K=top_k, KB=triton.next_power_of_2(top_k), E=logits.shape[1], num_warps=1,
        )  # fmt: skip
    return weights, ids


def swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """See `reference.swiglu`; gate and up may be the halves of one tensor."""
    num_tokens, width = gate.shape
    out = torch.empty(num_tokens, width, dtype=gate.dtype, device=gate.device)
    if num_tokens:
        grid = (num_tokens, triton.cdiv(width, SWIGLU_BLOCK))
        swiglu_kernel[grid](gate, gate.stride(0), up, up.stride(0), out, width, limit, BLOCK=SWIGLU_BLOCK, num_warps=4)
    return out
