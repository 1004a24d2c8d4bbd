# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of the indexer; every function here has its reference in `indexer/reference.py`.

Scores: `decode_logits_kernel` serves few tokens, each walking its keys in parallel parts;
`prefill_logits_kernel` decodes a tile of keys once for a block of tokens. Either scores any range
of whole pages when it is given that part of the block table, which is how tensor-parallel ranks can
share a long prefill; `topk.merge` joins what the ranks chose.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.model.kv_layout import IndexFormat
from dsv4.ops.indexer.query import IndexQuery
from dsv4.ops.indexer.topk_triton import topk
from dsv4.ops.kernels import packed_decode, processors, register_limit
from dsv4.ops.pages import PageTable
from dsv4.ops.quant.triton import (
    E2M1_FLOOR,
    E2M1_INVERSE_MAX,
    E4M3_FLOOR,
    E4M3_INVERSE_MAX,
    abs_bits,
    decode_e4m3_f16,
    dequantize_e2m1,
    encode_e2m1,
    encode_e4m3,
    format_code,
    hadamard_sign,
    rotate_pairs,
    ue8m0_ceil,
    ue8m0_inverse,
    ue8m0_value,
)

__all__ = ["logits", "prepare_query", "topk"]

KEYS_PER_TILE = 64  # a page of the engines
PREFILL_KEYS = 128
PREFILL_TOKENS = 16  # tokens that share one decoded tile of keys
PREFILL_FROM = 8  # tokens per request from which on sharing pays
MAX_PARTS = 256


# --------------------------------------------------------------------------------------------
# Queries


