# SPDX-License-Identifier: Apache-2.0
"""Exact top-k of long rows: ties go to the lowest index, no atomics, the same result every time.

A program takes a chunk of candidates, 32 neighbours to a thread, and turns their bits: of 32 keys,
a word for each of their bits. The k-th largest is then found two bits at a time, from the highest,
by counting ones in words instead of comparing candidates; which candidates are above it, and which
equal it, are words too. Rows longer than a chunk are reduced to k candidates per chunk, which a
second launch reduces as one. That is enough for the 262,144 entries of a million tokens; beyond,
candidates are reduced chunk by chunk again before. They stay in index order, so
that ties keep theirs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsv4.ops.kernels import on_amd, register_limit
from dsv4.ops.pages import PageTable

CHUNKS = (2048, 8192, 16_384)
FEW = 512  # up to so many are chosen from chunks of 8192, on twice as many multiprocessors


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
def _ones(x):
    """How many bits of a uint32 are set, int32: a form that compilers know."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _keys(scores, indices, word, G: tl.constexpr, length, first, INDEXED: tl.constexpr):
    """The ordered keys of candidates 4 * G .. 4 * G + 4 of each word's 32, [W, 4]: a thread's own.
    0 for none: beyond the length, or of index -1."""
    at = first + word[:, None] * 32 + 4 * G + tl.arange(0, 4)[None, :]
    inside = at < length
    if INDEXED:
        inside = inside & (tl.load(indices + at, mask=inside, other=-1) >= 0)
    return tl.where(inside, _ordered(tl.load(scores + at, mask=inside, other=0.0)), 0).to(tl.uint32)


@triton.jit
def _exchange(a, b, AT: tl.constexpr, MASK: tl.constexpr):
    """Words `AT` apart of a matrix of bits exchange the bits that lie as far apart."""
    return (a & MASK) | ((b & MASK) << AT), ((a >> AT) & MASK) | (b & (0xFFFFFFFF ^ MASK))


@triton.jit
def _two_bits(high, low, equal, above, room):
    """Two bits further down: which candidates are `above` the K-th, which are `equal` to it so far,
    and how many of these are wanted. A bit of a word stands for a candidate."""
    upper, not_high = equal & high, high ^ 0xFFFFFFFF
    three, two, one = _ones(upper & low), _ones(upper), _ones(equal & not_high & low)
    # At most 32,768 candidates: 21 bits for each count.
    counts = tl.sum(three.to(tl.int64) | (two.to(tl.int64) << 21) | (one.to(tl.int64) << 42), 0)
    count = ((counts >> 21) & 0x1FFFFF).to(tl.int32)
    is_set = count >= room
    above |= tl.where(is_set, 0, upper)
    equal &= tl.where(is_set, high, not_high)
    room -= tl.where(is_set, 0, count)
    count = (tl.where(is_set, counts, counts >> 42) & 0x1FFFFF).to(tl.int32)
    is_set = count >= room
    above |= tl.where(is_set, 0, equal & low)
    equal &= tl.where(is_set, low, low ^ 0xFFFFFFFF)
    room -= tl.where(is_set, 0, count)
    return equal, above, room


@triton.jit
def _four_bits(x, equal, above, some, room):
    """The planes of four bits, [W, 4] but for the last two exchanges, from the highest on."""
    even, odd = tl.split(tl.reshape(x, [x.shape[0], 2, 2]))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    x0, x2 = _exchange(x0, x2, 2, 0x33333333)
    x1, x3 = _exchange(x1, x3, 2, 0x33333333)
    x0, x1 = _exchange(x0, x1, 1, 0x55555555)
    x2, x3 = _exchange(x2, x3, 1, 0x55555555)
    equal, above, room = _two_bits(x3, x2, equal, above, room)
    equal, above, room = _two_bits(x1, x0, equal, above, room)
    return equal, above, some | x0 | x1 | x2 | x3, room


