# SPDX-License-Identifier: Apache-2.0
"""Plain-PyTorch twin of the compressor on summaries. Source: spec section 3.4; docs/kv-mapping.md derives the cases.

A summary of some rows is, per channel, (max of the scores, sum of exp(score - max), sum of exp(score - max) * kv).
Columns A of a token belong to the next window's entry, columns B to its own (HCA has B alone). At a step's end `e`, with
the open window starting at w = e // m * m, a request keeps two summaries: `entry`, of the open window's entry so far
(A of the window before, B of the open rows), and, with overlap, `following`, of A of the open rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4.ops.compressor.reference import finish_entry
from dsv4.ops.pages import BatchView, Pages

EMPTY = float("-inf")


@dataclass(frozen=True)
class _Chunk:
    """This step's rows. kv, score: [T, overlap * D]; start: [R], each request's first position of the step; token: [R],
    its first token. A row before `start` is not here: its summary comes from `state` or from a page's tail."""

    kv: Tensor
    score: Tensor
    start: Tensor
    token: Tensor
    ratio: int
    overlap: int


def compress(
    kv: Tensor,
    gate: Tensor,
    ape: Tensor,
    batch: BatchView,
    request_of_token: Tensor,
    positions: Tensor,
    state: Tensor,
    state_page: Tensor,
    tail: Tensor | None,
    block_table: Tensor,
    page_tokens: int,
    entry_slots: Tensor,
    ratio: int,
    overlap: int,
    norm_weight: Tensor,
    eps: float,
    entry_cos_sin: Tensor,
    cache: Pages,
) -> None:
    """Pool what ends in this step, and keep summaries of what stays open.

    kv, gate: [T, overlap * D] fp32; ape: [m, overlap * D] fp32; request_of_token, positions: [T]; state: [P, overlap, 3, D]
    fp32, one page per request; state_page: [R]; tail: [P', 3, D] fp32, one per page of `cache` (overlap 2 only);
    block_table: [R, n] of those pages, which cover page_tokens each; entry_slots: [T], the slot of the entry that token t
    completes, -1 for the others; entry_cos_sin: [T, rope_dim]. State and tails that no request wrote are never read.
    """
    lens = batch.query_start_loc.diff()[: batch.num_reqs]
    start = (batch.seq_lens[: batch.num_reqs] - lens).long()
    chunk = _Chunk(kv, gate + ape[positions % ratio], start, batch.query_start_loc[: batch.num_reqs].long(), ratio, overlap)
    active = (lens > 0).nonzero().squeeze(-1)
    end = start + lens
    valid = torch.arange(kv.shape[0], device=kv.device) < batch.query_start_loc[batch.num_reqs]

    if tail is not None:  # before anything reads one: a request may hit a page that another fills in this very step
        tokens = (valid & ((positions + 1) % page_tokens == 0)).nonzero().squeeze(-1)
        if tokens.numel():
            request, last = request_of_token[tokens].long(), positions[tokens]
            closed = _entry_so_far(chunk, request, last + 1, last, state, state_page, None, block_table, page_tokens)
            tail[block_table[request, last // page_tokens].long()] = closed

    tokens = (entry_slots >= 0).nonzero().squeeze(-1)
    if tokens.numel():
        request, last = request_of_token[tokens].long(), positions[tokens]
        entries = _entry_so_far(chunk, request, last - ratio + 1, last, state, state_page, tail, block_table, page_tokens)
    window = end[active] // ratio * ratio
    carried = [_entry_so_far(chunk, active, window, end[active] - 1, state, state_page, tail, block_table, page_tokens)]
    if overlap == 2:
        carried.append(_following(chunk, active, window, end[active] - 1, state, state_page))
    state[state_page[active].long()] = torch.stack(carried, 1)
    if tokens.numel():
        finish_entry(entries[:, 2] / entries[:, 1], norm_weight, eps, entry_cos_sin[tokens], cache, entry_slots[tokens])


def _entry_so_far(
    chunk: _Chunk,
    request: Tensor,
    window: Tensor,
    last: Tensor,
    state: Tensor,
    state_page: Tensor,
    tail: Tensor | None,
    block_table: Tensor,
    page_tokens: int,
) -> Tensor:
    """Summary [N, 3, D] of A of the window before `window` and B of its own rows up to `last`; all positions are [N]."""
    m, start = chunk.ratio, chunk.start[request]
    offset = torch.arange((1 - chunk.overlap) * m, m, device=window.device)
    here = _rows(chunk, request, window[:, None] + offset, (offset < 0) if chunk.overlap == 2 else None, last)
    kept = state[state_page[request].long()]  # [N, overlap, 3, D]
    # The step starts inside or at this window: what came before is in `entry`. It starts inside the window before: the
    # rows of that one are in `following`. It starts earlier still: every row is here.
    earlier = _only(kept[:, 0], (start >= window) & (start > 0) & (start % m > 0 if chunk.overlap == 1 else start % page_tokens > 0))
    if chunk.overlap == 2:
        earlier = _merge(earlier, _only(kept[:, 1], (start < window) & (start > window - m) & (start % m > 0)))
    if tail is not None:
        at_page_end = (start >= window) & (start > 0) & (start % page_tokens == 0)
        page = block_table[request, (start // page_tokens - 1).clamp(min=0)].long()
        earlier = _merge(earlier, _only(tail[page], at_page_end))
    return _merge(here, earlier)


def _following(chunk: _Chunk, request: Tensor, window: Tensor, last: Tensor, state: Tensor, state_page: Tensor) -> Tensor:
    """Summary [N, 3, D] of A of the open window's rows."""
    offset = torch.arange(chunk.ratio, device=window.device)
    here = _rows(chunk, request, window[:, None] + offset, torch.ones_like(offset, dtype=torch.bool), last)
    return _merge(here, _only(state[state_page[request].long()][:, 1], chunk.start[request] > window))


def _rows(chunk: _Chunk, request: Tensor, at: Tensor, use_a: Tensor | None, last: Tensor) -> Tensor:
    """Summary [N, 3, D] of the step's rows at positions `at` [N, K], up to `last`; use_a: [K], columns A instead of B."""
    start = chunk.start[request][:, None]
    present = (at >= start) & (at <= last[:, None])
    token = torch.where(present, chunk.token[request][:, None] + at - start, 0)
    kv, score = chunk.kv[token], chunk.score[token]  # [N, K, overlap * D]
    if chunk.overlap == 2:
        assert use_a is not None
        dim = kv.shape[-1] // 2
        kv, score = (torch.where(use_a[:, None], x[..., :dim], x[..., dim:]) for x in (kv, score))
    score = score.masked_fill(~present[..., None], EMPTY)
    top = score.amax(1)
    weight = torch.exp(score - _finite(top)[:, None])
    return torch.stack([top, weight.sum(1), (weight * kv.masked_fill(~present[..., None], 0.0)).sum(1)], 1)


def _only(summary: Tensor, use: Tensor) -> Tensor:
    """The summary where `use` [N], the empty one elsewhere, whatever memory holds there."""
    empty = torch.zeros_like(summary)
    empty[:, 0] = EMPTY
    return torch.where(use[:, None, None], summary, empty)


def _merge(a: Tensor, b: Tensor) -> Tensor:
    """The summary of both: [N, 3, D]."""
    top = torch.maximum(a[:, 0], b[:, 0])
    scale_a, scale_b = torch.exp(a[:, 0] - _finite(top)), torch.exp(b[:, 0] - _finite(top))
    return torch.stack([top, a[:, 1] * scale_a + b[:, 1] * scale_b, a[:, 2] * scale_a + b[:, 2] * scale_b], 1)


def _finite(x: Tensor) -> Tensor:
    """0 for -inf, so that exp(-inf - -inf) of two empty summaries is 0 and not NaN."""
    return x.masked_fill(x == EMPTY, 0.0)
