# SPDX-License-Identifier: Apache-2.0
"""Plain-PyTorch twin of the compressor on summaries. Source: spec section 3.4; docs/kv-mapping.md derives the cases.

A summary of some rows is, per channel, (max of the scores, sum of exp(score - max), sum of exp(score - max) * kv).
Columns A of a token belong to the next window's entry, columns B to its own (HCA has B alone). At a step's end `e`, with
the open window starting at w = e // m * m, a request keeps two summaries: `entry`, of the open window's entry so far
(A of the window before, B of the open rows), and, with overlap, `following`, of A of the open rows.

Where a window starts a page, columns A of the window before are the page end's tail. They are not in `entry`: the tail is
merged when the entry is complete, which for a request that has just hit the page is what it needs anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4.ops.compressor.paged.reference import finish_entry
from dsv4.ops.compressor.summary.state import Pooling
from dsv4.ops.pages import BatchView

EMPTY = float("-inf")


@dataclass(frozen=True)
class _Step:
    """This step's rows, and what is kept of those before it. kv, score: [T, overlap * D]; start: [R], each request's first
    position of the step; token: [R], its first token; kept: [R, overlap, 3, D]."""

    kv: Tensor
    score: Tensor
    start: Tensor
    token: Tensor
    kept: Tensor
    page_tokens: int
    ratio: int
    overlap: int


def compress(
    poolings: Sequence[Pooling],
    batch: BatchView,
    request_of_token: Tensor,
    positions: Tensor,
    page_tokens: int,
    ratio: int,
    overlap: int,
    eps: float,
    entry_cos_sin: Tensor,
) -> None:
    """Pool what ends in this step, and keep summaries of what stays open.

    poolings: the caches, one or two; request_of_token, positions: [T]; a page of any of the caches covers page_tokens;
    entry_cos_sin: [T, rope_dim], at the first position of token t's entry. State and tails that no request wrote are never
    read. A page may be filled by one request and continued from by another in the same step.
    """
    for pooling in poolings:
        _compress(pooling, batch, request_of_token, positions, page_tokens, ratio, overlap, eps, entry_cos_sin)


def _compress(
    to: Pooling,
    batch: BatchView,
    request_of_token: Tensor,
    positions: Tensor,
    page_tokens: int,
    ratio: int,
    overlap: int,
    eps: float,
    entry_cos_sin: Tensor,
) -> None:
    lens = batch.query_start_loc.diff()[: batch.num_reqs]
    start = (batch.seq_lens[: batch.num_reqs] - lens).long()
    first_token, kept = batch.query_start_loc[: batch.num_reqs].long(), to.state[to.state_page.long()]
    step = _Step(to.kv, to.gate + to.ape[positions % ratio], start, first_token, kept, page_tokens, ratio, overlap)
    valid = torch.arange(to.kv.shape[0], device=to.kv.device) < batch.query_start_loc[batch.num_reqs]

    if to.tail is not None:  # before anything reads one: a request may hit a page that another fills in this very step
        tokens = (valid & ((positions + 1) % page_tokens == 0)).nonzero().squeeze(-1)
        if tokens.numel():
            request, last = request_of_token[tokens].long(), positions[tokens]
            closed = _so_far(step, request, last + 1, last, torch.zeros_like(tokens, dtype=torch.bool))
            to.tail[to.block_table[request, last // page_tokens].long()] = closed

    active = (lens > 0).nonzero().squeeze(-1)
    end = (start + lens)[active]
    window = end // ratio * ratio
    carried = [_so_far(step, active, window, end - 1, _starts_page(step, window))]
    if overlap == 2:  # `following`: what the entry of the window after the open one has so far
        carried.append(_so_far(step, active, window + ratio, end - 1, torch.zeros_like(active, dtype=torch.bool)))
    to.state[to.state_page[active].long()] = torch.stack(carried, 1)

    tokens = (to.entry_slots >= 0).nonzero().squeeze(-1)
    if tokens.numel():
        request, last = request_of_token[tokens].long(), positions[tokens]
        window = last - ratio + 1
        from_tail = _starts_page(step, window)
        entries = _so_far(step, request, window, last, from_tail)
        if to.tail is not None:
            page = to.block_table[request, (window // page_tokens - 1).clamp(min=0)].long()
            entries = _merge(entries, _only(to.tail[page], from_tail & (window > 0)))
        finish_entry(entries[:, 2] / entries[:, 1], to.norm_weight, eps, entry_cos_sin[tokens], to.cache, to.entry_slots[tokens])


def _starts_page(step: _Step, window: Tensor) -> Tensor:
    """Whether a page's tail holds columns A of the window before `window`: [N] bool."""
    return (window % step.page_tokens == 0) & (step.overlap == 2)


def _so_far(step: _Step, request: Tensor, window: Tensor, last: Tensor, only_b: Tensor) -> Tensor:
    """Summary [N, 3, D] of A of the window before `window`, unless only_b, and B of its own rows, up to `last`; all are [N]."""
    m, start = step.ratio, step.start[request]
    offset = torch.arange((1 - step.overlap) * m, m, device=window.device)
    here = _rows(step, request, window[:, None] + offset, offset < 0, last, only_b)
    kept = step.kept[request]  # [N, overlap, 3, D]
    # The step starts inside or at this window: what came before is in `entry`, or there is nothing of this request's. It
    # starts inside the window before: the rows of that one are in `following`. It starts earlier: every row is here.
    resumes = start % (step.page_tokens if step.overlap == 2 else m) > 0
    earlier = _only(kept[:, 0], (start >= window) & resumes)
    if step.overlap == 2:
        earlier = _merge(earlier, _only(kept[:, 1], (start < window) & (start > window - m) & ~only_b))
    return _merge(here, earlier)


def _rows(step: _Step, request: Tensor, at: Tensor, use_a: Tensor, last: Tensor, only_b: Tensor) -> Tensor:
    """Summary [N, 3, D] of the step's rows at positions `at` [N, K], up to `last`; use_a: [K], columns A instead of B."""
    start = step.start[request][:, None]
    present = (at >= start) & (at <= last[:, None]) & ~(use_a & only_b[:, None])
    token = torch.where(present, step.token[request][:, None] + at - start, 0)
    kv, score = step.kv[token], step.score[token]  # [N, K, overlap * D]
    if step.overlap == 2:
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
