# SPDX-License-Identifier: Apache-2.0
"""Exact top-k of long rows: ties go to the lowest index, no atomics, the same result every time.

A program keeps the candidates of a chunk in registers and finds the k-th largest by fixing its bits
from the highest on, counting how many candidates reach each trial value. Rows longer than a chunk
are reduced to k candidates per chunk, which a second launch reduces as one wide chunk. That is
enough for the 262,144 entries of a million tokens; beyond, candidates are reduced chunk by chunk
again before. They stay in index order, so that ties keep theirs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.ops.kernels import on_amd, register_limit
from dsv4.ops.pages import PageTable

CHUNK = 8192
SMALL_CHUNK = 2048
WIDE_CHUNK = 32_768  # the last launch's; 32 candidates a thread, as in the others


@triton.jit
def _ordered(x):
    """fp32 -> uint32 that orders like torch.sort: -0 equals 0, every NaN is above infinity; always
    above 0."""
    bits = (x + 0.0).to(tl.uint32, bitcast=True)
    key = tl.where((bits >> 31) != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    return tl.where(x != x, 0xFFFFFFFF, key).to(tl.uint32)


@triton.jit
def _slot(index, inside, table, table_width, ROWS: tl.constexpr):
    """The cache slot of an entry, by the token's row of the block table; -1 beyond the table."""
    at = index // ROWS
    page = tl.load(table + at, mask=inside & (at < table_width), other=-1)
    return tl.where(page >= 0, page * ROWS + index % ROWS, -1)


@triton.jit
def _keys(scores, indices, at, length, INDEXED: tl.constexpr):
    """The ordered keys of candidates `at` of a row; 0 for none: beyond the length, or of index
    -1."""
    inside = at < length
    if INDEXED:
        inside = inside & (tl.load(indices + at, mask=inside, other=-1) >= 0)
    return tl.where(inside, _ordered(tl.load(scores + at, mask=inside, other=0.0)), 0)


@triton.jit(do_not_specialize=["max_entries", "block_table_stride", "block_table_width"])
def topk_kernel(
    scores,
    scores_stride,
    indices,
    lens,
    max_entries,
    out_scores,
    out_indices,
    out_stride,
    K,
    block_table,
    block_table_stride,
    block_table_width,
    request_of_token,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    FIRST: tl.constexpr,
    LEVEL: tl.constexpr,
    FINAL: tl.constexpr,
    MERGE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """grid (T, chunks): the K largest of one chunk, in index order.

    LEVEL 0 reads scores, whose index is their place unless MERGE says that they have their own; a
    later level reads what the one before chose, K of each chunk of FIRST. FINAL writes indices
    alone, -1 behind the last; with ROWS, rows of a page, it writes cache slots instead. What it
    takes is read again and written BLOCK by BLOCK, to stay in registers.
    """
    t = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1)
    entries = tl.minimum(tl.maximum(tl.load(lens + t), 0), max_entries)
    length = entries
    for _ in range(LEVEL):
        # All chunks but the last hold K candidates or more; with MERGE any may hold fewer, and
        # index -1 says so.
        length = tl.cdiv(length, FIRST) * K if MERGE else length // FIRST * K + tl.minimum(length % FIRST, K)
    j = tl.arange(0, BLOCK)  # at least K
    table = block_table
    if FINAL and ROWS > 0:
        table += tl.load(request_of_token + t).to(tl.int64) * block_table_stride
    # No more than are wanted are all taken: a row's entries, or what the level before left of a row
    # that fitted one of its chunks.
    left = length if FINAL else entries
    if (not MERGE) & (left <= K):
        if FINAL:
            index = j
            if LEVEL > 0:
                index = tl.load(indices + t * scores_stride + j, mask=(entries > K) & (j < length), other=0)
                index = tl.where(entries > K, index, j)
            if ROWS > 0:
                index = _slot(index, j < length, table, block_table_width, ROWS)
            tl.store(out_indices + t * out_stride + j, tl.where(j < length, index, -1), mask=j < K)
    elif (c * CHUNK < length) | FINAL:
        row = t * scores_stride
        key = _keys(scores + row, indices + row, c * CHUNK + tl.arange(0, CHUNK), length, MERGE)
        threshold = tl.zeros((), tl.uint32)
        for bit in range(32):
            trial = threshold | (tl.full((), 1, tl.uint32) << (31 - bit))
            threshold = tl.where(tl.sum((key >= trial).to(tl.int32), 0) >= K, trial, threshold)
        # Of the equal ones, the first that fit. With fewer than K candidates the threshold is 0 and
        # all are above it.
        room = K - tl.sum((key > threshold).to(tl.int32), 0)
        out = t * out_stride
        if not FINAL:
            out += c * K
        count = 0
        for block in range(0, CHUNK, BLOCK):
            place = c * CHUNK + block + tl.arange(0, BLOCK)
            rank = _keys(scores + row, indices + row, place, length, MERGE)
            equal = (rank == threshold) & (rank > 0)
            is_topk = (rank > threshold) | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= room))
            to = out + count + tl.cumsum(is_topk.to(tl.int32), 0) - 1
            room -= tl.sum(equal.to(tl.int32), 0)
            count += tl.sum(is_topk.to(tl.int32), 0)
            entry = place
            if MERGE or LEVEL > 0:
                entry = tl.load(indices + row + place, mask=is_topk, other=-1)
            if not FINAL:
                tl.store(out_scores + to, tl.load(scores + row + place, mask=is_topk, other=0.0), mask=is_topk)
            elif ROWS > 0:
                entry = _slot(entry, is_topk, table, block_table_width, ROWS)
            tl.store(out_indices + to, entry, mask=is_topk)
        tl.store(out_indices + out + j, tl.full([BLOCK], -1, tl.int32), mask=(j >= count) & (j < K))