@triton.jit
def prepare_query_kernel(
    q, q_token_stride, weights, weights_stride, cos_sin, values, scales, out_weights, weight_scale,
    H: tl.constexpr, HB: tl.constexpr, D: tl.constexpr, ROPE: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    """grid (T,): one token's heads. Packed formats rotate by the Hadamard matrix and quantise; HB:
    a power of two >= H."""
    t = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, HB)
    d = tl.arange(0, D)
    inside = h < H
    x = tl.load(q + t * q_token_stride + h[:, None] * D + d[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
    x = rotate_pairs(x, cos_sin + t * ROPE, D - ROPE, ROPE, D).to(q.dtype.element_ty)  # [HB, D]
    w = tl.load(weights + t * weights_stride + h, mask=inside, other=0.0).to(tl.float32) * weight_scale
    if FORMAT == 0:
        tl.store(values + (t * H + h[:, None]) * D + d[None, :], x, mask=inside[:, None])
    else:
        # bf16 times +-1 is exact; the norm is one multiplication afterwards.
        x = tl.dot(x.to(tl.bfloat16), hadamard_sign(D).to(tl.bfloat16)) * (D**-0.5)
        x = x.to(tl.bfloat16).to(tl.float32)
        if FORMAT == 2:  # INDEX_FP8
            exponent = ue8m0_ceil(tl.max(abs_bits(x), 1), E4M3_FLOOR, E4M3_INVERSE_MAX)  # [HB]
            codes = encode_e4m3(x * ue8m0_inverse(exponent)[:, None])
            tl.store(values + (t * H + h[:, None]) * D + d[None, :], codes, mask=inside[:, None])
            w = w * ue8m0_value(exponent)
        else:  # INDEX_MXFP4
            G: tl.constexpr = D // 32
            groups = tl.reshape(x, [HB, G, 32])
            exponent = ue8m0_ceil(tl.max(abs_bits(groups), 2), E2M1_FLOOR, E2M1_INVERSE_MAX)  # [HB, G]
            codes = tl.reshape(encode_e2m1(groups * ue8m0_inverse(exponent)[:, :, None]), [HB, D // 2, 2])
            even, odd = tl.split(codes)
            b = tl.arange(0, D // 2)[None, :]
            g = tl.arange(0, G)[None, :]
            tl.store(values + (t * H + h[:, None]) * (D // 2) + b, even | (odd << 4), mask=inside[:, None])
            tl.store(scales + (t * H + h[:, None]) * G + g, exponent.to(tl.uint8), mask=inside[:, None] & (g >= 0))
    tl.store(out_weights + t * H + h, w, mask=inside)


def prepare_query(q: Tensor, weights: Tensor, cos_sin: Tensor, index_format: IndexFormat) -> IndexQuery:
    """See `reference.prepare_query`."""
    num_tokens, num_heads, dim = q.shape
    packed_dim = dim // 2 if index_format is IndexFormat.MXFP4 else dim
    value_dtype = q.dtype if index_format is IndexFormat.PLAIN else torch.uint8
    values = torch.empty(num_tokens, num_heads, packed_dim, dtype=value_dtype, device=q.device)
    scales = (
        torch.empty(num_tokens, num_heads, dim // 32, dtype=torch.uint8, device=q.device)
        if index_format is IndexFormat.MXFP4
        else None
    )
    out_weights = torch.empty(num_tokens, num_heads, dtype=torch.float32, device=q.device)
    if num_tokens:
        q = q if q.stride()[1:] == (dim, 1) else q.contiguous()
        prepare_query_kernel[(num_tokens,)](
            q,
            q.stride(0),
            weights,
            weights.stride(0),
            cos_sin,
            values,
            values if scales is None else scales,
            out_weights,
            dim**-0.5 * num_heads**-0.5,
            H=num_heads,
            HB=max(16, triton.next_power_of_2(num_heads)),
            D=dim,
            ROPE=cos_sin.shape[-1],
            FORMAT=format_code(index_format),
            num_warps=8,
        )
    return IndexQuery(values, scales, out_weights, index_format)


# --------------------------------------------------------------------------------------------
# Scores


@triton.jit
def _expand_e2m1(packed, scale, PTX: tl.constexpr):
    """The even and the odd elements of mxfp4 rows in bf16, exactly: packed [N, 64] bytes, scale
    [N, 4] ue8m0 bytes."""
    N: tl.constexpr = packed.shape[0]
    even, odd = dequantize_e2m1(tl.reshape(packed, [N, 4, 16]), ue8m0_value(scale)[:, :, None], PTX)
    return tl.reshape(even, [N, 64]), tl.reshape(odd, [N, 64])


@triton.jit
def _load(at, ok, OTHER: tl.constexpr):
    """ok: a mask, or None to load all."""
    return tl.load(at) if ok is None else tl.load(at, mask=ok, other=OTHER)


@triton.jit
def _operands(values, scales, ok, FORMAT: tl.constexpr, PTX: tl.constexpr):
    """Rows as two operands [N, 64] of a product over 128 channels: halves, or mxfp4's even and odd
    ones. values, scales: pointers to their beginnings [N]; ok: as of `_load`."""
    m = ok
    if ok is not None:
        m = ok[:, None]
    at = values[:, None] + tl.arange(0, 64)[None, :]
    if FORMAT == 3:
        packed = _load(at, m, 0)
        a, b = _expand_e2m1(packed, _load(scales[:, None] + tl.arange(0, 4)[None, :], m, 127), PTX)
    else:
        a, b = _load(at, m, 0), _load(at + 64, m, 0)
        if FORMAT == 2:
            a, b = decode_e4m3_f16(a, PTX), decode_e4m3_f16(b, PTX)
    return a, b


@triton.jit
def _load_query(values, scales, t, h, inside, H: tl.constexpr, FORMAT: tl.constexpr, PTX: tl.constexpr):
    """One token's heads as two operands [HB, 64]."""
    row = t * H + h
    ROW: tl.constexpr = 64 if FORMAT == 3 else 128  # elements
    return _operands(values + row * ROW, scales + row * 4, inside, FORMAT, PTX)


@triton.jit
def _load_keys(
    pages,
    page_stride,
    num_pages,
    table,
    table_width,
    start,
    length,
    BN: tl.constexpr,
    ROWS: tl.constexpr,
    FORMAT: tl.constexpr,
    PTX: tl.constexpr,
):
    """The index keys start .. start + BN of one request as two operands [BN, 64], what multiplies
    their scores [BN] fp32, and whether they are there: where they are not, scores mean nothing.

    start: less than length, a multiple of BN. A tile that lies in one page is looked up once, and
    loaded to its end.
    """
    if ROWS % BN == 0:
        at, row = start // ROWS, start % ROWS + tl.arange(0, BN)
        ok = at < table_width
    else:
        entry = start + tl.arange(0, BN)
        at, row = entry // ROWS, entry % ROWS
        ok = (entry < length) & (at < table_width)
    page = tl.load(table + at, mask=ok, other=-1)
    ok = ok & (page >= 0) & (page < num_pages)
    first = pages + tl.where(ok, page, 0).to(tl.int64) * page_stride
    mask = None if ROWS % BN == 0 else ok
    ROW: tl.constexpr = 64 if FORMAT == 3 else 128
    a, b = _operands(first + row * ROW, first + ROWS * ROW + row * 4, mask, FORMAT, PTX)
    factor = tl.full([BN], 1.0, tl.float32)
    if FORMAT == 2:
        scales = (first + ROWS * ROW).to(tl.pointer_type(tl.float32)) + row
        factor = _load(scales, mask, 0.0) * 65536.0  # both operands hold value * 2**-8
    return a, b, factor, ok


@triton.jit
def _score(qa, qb, w, ka, kb, factor, ok):
    """sum_h w[h] * relu(q_h . k) * factor: [BN] fp32, 0 where a key is not there."""
    s = tl.dot(qa, tl.trans(ka), input_precision="ieee")
    s = tl.dot(qb, tl.trans(kb), s, input_precision="ieee")  # [HB, BN]
    # Not tl.maximum(s, 0), which turns NaN into 0.
    score = tl.sum(tl.where(s < 0, 0.0, s) * w[:, None], 0) * factor
    return tl.where(ok, score, 0.0)


@triton.jit(do_not_specialize=["block_table_stride", "block_table_width", "max_entries"])
def decode_logits_kernel(
    values, scales, weights, pages, page_stride, num_pages, block_table, block_table_stride, block_table_width,
    request_of_token, entry_lens, out, out_stride, max_entries,
    H: tl.constexpr, HB: tl.constexpr, BN: tl.constexpr, ROWS: tl.constexpr, FORMAT: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """grid (T, parts): each part walks an equal share of the tiles that the token really has."""
    t = tl.program_id(0).to(tl.int64)
    length = tl.minimum(tl.load(entry_lens + t), max_entries)
    share = tl.cdiv(tl.cdiv(length, BN), tl.num_programs(1)) * BN
    first = tl.program_id(1) * share
    last = tl.minimum(first + share, length)
    if first < last:
        h = tl.arange(0, HB)
        qa, qb = _load_query(values, scales, t, h, h < H, H, FORMAT, PTX)
        w = tl.load(weights + t * H + h, mask=h < H, other=0.0)
        table = block_table + tl.load(request_of_token + t).to(tl.int64) * block_table_stride
        for start in range(first, last, BN):
            entry = start + tl.arange(0, BN)
            ka, kb, factor, ok = _load_keys(
                pages, page_stride, num_pages, table, block_table_width, start, last, BN, ROWS, FORMAT, PTX
            )
            tl.store(out + t * out_stride + entry, _score(qa, qb, w, ka, kb, factor, ok), mask=entry < last)


@triton.jit(do_not_specialize=["block_table_stride", "block_table_width", "max_entries", "num_tokens"])
def prefill_logits_kernel(
    values,
    scales,
    weights,
    pages,
    page_stride,
    num_pages,
    block_table,
    block_table_stride,
    block_table_width,
    request_of_token,
    entry_lens,
    out,
    out_stride,
    max_entries,
    num_tokens,
    H: tl.constexpr,
    HB: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    ROWS: tl.constexpr,
    FORMAT: tl.constexpr,
    PTX: tl.constexpr,
):
    """grid (cdiv(T, BT), cdiv(max_entries, BN)): a tile of keys is decoded once and scored against
    BT neighbouring tokens.

    Tokens of one request are neighbours, so a block usually belongs to one; where requests meet,
    each takes its turn.
    """
    t0 = tl.program_id(0) * BT
    start = tl.program_id(1) * BN
    entry = start + tl.arange(0, BN)
    tokens = t0 + tl.arange(0, BT)
    lens = tl.minimum(tl.load(entry_lens + tokens, mask=tokens < num_tokens, other=0), max_entries)
    longest = tl.max(lens, 0)
    if longest > start:
        h = tl.arange(0, HB)
        owners = tl.load(request_of_token + tokens, mask=tokens < num_tokens, other=-1)
        first = tl.load(request_of_token + t0)
        last = tl.max(owners, 0)
        for request in range(first, last + 1):
            reach = tl.max(tl.where(owners == request, lens, 0), 0)
            if reach > start:
                table = block_table + request * block_table_stride
                ka, kb, factor, ok = _load_keys(
                    pages, page_stride, num_pages, table, block_table_width, start, reach, BN, ROWS, FORMAT, PTX
                )
                for i in range(BT):
                    t = (t0 + i).to(tl.int64)
                    mine = tl.max(tl.where((tokens == t0 + i) & (owners == request), lens, 0), 0)
                    if mine > start:
                        qa, qb = _load_query(values, scales, t, h, h < H, H, FORMAT, PTX)
                        w = tl.load(weights + t * H + h, mask=h < H, other=0.0)
                        tl.store(out + t * out_stride + entry, _score(qa, qb, w, ka, kb, factor, ok), mask=entry < mine)


def logits(
    query: IndexQuery, keys: PageTable, request_of_token: Tensor, entry_lens: Tensor, max_entries: int
) -> Tensor:
    """See `reference.logits`; places from entry_lens[t] on are left as they are, since nothing may
    read them."""
    num_tokens, num_heads = query.weights.shape
    # Rows that start at a multiple of 16 let the kernels load and store vectors.
    width = triton.cdiv(max(max_entries, 1), 16) * 16
    out = torch.empty(num_tokens, width, dtype=torch.float32, device=query.values.device)[:, :max_entries]
    if num_tokens == 0 or max_entries == 0:
        return out
    scales = query.values if query.scales is None else query.scales
    pages, block_table = keys.pages, keys.block_table
    args = (
        query.values,
        scales,
        query.weights,
        pages.data,
        pages.data.stride(0),
        pages.data.shape[0],
        block_table,
        block_table.stride(0),
        block_table.shape[1],
        request_of_token,
        entry_lens,
        out,
        out.stride(0),
        max_entries,
    )
    device = out.device
    shape = dict(
        H=num_heads,
        HB=max(16, triton.next_power_of_2(num_heads)),
        ROWS=pages.rows,
        FORMAT=format_code(pages.format),
        PTX=packed_decode(device),
        num_warps=4,
        **register_limit(device, 4),
    )
    if num_tokens >= PREFILL_FROM * block_table.shape[0]:
        grid = (triton.cdiv(num_tokens, PREFILL_TOKENS), triton.cdiv(max_entries, PREFILL_KEYS))
        prefill_logits_kernel[grid](*args, num_tokens, BT=PREFILL_TOKENS, BN=PREFILL_KEYS, **shape)
    else:
        tiles = triton.cdiv(max_entries, KEYS_PER_TILE)
        parts = max(1, min(tiles, triton.cdiv(4 * processors(device), num_tokens), MAX_PARTS))
        decode_logits_kernel[(num_tokens, parts)](*args, BN=KEYS_PER_TILE, **shape)
    return out
