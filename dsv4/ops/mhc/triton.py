# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of the hyper-connections; every function here has its reference in
`mhc/reference.py`.

`pre` is two launches: the projection of the flattened streams is split over their length, so that
one token keeps the whole device busy, and a second kernel joins the parts, balances the matrix,
collapses the streams and normalises. The second needs whole rows and the first whole columns of
`fn`, so no single launch has both without waiting for others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.ops.kernels import processors
from dsv4.ops.mhc.site import PendingPost, Site, SublayerInput

STREAMS = 4
PART_TOKENS = 16  # the smallest tile of a matrix instruction
PART_WIDTH = 128
MAX_PARTS = 64
POST_WIDTH = 32  # channels of four streams in registers at once; 64 spill half a kilobyte a lane


@triton.jit
def _three_bf16(x):
    """fp32 as a sum of three bf16 numbers: 24 significant bits, so nothing is lost."""
    high = x.to(tl.bfloat16)
    rest = x - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    return high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def _project_tile(x, w, mix):
    """mix + x w^T with fp32 accuracy: x [BT, BK] of the streams' dtype, w [NB, BK] fp32."""
    if x.dtype == tl.bfloat16:
        # bf16 times bf16 is exact, so three products on matrix units equal fp32; tf32 would keep 11
        # bits.
        high, middle, low = _three_bf16(w)
        mix = tl.dot(x, tl.trans(low), mix)
        mix = tl.dot(x, tl.trans(middle), mix)
        mix = tl.dot(x, tl.trans(high), mix)
    else:
        mix = tl.dot(x.to(tl.float32), tl.trans(w), mix, input_precision="ieee")
    return mix