def topk(
    logits: Tensor, entry_lens: Tensor, k: int, entries: PageTable | None = None, request_of_token: Tensor | None = None
) -> Tensor:
    """See `reference.topk`; the indices come in index order. Raises ValueError when k does not fit
    a chunk."""
    num_tokens, n = logits.shape
    out = torch.empty(num_tokens, k, dtype=torch.int32, device=logits.device)
    if n == 0:
        out.fill_(-1)
    elif num_tokens:
        _reduce(_Candidates(logits, None, entry_lens, n), k, out, entries, request_of_token)
    return out


@dataclass(frozen=True)
class _Candidates:
    """scores: [T, N] fp32; indices: [T, N] int32, None where it is the place; lens: [T] int32;
    max_entries: bound on them."""

    scores: Tensor
    indices: Tensor | None
    lens: Tensor
    max_entries: int


def merge(scores: Tensor, indices: Tensor, k: int) -> Tensor:
    """The k best of candidates that several ranks chose: scores fp32 and indices int32 [T, N], -1
    for none; int32 [T, k].

    Ties go to the first candidate, so ranks must stand in the order of their entries.
    """
    num_tokens, n = scores.shape
    out = torch.empty(num_tokens, k, dtype=torch.int32, device=scores.device)
    if n == 0:
        return out.fill_(-1)
    lens = torch.full((num_tokens,), n, dtype=torch.int32, device=scores.device)
    _reduce(_Candidates(scores, indices, lens, n), k, out, None, None)
    return out


def _reduce(of: _Candidates, k: int, out: Tensor, entries: PageTable | None, request_of_token: Tensor | None) -> None:
    """Reduce rows to k candidates per chunk until they fit the last launch, which writes `out`."""
    if k >= CHUNK:
        raise ValueError(f"k is {k}; a chunk of {CHUNK} must hold more")
    scores, indices, lens = of.scores, of.indices, of.lens
    table, request, rows = lens[None], lens, 0
    if entries is not None and request_of_token is not None:
        table, request, rows = entries.block_table, request_of_token, entries.pages.rows
    num_tokens, level, merge = scores.shape[0], 0, indices is not None
    while True:
        chunk = _chunk(max(scores.shape[1], k), level)
        chunks = triton.cdiv(scores.shape[1], chunk)
        final, warps = chunks == 1, _warps(chunk, on_amd())
        out_scores, out_indices = scores, out
        if not final:
            out_scores = torch.empty(num_tokens, chunks * k, dtype=torch.float32, device=scores.device)
            out_indices = torch.empty(num_tokens, chunks * k, dtype=torch.int32, device=scores.device)
        topk_kernel[(num_tokens, chunks)](
            scores,
            scores.stride(0),
            lens if indices is None else indices,
            lens,
            of.max_entries,
            out_scores,
            out_indices,
            out_indices.stride(0),
            k,
            table,
            table.stride(0),
            table.shape[1],
            request,
            CHUNK=chunk,
            BLOCK=min(chunk, CHUNK),
            FIRST=CHUNK,
            LEVEL=level,
            FINAL=final,
            MERGE=merge,
            ROWS=rows if final else 0,
            num_warps=warps,
            **register_limit(scores.device, warps),
        )
        if final:
            return
        scores, indices, level = out_scores, out_indices, level + 1


def _chunk(width: int, level: int) -> int:
    """How many candidates of a row of `width` a program takes. Only the last launch takes more than
    CHUNK."""
    if width <= CHUNK:
        return SMALL_CHUNK if width <= SMALL_CHUNK else CHUNK
    return triton.next_power_of_2(width) if level > 0 and width <= WIDE_CHUNK else CHUNK


def _warps(chunk: int, amd: bool) -> int:
    """32 candidates a thread, and no more than the 1024 threads of a block: AMD's warps have 64."""
    return min(max(4, chunk // 1024), 16 if amd else 32)
