# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of the attention operators; every function here has its reference in
`attention/reference.py`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.ops.attention.split_kv import sparse_attention
from dsv4.ops.pages import SlotMapping
from dsv4.ops.quant.triton import format_code, rotate_pairs, store_row

__all__ = ["norm_rope_store", "output_a", "sparse_attention"]

HEADS_PER_PROGRAM = 4


@triton.jit
def norm_rope_store_kernel(
    q,
    q_token_stride,
    q_head_stride,
    kv,
    kv_stride,
    kv_weight,
    eps,
    cos_sin,
    out,
    pages,
    page_stride,
    num_slots,
    slots,
    H: tl.constexpr,
    D: tl.constexpr,
    ROPE: tl.constexpr,
    HB: tl.constexpr,
    ROWS: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """grid (T, 1 + cdiv(H, HB)): the first program of a token writes its kv row, the others a block
    of heads each."""
    t = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    d = tl.arange(0, D)[None, :]
    table = cos_sin + t * ROPE
    if part == 0:
        slot = tl.load(slots + t)
        if (slot >= 0) & (slot < num_slots):
            x = tl.load(kv + t * kv_stride + d).to(tl.float32)  # [1, D]
            rms = tl.rsqrt(tl.sum(x * x, 1) / D + eps)
            y = x * rms[:, None] * tl.load(kv_weight + d).to(tl.float32)
            y = y.to(kv.dtype.element_ty).to(tl.float32)
            y = rotate_pairs(y, table, D - ROPE, ROPE, D)
            y = y.to(kv.dtype.element_ty).to(tl.float32)
            page = pages + (slot // ROWS).to(tl.int64) * page_stride
            store_row(page, slot % ROWS, y, D, ROPE, ROWS, FORMAT)
    else:
        h = (part - 1) * HB + tl.arange(0, HB)
        inside = (h < H)[:, None]
        x = tl.load(q + t * q_token_stride + h[:, None] * q_head_stride + d, mask=inside, other=0.0).to(tl.float32)
        rms = tl.rsqrt(tl.sum(x * x, 1) / D + eps)
        y = (x * rms[:, None]).to(q.dtype.element_ty).to(tl.float32)  # [HB, D]
        y = rotate_pairs(y, table, D - ROPE, ROPE, D)
        tl.store(out + (t * H + h[:, None]) * D + d, y.to(out.dtype.element_ty), mask=inside)


def norm_rope_store(
    q: Tensor, kv: Tensor, kv_weight: Tensor, eps: float, cos_sin: Tensor, window: SlotMapping
) -> Tensor:
    """See `reference.norm_rope_store`. Packed values are quantised from rows rounded to q's dtype,
    then to bf16."""
    num_tokens, num_heads, dim = q.shape
    pages = window.pages
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if num_tokens == 0:
        return out
    grid = (num_tokens, 1 + triton.cdiv(num_heads, HEADS_PER_PROGRAM))
    norm_rope_store_kernel[grid](
        q,
        q.stride(0),
        q.stride(1),
        kv,
        kv.stride(0),
        kv_weight,
        eps,
        cos_sin,
        out,
        pages.data,
        pages.data.stride(0),
        pages.num_slots,
        window.slots,
        H=num_heads,
        D=dim,
        ROPE=cos_sin.shape[-1],
        HB=HEADS_PER_PROGRAM,
        ROWS=pages.rows,
        FORMAT=format_code(pages.format),
        num_warps=4,
    )
    return out


@triton.jit
def rotate_back_kernel(
    o,
    o_token_stride,
    o_head_stride,
    cos_sin,
    out,
    H: tl.constexpr,
    D: tl.constexpr,
    ROPE: tl.constexpr,
    HB: tl.constexpr,
):
    """grid (T, cdiv(H, HB)): copy a block of heads with the last ROPE channels rotated back."""
    t = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * HB + tl.arange(0, HB)
    d = tl.arange(0, D)[None, :]
    inside = (h < H)[:, None]
    x = tl.load(o + t * o_token_stride + h[:, None] * o_head_stride + d, mask=inside, other=0.0).to(
        tl.float32
    )  # [HB, D]
    y = rotate_pairs(x, cos_sin + t * ROPE, D - ROPE, ROPE, D, SIGN=-1.0)
    tl.store(out + (t * H + h[:, None]) * D + d, y.to(out.dtype.element_ty), mask=inside)


def output_a(o: Tensor, cos_sin: Tensor | None, wo_a: Tensor) -> Tensor:
    """See `reference.output_a`. The grouped product stays with the device's GEMM library: one
    batched GEMM."""
    num_tokens, num_heads, dim = o.shape
    rotated = o if cos_sin is None else torch.empty(o.shape, dtype=o.dtype, device=o.device)
    if num_tokens and cos_sin is not None:
        rotate_back_kernel[(num_tokens, triton.cdiv(num_heads, HEADS_PER_PROGRAM))](
            o,
            o.stride(0),
            o.stride(1),
            cos_sin,
            rotated,
            H=num_heads,
            D=dim,
            ROPE=cos_sin.shape[-1],
            HB=HEADS_PER_PROGRAM,
            num_warps=4,
        )
    groups = rotated.reshape(num_tokens, wo_a.shape[0], -1)  # [T, G, (H / G) * D]
    out = torch.empty(num_tokens, *wo_a.shape[:2], dtype=o.dtype, device=o.device)
    torch.bmm(groups.transpose(0, 1), wo_a.transpose(1, 2), out=out.transpose(0, 1))
    return out.flatten(1)
