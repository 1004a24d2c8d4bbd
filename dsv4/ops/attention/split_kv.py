# SPDX-License-Identifier: Apache-2.0
"""Sparse attention over window, compressed entries and sink: split-KV decode, and prefill as one
split.

A program holds a block of one token's heads and walks a part of the token's keys, gathered by slot.
K and V are the same row, cut in four pieces (256 + 128 + 64 quantised channels, 64 rotated ones): a
whole row of 512 would cost 128 registers a lane. Each part leaves its own normalised output and
log-sum-exp; `combine_kernel` joins them and adds the sink.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.model.kv_layout import KvFormat
from dsv4.ops.kernels import on_amd, packed_decode, processors, register_limit
from dsv4.ops.pages import KV_ROPE_DIM, Selection
from dsv4.ops.quant.triton import dequantize_e4m3, format_code, rotate_pairs, ue8m0_value

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)
MAX_SPLITS = 64
KEYS_PER_SPLIT = 32  # a tile
PARTS_TOGETHER = 8
SPLIT_FROM = 160  # keys; a window and a tile more do not pay for joining parts


class Keys(NamedTuple):
    """A `Selection`, as kernels take it. page_rows and format are constants, row and all of a
    missing Selection None.

    What changes from step to step is an argument of its own: Triton compiles anew for every class
    of an integer in a group.
    """

    pages: Any
    page_stride: Any
    num_slots: Any
    slots: Any
    lens: Any
    row: Any
    page_rows: Any
    format: Any


@dataclass(frozen=True)
class Tile:
    """heads and keys of one program's tile. keys_first: the matrix units' rows are keys, or
    channels, not heads."""

    heads: int
    keys: int
    num_warps: int
    num_stages: int
    keys_first: bool = False


def tile_for(num_heads: int, packed: bool, amd: bool) -> Tile:
    """32 heads gather and decode half as often as 16; 64 spill on every NVIDIA target or overflow
    sm100's tensor memory. Rows of a product are 16 at least, its columns 8: up to 8 heads are
    columns. 32 heads of packed keys leave no registers to load ahead."""
    if amd:  # a wave has 64 lanes, so that 4 warps have the registers of 8
        return Tile(16, 32, 4, 2) if num_heads <= 16 else Tile(32, 16, 4, 2)
    if num_heads > 16:
        return Tile(32, 32, 8, 1 if packed else 3)
    keys_first = packed and num_heads <= 8
    return Tile(8 if keys_first else 16, 32, 4, 3, keys_first)


def splits_for(num_tokens: int, head_blocks: int, max_keys: int, device: torch.device) -> int:
    """Parts per token that fill the device twice, from host integers alone, so that a captured
    graph keeps its shape."""
    if max_keys < SPLIT_FROM:
        return 1
    wanted = triton.cdiv(2 * processors(device), num_tokens * head_blocks)
    return min(wanted, max_keys // KEYS_PER_SPLIT, MAX_SPLITS)


@triton.jit
def _keys(
    pages,
    rows_at,
    scales_at,
    ok,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    FORMAT: tl.constexpr,
    OUT: tl.constexpr,
    PTX: tl.constexpr,
):
    """Channels FIRST .. FIRST + WIDTH of the rows, [BN, WIDTH] OUT; rows that are not ok are never
    read, and are 0."""
    at = pages + (rows_at[:, None] + (FIRST + tl.arange(0, WIDTH))[None, :])
    if FORMAT == 0:
        keys = tl.load(at, mask=ok[:, None], other=0.0).to(OUT)
    else:
        GROUPS: tl.constexpr = WIDTH // 64
        N: tl.constexpr = rows_at.shape[0]
        codes = tl.reshape(tl.load(at, mask=ok[:, None], other=0), [N, GROUPS, 64])
        scale_at = pages + (scales_at[:, None] + (FIRST // 64 + tl.arange(0, GROUPS))[None, :])
        scale = ue8m0_value(tl.load(scale_at, mask=ok[:, None], other=127))  # [N, GROUPS]
        keys = tl.reshape(dequantize_e4m3(codes, scale[:, :, None], OUT, PTX), [N, WIDTH])
    return keys


@triton.jit
def _rotated_keys(pages, rows_at, ok, FORMAT: tl.constexpr, OUT: tl.constexpr):
    """The last 64 channels, [BN, 64] OUT."""
    d = tl.arange(0, 64)
    if FORMAT == 0:
        at = pages + (rows_at[:, None] + (448 + d)[None, :])
    else:  # bf16 behind 448 bytes
        at = pages.to(tl.pointer_type(tl.bfloat16)) + ((rows_at // 2)[:, None] + (224 + d)[None, :])
    return tl.load(at, mask=ok[:, None], other=0.0).to(OUT)


@triton.jit
def _scores(q, k, s, HEADS: tl.constexpr):
    """s + q . k: [HB, BN], or transposed where HEADS, the dimension of heads, is 1. s: None to
    begin with."""
    left, right = (q, k) if HEADS == 0 else (k, q)
    return tl.dot(left, tl.trans(right), s, input_precision="ieee")


@triton.jit
def _add_values(p, k, a, keep, HEADS: tl.constexpr):
    """a * keep + p . k: [HB, channels], or transposed."""
    a *= tl.expand_dims(keep, 1 - HEADS)
    left, right = (p, k) if HEADS == 0 else (tl.trans(k), p)
    return tl.dot(left, right, a, input_precision="ieee")


@triton.jit
def _attend(
    q0, q1, q2, q3, m, total, a0, a1, a2, a3, keys, slots, first, last, scale_log2,
    ROWS: tl.constexpr, FORMAT: tl.constexpr, BN: tl.constexpr, HEADS: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Fold the keys at places first .. last of `slots` into the running maximum, sum and output."""
    OUT: tl.constexpr = q0.dtype
    for start in range(first, last, BN):
        place = start + tl.arange(0, BN)
        slot = tl.load(slots + place, mask=place < last, other=-1)
        ok = (slot >= 0) & (slot < keys.num_slots)
        slot = tl.where(ok, slot, 0).to(tl.uint32)  # a shift and a mask are all that it takes to divide
        page_at = (slot // ROWS).to(tl.int64) * keys.page_stride
        row = slot % ROWS
        if FORMAT == 0:
            rows_at = page_at + row * 512
            scales_at = rows_at
        else:
            rows_at = page_at + row * 576
            scales_at = page_at + ROWS * 576 + row * 8
        k0 = _keys(keys.pages, rows_at, scales_at, ok, 0, 256, FORMAT, OUT, PTX)
        k1 = _keys(keys.pages, rows_at, scales_at, ok, 256, 128, FORMAT, OUT, PTX)
        k2 = _keys(keys.pages, rows_at, scales_at, ok, 384, 64, FORMAT, OUT, PTX)
        k3 = _rotated_keys(keys.pages, rows_at, ok, FORMAT, OUT)
        s = _scores(q0, k0, None, HEADS)
        s = _scores(q1, k1, s, HEADS)
        s = _scores(q2, k2, s, HEADS)
        s = _scores(q3, k3, s, HEADS)
        s = tl.where(tl.expand_dims(ok, HEADS), s * scale_log2, float("-inf"))
        m_next = tl.maximum(m, tl.max(s, 1 - HEADS))
        # Without a valid key so far the maximum is -inf, and -inf - -inf is NaN.
        m_safe = tl.where(m_next == float("-inf"), 0.0, m_next)
        p = tl.exp2(s - tl.expand_dims(m_safe, 1 - HEADS))
        keep = tl.exp2(m - m_safe)
        total = total * keep + tl.sum(p, 1 - HEADS)
        p = p.to(OUT)
        a0 = _add_values(p, k0, a0, keep, HEADS)
        a1 = _add_values(p, k1, a1, keep, HEADS)
        a2 = _add_values(p, k2, a2, keep, HEADS)
        a3 = _add_values(p, k3, a3, keep, HEADS)
        m = m_next
    return m, total, a0, a1, a2, a3


@triton.jit
def _list(keys, stride, t):
    """Where the list of token t begins."""
    row = t
    if keys.row is not None:
        row = tl.load(keys.row + t).to(tl.int64)
    return keys.slots + row * stride


@triton.jit(
    do_not_specialize=["num_splits", "window_stride", "window_width", "entries_stride", "entries_width"],
)
def attend_kernel(
    q,
    q_token_stride,
    q_head_stride,
    window,
    window_stride,
    window_width,
    entries,
    entries_stride,
    entries_width,
    sink,
    cos_sin,
    out,
    lse,
    part_out,
    part_lse,
    scale_log2,
    num_splits,
    H: tl.constexpr,
    HB: tl.constexpr,
    BN: tl.constexpr,
    HEADS: tl.constexpr,
    ONE_SPLIT: tl.constexpr,
    PTX: tl.constexpr,
):
    """grid (T, cdiv(H, HB), num_splits). A token's keys are its window, then its entries; each
    split takes an equal share of the keys that the token really has. window, entries: Keys, whose
    lists lie *_stride apart and have *_width places. HEADS: which dimension of products is heads.
    part_out [T, num_splits, H, 512] fp32, part_lse [T, num_splits, H] fp32 in log2 units."""
    t = tl.program_id(0).to(tl.int64)
    split = tl.program_id(2)
    h = tl.program_id(1) * HB + tl.arange(0, HB)
    inside = h < H
    q_at = q + t * q_token_stride + h[:, None] * q_head_stride
    q0 = tl.load(q_at + tl.arange(0, 256)[None, :], mask=inside[:, None], other=0.0)
    q1 = tl.load(q_at + 256 + tl.arange(0, 128)[None, :], mask=inside[:, None], other=0.0)
    q2 = tl.load(q_at + 384 + tl.arange(0, 64)[None, :], mask=inside[:, None], other=0.0)
    q3 = tl.load(q_at + 448 + tl.arange(0, 64)[None, :], mask=inside[:, None], other=0.0)
    m = tl.full([HB], float("-inf"), tl.float32)
    total = tl.zeros([HB], tl.float32)
    if HEADS == 0:
        a0 = tl.zeros([HB, 256], tl.float32)
        a1 = tl.zeros([HB, 128], tl.float32)
        a2 = tl.zeros([HB, 64], tl.float32)
        a3 = tl.zeros([HB, 64], tl.float32)
    else:
        a0 = tl.zeros([256, HB], tl.float32)
        a1 = tl.zeros([128, HB], tl.float32)
        a2 = tl.zeros([64, HB], tl.float32)
        a3 = tl.zeros([64, HB], tl.float32)

    window_list = _list(window, window_stride, t)
    # Where a list begins is known before the keys are walked, unless its row must be loaded: each
    # of the two orders keeps registers free that the other spills on sm120.
    entry_list = window_list
    if entries.pages is not None and entries.row is None:
        entry_list = _list(entries, entries_stride, t)
    num_window = tl.minimum(tl.maximum(tl.load(window.lens + t), 0), window_width)
    num_keys = num_window
    if entries.pages is not None:
        num_keys += tl.minimum(tl.maximum(tl.load(entries.lens + t), 0), entries_width)
    share = tl.cdiv(tl.cdiv(num_keys, BN), num_splits) * BN
    first = split * share
    last = tl.minimum(first + share, num_keys)
    m, total, a0, a1, a2, a3 = _attend(
        q0, q1, q2, q3, m, total, a0, a1, a2, a3, window, window_list, first, tl.minimum(last, num_window), scale_log2,
        window.page_rows, window.format, BN, HEADS, PTX,
    )  # fmt: skip
    if entries.pages is not None:
        if entries.row is not None:
            entry_list = _list(entries, entries_stride, t)
        m, total, a0, a1, a2, a3 = _attend(
            q0, q1, q2, q3, m, total, a0, a1, a2, a3, entries, entry_list, tl.maximum(first - num_window, 0),
            last - num_window, scale_log2, entries.page_rows, entries.format, BN, HEADS, PTX,
        )  # fmt: skip

    if HEADS == 1:
        a0, a1, a2, a3 = tl.trans(a0), tl.trans(a1), tl.trans(a2), tl.trans(a3)
    some = total > 0
    log_total = m + tl.log2(tl.where(some, total, 1.0))
    if ONE_SPLIT:
        with_sink = total + tl.exp2(tl.load(sink + h, mask=inside, other=0.0) * LOG2_E - tl.where(some, m, 0.0))
        scale = tl.where(some, 1.0 / with_sink, 0.0)[:, None]
        o = out + (t * H + h[:, None]) * 512
        tl.store(lse + t * H + h, tl.where(some, log_total * LN_2, float("-inf")), mask=inside)
    else:
        scale = tl.where(some, 1.0 / total, 0.0)[:, None]
        part = t * num_splits + split
        o = part_out + (part * H + h[:, None]) * 512
        tl.store(part_lse + part * H + h, tl.where(some, log_total, float("-inf")), mask=inside)
        inside = inside & some  # a part without keys is never read back
    kind = o.dtype.element_ty
    tl.store(o + tl.arange(0, 256)[None, :], (a0 * scale).to(kind), mask=inside[:, None])
    tl.store(o + 256 + tl.arange(0, 128)[None, :], (a1 * scale).to(kind), mask=inside[:, None])
    tl.store(o + 384 + tl.arange(0, 64)[None, :], (a2 * scale).to(kind), mask=inside[:, None])
    a3 = (a3 * scale).to(kind)
    if ONE_SPLIT and cos_sin is not None:
        a3 = rotate_pairs(a3.to(tl.float32), cos_sin + t * 64, 0, 64, 64, SIGN=-1.0).to(kind)
    tl.store(o + 448 + tl.arange(0, 64)[None, :], a3, mask=inside[:, None])


@triton.jit(do_not_specialize=["num_splits"])
def combine_kernel(
    part_out,
    part_lse,
    sink,
    cos_sin,
    out,
    lse,
    num_splits,
    H: tl.constexpr,
    SPLITS: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """grid (T, H): join the parts of one head; the sink enters the denominator only. SPLITS: a
    power of two >= num_splits; TOGETHER: parts whose outputs are loaded at a time."""
    t = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1)
    d = tl.arange(0, 512)
    split = tl.arange(0, SPLITS)
    part = (t * num_splits + split) * H + h
    logs = tl.load(part_lse + part, mask=split < num_splits, other=float("-inf"))
    m = tl.max(logs, 0)
    some = m > float("-inf")
    m = tl.where(some, m, 0.0)
    total = tl.sum(tl.exp2(logs - m), 0)
    with_sink = total + tl.exp2(tl.load(sink + h) * LOG2_E - m)
    o = tl.zeros([512], tl.float32)
    # Keys are shared out from the first part on; a graph captured for long contexts has 64 parts.
    used = tl.max(tl.where(logs > float("-inf"), split + 1, 0), 0)
    for first in range(0, used, TOGETHER):
        i = first + tl.arange(0, TOGETHER)
        at = (t * num_splits + i) * H + h
        log = tl.load(part_lse + at, mask=i < used, other=float("-inf"))
        row = tl.load(part_out + at[:, None] * 512 + d[None, :], mask=(i < used)[:, None], other=0.0)
        # An empty part wrote no output, so that anything may lie there.
        some_keys = log > float("-inf")
        o += tl.sum(tl.where(some_keys[:, None], row, 0.0) * tl.exp2(log - m)[:, None], 0)
    o = tl.where(some, o / with_sink, 0.0).to(out.dtype.element_ty)
    if cos_sin is not None:
        turned = rotate_pairs(tl.reshape(o, [1, 512]).to(tl.float32), cos_sin + t * 64, 448, 64, 512, SIGN=-1.0)
        o = tl.reshape(turned, [512]).to(out.dtype.element_ty)
    tl.store(out + (t * H + h) * 512 + d, o)
    tl.store(lse + t * H + h, tl.where(some, (m + tl.log2(tl.where(some, total, 1.0))) * LN_2, float("-inf")))


def sparse_attention(
    q: Tensor,
    window: Selection,
    entries: Selection | None,
    sink: Tensor,
    cos_sin: Tensor | None = None,
    *,
    out: Tensor | None = None,
    num_splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """See `reference.sparse_attention`. num_splits: parts per token; None chooses from shapes.

    Raises ValueError for rows other than V4's 448 + 64 channels.
    """
    num_tokens, num_heads, dim = q.shape
    rope_dim = KV_ROPE_DIM if cos_sin is None else cos_sin.shape[-1]
    if (dim, rope_dim) != (512, KV_ROPE_DIM):
        raise ValueError(f"the kernel is written for rows of 448 + 64 channels, not {dim - rope_dim} + {rope_dim}")
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    if num_tokens == 0:
        return out, lse
    if entries is not None and entries.slots.shape[1] == 0:
        entries = None
    packed = KvFormat.FP8_DS_MLA in [s.pages.format for s in (window, entries) if s is not None]
    tile = tile_for(num_heads, packed, on_amd())
    head_blocks = triton.cdiv(num_heads, tile.heads)
    max_keys = window.slots.shape[1] + (0 if entries is None else entries.slots.shape[1])
    num_splits = num_splits or splits_for(num_tokens, head_blocks, max_keys, q.device)
    parts, part_lse = out, lse
    if num_splits > 1:
        parts = torch.empty(num_tokens, num_splits, num_heads, dim, dtype=torch.float32, device=q.device)
        part_lse = torch.empty(num_tokens, num_splits, num_heads, dtype=torch.float32, device=q.device)
    attend_kernel[(num_tokens, head_blocks, num_splits)](
        q,
        q.stride(0),
        q.stride(1),
        _kernel_keys(window),
        *_lists(window),
        NO_KEYS if entries is None else _kernel_keys(entries),
        *(_lists(window) if entries is None else _lists(entries)),
        sink,
        cos_sin,
        out,
        lse,
        parts,
        part_lse,
        dim**-0.5 * LOG2_E.value,
        num_splits,
        H=num_heads,
        HB=tile.heads,
        BN=tile.keys,
        HEADS=int(tile.keys_first),
        ONE_SPLIT=num_splits == 1,
        PTX=packed_decode(q.device),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **register_limit(q.device, tile.num_warps),
    )
    if num_splits > 1:
        combine_kernel[(num_tokens, num_heads)](
            parts,
            part_lse,
            sink,
            cos_sin,
            out,
            lse,
            num_splits,
            H=num_heads,
            SPLITS=max(MAX_SPLITS, triton.next_power_of_2(num_splits)),
            TOGETHER=PARTS_TOGETHER,
            num_warps=4,
            **register_limit(q.device, 4),
        )
    return out, lse


NO_KEYS = Keys(*[None] * len(Keys._fields))


def _kernel_keys(selection: Selection) -> Keys:
    pages, slots = selection.pages, selection.slots
    return Keys(
        pages=pages.data,
        page_stride=pages.data.stride(0),
        num_slots=pages.num_slots,
        slots=slots,
        lens=selection.lens,
        row=selection.row,
        page_rows=tl.constexpr(pages.rows),
        format=tl.constexpr(format_code(pages.format)),
    )


def _lists(selection: Selection) -> tuple[int, int]:
    """How far its lists lie apart, and their width."""
    return selection.slots.stride(0), selection.slots.shape[1]