@triton.jit(do_not_specialize=["num_tokens"])
def project_kernel(
    streams, token_stride, fn, part_mix, part_squares, num_tokens, width, share,
    N: tl.constexpr, NB: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """grid (cdiv(T, BT), parts): this part's share of streams @ fn^T and of the sum of squares, in
    fp32.

    part_mix: [parts, T, N]; part_squares: [parts, T]; width: columns of fn; share: columns of a
    part, a multiple of BK.
    """
    part = tl.program_id(1)
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    n = tl.arange(0, NB)
    token = t < num_tokens
    mix = tl.zeros([BT, NB], tl.float32)
    squares = tl.zeros([BT], tl.float32)
    for start in range(part * share, tl.minimum((part + 1) * share, width), BK):
        k = start + tl.arange(0, BK)
        x = tl.load(
            streams + t.to(tl.int64)[:, None] * token_stride + k[None, :],
            mask=token[:, None] & (k < width)[None, :],
            other=0.0,
        )
        w = tl.load(
            fn + n[:, None] * width + k[None, :], mask=(n < N)[:, None] & (k < width)[None, :], other=0.0
        )  # [NB, BK] fp32
        mix = _project_tile(x, w, mix)
        wide = x.to(tl.float32)
        squares += tl.sum(wide * wide, 1)
    row = part.to(tl.int64) * num_tokens + t
    tl.store(part_mix + row[:, None] * N + n[None, :], mix, mask=token[:, None] & (n < N)[None, :])
    tl.store(part_squares + row, squares, mask=token)


@triton.jit
def _joined(part_mix, t, num_tokens, parts, first, count: tl.constexpr, N: tl.constexpr, PARTS: tl.constexpr):
    """Columns first .. first + count of the token's mix, summed over the parts: [count] fp32."""
    p = tl.arange(0, PARTS)
    at = (p.to(tl.int64) * num_tokens + t)[:, None] * N + (first + tl.arange(0, count))[None, :]
    return tl.sum(tl.load(part_mix + at, mask=(p < parts)[:, None], other=0.0), 0)


@triton.jit
def _inverse_rms(part_squares, t, num_tokens, parts, width, rms_eps, PARTS: tl.constexpr):
    p = tl.arange(0, PARTS)
    squares = tl.load(part_squares + p.to(tl.int64) * num_tokens + t, mask=p < parts, other=0.0)
    return tl.rsqrt(tl.sum(squares, 0) / width + rms_eps)


@triton.jit
def _collapse_and_norm(streams, token_stride, t, weights, norm_weight, out, D, rms_eps, BD: tl.constexpr):
    """RMSNorm(sum_j weights[j] X_j), the sum rounded to the streams' dtype first; weights: [4]."""
    j = tl.arange(0, 4)
    w0 = tl.sum(tl.where(j == 0, weights, 0.0), 0)
    w1 = tl.sum(tl.where(j == 1, weights, 0.0), 0)
    w2 = tl.sum(tl.where(j == 2, weights, 0.0), 0)
    w3 = tl.sum(tl.where(j == 3, weights, 0.0), 0)
    d = tl.arange(0, BD)
    inside = d < D
    x = streams + t * token_stride + d
    z = tl.load(x, mask=inside, other=0.0).to(tl.float32) * w0
    z += tl.load(x + D, mask=inside, other=0.0).to(tl.float32) * w1
    z += tl.load(x + 2 * D, mask=inside, other=0.0).to(tl.float32) * w2
    z += tl.load(x + 3 * D, mask=inside, other=0.0).to(tl.float32) * w3
    z = z.to(streams.dtype.element_ty).to(tl.float32)
    rms = tl.rsqrt(tl.sum(z * z, 0) / D + rms_eps)
    y = z * rms * tl.load(norm_weight + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + t * D + d, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit(do_not_specialize=["parts", "num_tokens"])
def pre_kernel(
    streams, token_stride, part_mix, part_squares, parts, base, scale, norm_weight, out, out_post, out_comb,
    num_tokens, D, rms_eps, hc_eps, iters, BD: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """grid (T,): join the projection's parts, balance the 4 x 4 matrix, collapse the streams and
    normalise."""
    t = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, 4)
    jk = j[:, None] * 4 + j[None, :]
    r = _inverse_rms(part_squares, t, num_tokens, parts, 4 * D, rms_eps, PARTS)
    mix_pre = _joined(part_mix, t, num_tokens, parts, 0, 4, 24, PARTS) * r
    mix_post = _joined(part_mix, t, num_tokens, parts, 4, 4, 24, PARTS) * r
    mix_comb = tl.reshape(_joined(part_mix, t, num_tokens, parts, 8, 16, 24, PARTS), [4, 4]) * r
    weights = _sigmoid(mix_pre * tl.load(scale) + tl.load(base + j)) + hc_eps
    post = 2.0 * _sigmoid(mix_post * tl.load(scale + 1) + tl.load(base + 4 + j))
    m = mix_comb * tl.load(scale + 2) + tl.load(base + 8 + jk)
    m = tl.exp(m - tl.max(m, 1)[:, None])
    m = m / tl.sum(m, 1)[:, None] + hc_eps
    m = m / (tl.sum(m, 0)[None, :] + hc_eps)
    for _ in range(iters - 1):
        m = m / (tl.sum(m, 1)[:, None] + hc_eps)
        m = m / (tl.sum(m, 0)[None, :] + hc_eps)
    tl.store(out_post + t * 4 + j, post)
    tl.store(out_comb + t * 16 + jk, m)
    _collapse_and_norm(streams, token_stride, t, weights, norm_weight, out, D, rms_eps, BD)


@triton.jit(do_not_specialize=["parts", "num_tokens"])
def head_kernel(
    streams, token_stride, part_mix, part_squares, parts, base, scale, norm_weight, out, num_tokens, D, rms_eps, hc_eps,
    BD: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """grid (T,): join the projection's parts, collapse the streams and normalise."""
    t = tl.program_id(0).to(tl.int64)
    r = _inverse_rms(part_squares, t, num_tokens, parts, 4 * D, rms_eps, PARTS)
    mix = _joined(part_mix, t, num_tokens, parts, 0, 4, 4, PARTS) * r
    weights = _sigmoid(mix * tl.load(scale) + tl.load(base + tl.arange(0, 4))) + hc_eps
    _collapse_and_norm(streams, token_stride, t, weights, norm_weight, out, D, rms_eps, BD)


@triton.jit
def post_kernel(streams, token_stride, y, y_stride, post_weight, comb, out, D, BD: tl.constexpr):
    """grid (T, cdiv(D, BD)): X'_k = post_k y + sum_j comb[j, k] X_j for one piece of the
    channels."""
    t = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    inside = d < D
    x = streams + t * token_stride + d
    x0 = tl.load(x, mask=inside, other=0.0).to(tl.float32)
    x1 = tl.load(x + D, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(x + 2 * D, mask=inside, other=0.0).to(tl.float32)
    x3 = tl.load(x + 3 * D, mask=inside, other=0.0).to(tl.float32)
    branch = tl.load(y + t * y_stride + d, mask=inside, other=0.0).to(tl.float32)
    c = comb + t * 16
    for k in tl.static_range(4):
        mixed = tl.load(c + k) * x0 + tl.load(c + 4 + k) * x1 + tl.load(c + 8 + k) * x2 + tl.load(c + 12 + k) * x3
        mixed += tl.load(post_weight + t * 4 + k) * branch
        tl.store(out + t * 4 * D + k * D + d, mixed.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_tokens"])
def post_project_kernel(
    streams, token_stride, y, y_stride, post_weight, comb, out, fn, part_mix, part_squares, num_tokens, D, share,
    N: tl.constexpr, NB: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """grid (cdiv(T, BT), parts): `post_kernel` on this part's channels, and at once their share of
    the next projection.

    share: channels of a part, a multiple of BK; each gives four columns of fn, one per stream.
    """
    part = tl.program_id(1)
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    wide_t = t.to(tl.int64)
    n = tl.arange(0, NB)
    token = t < num_tokens
    mix = tl.zeros([BT, NB], tl.float32)
    squares = tl.zeros([BT], tl.float32)
    for start in range(part * share, tl.minimum((part + 1) * share, D), BK):
        d = start + tl.arange(0, BK)
        inside = token[:, None] & (d < D)[None, :]
        x = streams + wide_t[:, None] * token_stride + d[None, :]
        x0 = tl.load(x, mask=inside, other=0.0).to(tl.float32)
        x1 = tl.load(x + D, mask=inside, other=0.0).to(tl.float32)
        x2 = tl.load(x + 2 * D, mask=inside, other=0.0).to(tl.float32)
        x3 = tl.load(x + 3 * D, mask=inside, other=0.0).to(tl.float32)
        branch = tl.load(y + wide_t[:, None] * y_stride + d[None, :], mask=inside, other=0.0).to(tl.float32)
        for k in tl.static_range(4):
            c = comb + wide_t * 16 + k
            z = tl.load(c, mask=token, other=0.0)[:, None] * x0
            z += tl.load(c + 4, mask=token, other=0.0)[:, None] * x1
            z += tl.load(c + 8, mask=token, other=0.0)[:, None] * x2
            z += tl.load(c + 12, mask=token, other=0.0)[:, None] * x3
            z += tl.load(post_weight + wide_t * 4 + k, mask=token, other=0.0)[:, None] * branch
            z = z.to(out.dtype.element_ty)  # [BT, BK]
            tl.store(out + wide_t[:, None] * (4 * D) + k * D + d[None, :], z, mask=inside)
            w = tl.load(
                fn + n[:, None] * (4 * D) + k * D + d[None, :], mask=(n < N)[:, None] & (d < D)[None, :], other=0.0
            )
            mix = _project_tile(z, w, mix)
            rounded = z.to(tl.float32)
            squares += tl.sum(rounded * rounded, 1)
    row = part.to(tl.int64) * num_tokens + t
    tl.store(part_mix + row[:, None] * N + n[None, :], mix, mask=token[:, None] & (n < N)[None, :])
    tl.store(part_squares + row, squares, mask=token)


def _split(num_tokens: int, width: int, piece: int, device: torch.device) -> tuple[int, int]:
    """How many parts of how many columns (a multiple of `piece`) fill the device, from host
    integers alone."""
    blocks, steps = triton.cdiv(num_tokens, PART_TOKENS), triton.cdiv(width, piece)
    parts = max(1, min(steps, triton.cdiv(2 * processors(device), blocks), MAX_PARTS))
    share = triton.cdiv(steps, parts) * piece
    return triton.cdiv(width, share), share


@dataclass(frozen=True)
class _Projection:
    """Parts of the projection [count, T, N] and of the sum of squares [count, T], fp32."""

    mix: Tensor
    squares: Tensor
    count: int


def _empty_projection(parts: int, num_tokens: int, n: int, device: torch.device) -> _Projection:
    mix = torch.empty(parts, num_tokens, n, dtype=torch.float32, device=device)
    return _Projection(mix, torch.empty(parts, num_tokens, dtype=torch.float32, device=device), parts)


def _project(streams: Tensor, fn: Tensor) -> _Projection:
    num_tokens, width, n = streams.shape[0], fn.shape[1], fn.shape[0]
    parts, share = _split(num_tokens, width, PART_WIDTH, streams.device)
    projected = _empty_projection(parts, num_tokens, n, streams.device)
    project_kernel[(triton.cdiv(num_tokens, PART_TOKENS), parts)](
        streams, streams.stride(0), fn, projected.mix, projected.squares, num_tokens, width, share,
        N=n, NB=triton.next_power_of_2(max(n, 16)), BT=PART_TOKENS, BK=PART_WIDTH, num_warps=4,
    )  # fmt: skip
    return projected


def _check_streams(streams: Tensor, iters: int = 1) -> None:
    if iters < 1:
        raise ValueError(f"iters is {iters}, need at least 1")
    if streams.shape[1] != STREAMS:
        raise ValueError(f"the kernels mix {STREAMS} residual streams, not {streams.shape[1]}")
    if streams.stride()[1:] != (streams.shape[2], 1):
        raise ValueError("a token's streams must be contiguous")


def _row_warps(width: int) -> int:
    return 4 if width <= 1024 else 8 if width <= 4096 else 16


def pre(streams: Tensor, site: Site) -> SublayerInput:
    """See `reference.pre`. Raises ValueError when iters < 1, and for other than 4 streams."""
    _check_streams(streams, site.iters)
    return _finish_pre(streams, _project(streams, site.fn) if streams.shape[0] else None, site)


def _finish_pre(streams: Tensor, projected: _Projection | None, site: Site) -> SublayerInput:
    """projected: None when there are no tokens."""
    num_tokens, n, dim = streams.shape
    x = torch.empty(num_tokens, dim, dtype=streams.dtype, device=streams.device)
    post_weight = torch.empty(num_tokens, n, dtype=torch.float32, device=streams.device)
    comb = torch.empty(num_tokens, n, n, dtype=torch.float32, device=streams.device)
    if projected is not None:
        pre_kernel[(num_tokens,)](
            streams,
            streams.stride(0),
            projected.mix,
            projected.squares,
            projected.count,
            site.base,
            site.scale,
            site.norm_weight,
            x,
            post_weight,
            comb,
            num_tokens,
            dim,
            site.rms_eps,
            site.hc_eps,
            site.iters,
            BD=triton.next_power_of_2(dim),
            PARTS=MAX_PARTS,
            num_warps=_row_warps(dim),
        )
    return SublayerInput(x, streams, post_weight, comb)


def post_pre(pending: PendingPost, site: Site) -> SublayerInput:
    """See `reference.post_pre`: the new streams are projected while they are still in registers."""
    streams, y, n = pending.streams, pending.y, site.fn.shape[0]
    _check_streams(streams, site.iters)
    num_tokens, _, dim = streams.shape
    out = torch.empty(streams.shape, dtype=streams.dtype, device=streams.device)
    projected = None
    if num_tokens:
        parts, share = _split(num_tokens, dim, POST_WIDTH, streams.device)
        projected = _empty_projection(parts, num_tokens, n, streams.device)
        post_project_kernel[(triton.cdiv(num_tokens, PART_TOKENS), parts)](
            streams,
            streams.stride(0),
            y,
            y.stride(0),
            pending.post,
            pending.comb,
            out,
            site.fn,
            projected.mix,
            projected.squares,
            num_tokens,
            dim,
            share,
            N=n,
            NB=triton.next_power_of_2(max(n, 16)),
            BT=PART_TOKENS,
            BK=POST_WIDTH,
            num_warps=4,
        )
    return _finish_pre(out, projected, site)


def post(pending: PendingPost) -> Tensor:
    """See `reference.post`."""
    streams, y = pending.streams, pending.y
    _check_streams(streams)
    num_tokens, _, dim = streams.shape
    out = torch.empty(streams.shape, dtype=streams.dtype, device=streams.device)
    if num_tokens:
        block = min(1024, triton.next_power_of_2(dim))
        post_kernel[(num_tokens, triton.cdiv(dim, block))](
            streams, streams.stride(0), y, y.stride(0), pending.post, pending.comb, out, dim, BD=block, num_warps=4
        )
    return out


def head(streams: Tensor, site: Site) -> Tensor:
    """See `reference.head`."""
    _check_streams(streams)
    num_tokens, _, dim = streams.shape
    out = torch.empty(num_tokens, dim, dtype=streams.dtype, device=streams.device)
    if num_tokens:
        projected = _project(streams, site.fn)
        head_kernel[(num_tokens,)](
            streams,
            streams.stride(0),
            projected.mix,
            projected.squares,
            projected.count,
            site.base,
            site.scale,
            site.norm_weight,
            out,
            num_tokens,
            dim,
            site.rms_eps,
            site.hc_eps,
            BD=triton.next_power_of_2(dim),
            PARTS=MAX_PARTS,
            num_warps=_row_warps(dim),
        )
    return out
