# SPDX-License-Identifier: Apache-2.0
"""Experts straight from packed mxfp4 weights: for devices where the engine has no kernel of its own
for them.

Pairs of token and expert are sorted by expert on the device and cut into blocks of one expert each;
the launch shape comes from host integers alone, so that blocks beyond the last return at once. Two
launches: gate and up with the clamped SwiGLU, then down with the routing weight. Weights are
decoded to bf16, exactly; products are those of the reference.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.ops.kernels import register_limit
from dsv4.ops.quant.triton import decode_e2m1, ue8m0_value

BN, BK = 64, 128
GROUP = 32  # weights that share a scale


@triton.jit
def _weights(packed, scales, rows, first, row_ok, width, OUT: tl.constexpr, BK: tl.constexpr):
    """Even and odd columns first .. first + BK of weight rows: two [BN, BK / 2] OUT."""
    N: tl.constexpr = rows.shape[0]
    G: tl.constexpr = BK // 32
    b = first // 2 + tl.arange(0, BK // 2)
    g = first // 32 + tl.arange(0, G)
    codes = tl.load(
        packed + rows[:, None] * (width // 2) + b[None, :], mask=row_ok[:, None] & (b < width // 2)[None, :], other=0
    )
    scale = ue8m0_value(
        tl.load(
            scales + rows[:, None] * (width // 32) + g[None, :],
            mask=row_ok[:, None] & (g < width // 32)[None, :],
            other=127,
        )
    )
    codes = tl.reshape(codes, [N, G, 16])
    even = tl.reshape((decode_e2m1(codes & 15) * scale[:, :, None]).to(OUT), [N, BK // 2])
    odd = tl.reshape((decode_e2m1(codes >> 4) * scale[:, :, None]).to(OUT), [N, BK // 2])
    return even, odd


@triton.jit
def _inputs(x, rows, row_ok, first, width, BM: tl.constexpr, BK: tl.constexpr):
    """Even and odd columns of input rows: two [BM, BK / 2]."""
    k = first + tl.arange(0, BK)
    tile = tl.load(x + rows[:, None] * width + k[None, :], mask=row_ok[:, None] & (k < width)[None, :], other=0.0)
    return tl.split(tl.reshape(tile, [BM, BK // 2, 2]))


@triton.jit
def gate_up_kernel(
    x, packed, scales, order, block_expert, block_first, block_end, out, D, inner, top_k, limit, E: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """grid (blocks, cdiv(inner, BN)): out[sorted pair] = swiglu(x w1^T, x w3^T); gate rows come
    first in the weight."""
    block = tl.program_id(0)
    expert = tl.load(block_expert + block)
    if expert < E:
        pair = tl.load(block_first + block) + tl.arange(0, BM)
        ok = pair < tl.load(block_end + block)
        token = (tl.load(order + pair, mask=ok, other=0) // top_k).to(tl.int64)
        n = tl.program_id(1) * BN + tl.arange(0, BN)
        gate_rows = expert.to(tl.int64) * (2 * inner) + n
        gate = tl.zeros([BM, BN], tl.float32)
        up = tl.zeros([BM, BN], tl.float32)
        for first in range(0, D, BK):
            even, odd = _inputs(x, token, ok, first, D, BM, BK)
            w_even, w_odd = _weights(packed, scales, gate_rows, first, n < inner, D, x.dtype.element_ty, BK)
            gate = tl.dot(even, tl.trans(w_even), gate, input_precision="ieee")
            gate = tl.dot(odd, tl.trans(w_odd), gate, input_precision="ieee")
            w_even, w_odd = _weights(packed, scales, gate_rows + inner, first, n < inner, D, x.dtype.element_ty, BK)
            up = tl.dot(even, tl.trans(w_even), up, input_precision="ieee")
            up = tl.dot(odd, tl.trans(w_odd), up, input_precision="ieee")
        g = gate.to(x.dtype.element_ty).to(tl.float32)
        u = up.to(x.dtype.element_ty).to(tl.float32)
        g = tl.where(g > limit, limit, g)
        u = tl.where(u > limit, limit, tl.where(u < -limit, -limit, u))
        y = g / (1.0 + tl.exp(-g)) * u
        tl.store(
            out + pair.to(tl.int64)[:, None] * inner + n[None, :],
            y.to(out.dtype.element_ty),
            mask=ok[:, None] & (n < inner)[None, :],
        )


@triton.jit
def down_kernel(
    h, packed, scales, order, weights, block_expert, block_first, block_end, out, D, inner, E: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """grid (blocks, cdiv(D, BN)): out[pair] = weights[pair] * (h w2^T), fp32."""
    block = tl.program_id(0)
    expert = tl.load(block_expert + block)
    if expert < E:
        pair = tl.load(block_first + block) + tl.arange(0, BM)
        ok = pair < tl.load(block_end + block)
        n = tl.program_id(1) * BN + tl.arange(0, BN)
        rows = expert.to(tl.int64) * D + n
        acc = tl.zeros([BM, BN], tl.float32)
        for first in range(0, inner, BK):
            even, odd = _inputs(h, pair.to(tl.int64), ok, first, inner, BM, BK)
            w_even, w_odd = _weights(packed, scales, rows, first, n < D, inner, h.dtype.element_ty, BK)
            acc = tl.dot(even, tl.trans(w_even), acc, input_precision="ieee")
            acc = tl.dot(odd, tl.trans(w_odd), acc, input_precision="ieee")
        to = tl.load(order + pair, mask=ok, other=0)
        y = acc.to(h.dtype.element_ty).to(tl.float32) * tl.load(weights + to, mask=ok, other=0.0)[:, None]
        tl.store(out + to.to(tl.int64)[:, None] * D + n[None, :], y, mask=ok[:, None] & (n < D)[None, :])


@dataclass(frozen=True)
class _Blocks:
    """order: [pairs] int32, pairs sorted by expert; expert, first, end: [blocks] int32, expert E
    where there is no block."""

    order: Tensor
    expert: Tensor
    first: Tensor
    end: Tensor


def _blocks(ids: Tensor, num_experts: int, rows: int) -> _Blocks:
    """Cut the pairs of ids [T, K] into blocks of at most `rows` pairs of one expert, without a host
    synchronisation."""
    flat = torch.where((ids >= 0) & (ids < num_experts), ids, num_experts).flatten().long()
    order = flat.argsort(stable=True)
    counts = torch.zeros(num_experts + 1, dtype=torch.long, device=ids.device).scatter_add_(
        0, flat, torch.ones_like(flat)
    )[:num_experts]
    ends = counts.cumsum(0)
    block_ends = ((counts + rows - 1) // rows).cumsum(0)
    bound = min(flat.numel(), num_experts) + flat.numel() // rows
    block = torch.arange(bound, device=ids.device)
    expert = torch.searchsorted(block_ends, block, right=True)
    known = expert.clamp(max=num_experts - 1)
    before = block_ends[known] - (counts[known] + rows - 1) // rows
    first = ends[known] - counts[known] + (block - before) * rows
    return _Blocks(order.int(), expert.int(), first.int(), ends[known].int())


def experts_mxfp4(
    x: Tensor, w13: Tensor, s13: Tensor, w2: Tensor, s2: Tensor, weights: Tensor, ids: Tensor, limit: float
) -> Tensor:
    """See `reference.experts_mxfp4`."""
    num_tokens, dim = x.shape
    num_experts, inner, top_k = w2.shape[0], w2.shape[2] * 2, ids.shape[1]
    if num_tokens == 0:
        return torch.empty_like(x)
    rows = 16 if num_tokens * top_k <= 16 * num_experts else 64
    blocks = _blocks(ids, num_experts, rows)
    x, weights = x.contiguous(), weights.contiguous()
    h = torch.empty(num_tokens * top_k, inner, dtype=x.dtype, device=x.device)
    parts = torch.zeros(num_tokens, top_k, dim, dtype=torch.float32, device=x.device)
    shape = dict(E=num_experts, BM=rows, BN=BN, BK=BK, num_warps=4, **register_limit(x.device, 4))
    grid = blocks.expert.shape[0]
    gate_up_kernel[(grid, triton.cdiv(inner, BN))](
        x,
        w13.view(torch.uint8),
        s13.view(torch.uint8),
        blocks.order,
        blocks.expert,
        blocks.first,
        blocks.end,
        h,
        dim,
        inner,
        top_k,
        limit,
        **shape,
    )
    down_kernel[(grid, triton.cdiv(dim, BN))](
        h,
        w2.view(torch.uint8),
        s2.view(torch.uint8),
        blocks.order,
        weights,
        blocks.expert,
        blocks.first,
        blocks.end,
        parts,
        dim,
        inner,
        **shape,
    )
    return parts.sum(1).to(x.dtype)