@triton.jit
def _largest(scores, indices, word, length, first, K, INDEXED: tl.constexpr):
    """Which candidates are the K largest, ties to the first: bit i of word w stands for number 32 *
    w + i behind the first. Keys of 0 are never chosen."""
    x0 = _keys(scores, indices, word, 0, length, first, INDEXED)
    x1 = _keys(scores, indices, word, 1, length, first, INDEXED)
    x2 = _keys(scores, indices, word, 2, length, first, INDEXED)
    x3 = _keys(scores, indices, word, 3, length, first, INDEXED)
    x4 = _keys(scores, indices, word, 4, length, first, INDEXED)
    x5 = _keys(scores, indices, word, 5, length, first, INDEXED)
    x6 = _keys(scores, indices, word, 6, length, first, INDEXED)
    x7 = _keys(scores, indices, word, 7, length, first, INDEXED)
    # Turn the 32 x 32 bits of a word's keys about their diagonal, by blocks of 16, 8, 4, 2 and 1.
    x0, x4 = _exchange(x0, x4, 16, 0x0000FFFF)
    x1, x5 = _exchange(x1, x5, 16, 0x0000FFFF)
    x2, x6 = _exchange(x2, x6, 16, 0x0000FFFF)
    x3, x7 = _exchange(x3, x7, 16, 0x0000FFFF)
    x0, x2 = _exchange(x0, x2, 8, 0x00FF00FF)
    x1, x3 = _exchange(x1, x3, 8, 0x00FF00FF)
    x4, x6 = _exchange(x4, x6, 8, 0x00FF00FF)
    x5, x7 = _exchange(x5, x7, 8, 0x00FF00FF)
    x0, x1 = _exchange(x0, x1, 4, 0x0F0F0F0F)
    x2, x3 = _exchange(x2, x3, 4, 0x0F0F0F0F)
    x4, x5 = _exchange(x4, x5, 4, 0x0F0F0F0F)
    x6, x7 = _exchange(x6, x7, 4, 0x0F0F0F0F)
    W: tl.constexpr = word.shape[0]
    equal = tl.full([W], 0xFFFFFFFF, tl.uint32)  # to the K-th, in the bits seen so far
    above = tl.zeros([W], tl.uint32)
    some = tl.zeros([W], tl.uint32)
    equal, above, some, room = _four_bits(x7, equal, above, some, K)
    equal, above, some, room = _four_bits(x6, equal, above, some, room)
    equal, above, some, room = _four_bits(x5, equal, above, some, room)
    equal, above, some, room = _four_bits(x4, equal, above, some, room)
    equal, above, some, room = _four_bits(x3, equal, above, some, room)
    equal, above, some, room = _four_bits(x2, equal, above, some, room)
    equal, above, some, room = _four_bits(x1, equal, above, some, room)
    equal, above, some, room = _four_bits(x0, equal, above, some, room)
    equal &= some
    count = _ones(equal)
    before = tl.cumsum(count, 0) - count
    return above | _lowest(equal, tl.minimum(tl.maximum(room - before, 0), 32))


@triton.jit
def _lowest(x, n):
    """The n lowest of the bits that are set, or all."""
    end = tl.zeros_like(n)  # the largest of 0 .. 31 below which there are at most n
    for i in tl.static_range(5):
        further = end + (16 >> i)
        fits = _ones(x & ((1 << further.to(tl.uint32)) - 1).to(tl.uint32)) <= n
        end = tl.where(fits, further, end)
    kept = x & ((1 << end.to(tl.uint32)) - 1).to(tl.uint32)
    return tl.where(_ones(x) <= n, x, kept)


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
    alone, -1 behind the last; with ROWS, rows of a page, it writes cache slots instead. BLOCK: a
    power of two, at least K.
    """
    t = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1)
    entries = tl.minimum(tl.maximum(tl.load(lens + t), 0), max_entries)
    length = entries
    for _ in range(LEVEL):
        # All chunks but the last hold K candidates or more; with MERGE any may hold fewer, and
        # index -1 says so.
        length = tl.cdiv(length, FIRST) * K if MERGE else length // FIRST * K + tl.minimum(length % FIRST, K)
    j = tl.arange(0, BLOCK)
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
        word = tl.arange(0, CHUNK // 32)
        chosen = _largest(scores + row, indices + row, word, length, c * CHUNK, K, MERGE)
        out = t * out_stride
        if not FINAL:
            out += c * K
        taken = _ones(chosen)
        count = tl.sum(taken, 0)
        to = (out + tl.cumsum(taken, 0) - taken)[:, None]
        for first in range(0, 32, 4):  # candidates of a word that a thread writes at a time
            bit = first + tl.arange(0, 4)[None, :]
            is_topk = ((chosen[:, None] >> bit.to(tl.uint32)) & 1) != 0
            at = to + _ones(chosen[:, None] & ((1 << bit.to(tl.uint32)) - 1).to(tl.uint32))
            entry = c * CHUNK + word[:, None] * 32 + bit
            if not FINAL:
                tl.store(out_scores + at, tl.load(scores + row + entry, mask=is_topk, other=0.0), mask=is_topk)
            if MERGE or LEVEL > 0:
                entry = tl.load(indices + row + entry, mask=is_topk, other=-1)
            if FINAL and ROWS > 0:
                entry = _slot(entry, is_topk, table, block_table_width, ROWS)
            tl.store(out_indices + at, entry, mask=is_topk)
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
    if k >= CHUNKS[-1]:
        raise ValueError(f"k is {k}; a chunk of {CHUNKS[-1]} must hold more")
    first = CHUNKS[1] if k <= FEW else CHUNKS[2]
    scores, indices, lens = of.scores, of.indices, of.lens
    table, request, rows = lens[None], lens, 0
    if entries is not None and request_of_token is not None:
        table, request, rows = entries.block_table, request_of_token, entries.pages.rows
    num_tokens, level, merge = scores.shape[0], 0, indices is not None
    while True:
        chunk = next((c for c in CHUNKS if max(scores.shape[1], k) <= c <= (first if level == 0 else c)), first)
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
            BLOCK=triton.next_power_of_2(k),
            FIRST=first,
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


def _warps(chunk: int, amd: bool) -> int:
    """32 candidates a thread; AMD's warps have 64."""
    return chunk // 32 // (64 if amd else 32)
