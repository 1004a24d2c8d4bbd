# SPDX-License-Identifier: Apache-2.0
"""The compressor on summaries, in plain PyTorch. Source: docs/model.md, 3.4.

docs/kv-mapping.md derives the cases.

A summary of some rows is, per channel, (max of the scores, sum of exp(score - max), sum of
exp(score - max) * kv). Columns A of a token belong to the next window's entry, columns B to its own
(HCA has B alone). At a step's end `e`, with the open window starting at w = e // m * m, a request
keeps two summaries: `entry`, of the open window's entry so far (A of the window before, B of the
open rows), and, with overlap, `following`, of A of the open rows.

Where a window starts a page, columns A of the window before are the page end's tail. They are not
in `entry`: the tail is merged when the entry is complete, which for a request that has just hit the
page is what it needs anyway.

Where drafted tokens may be refused, a step [c, e) may be followed by one that starts anywhere in
c + 1 .. e, and not before e - k. So the summaries are kept as of b = max(c + 1, e - k), and beside
them the rows b .. e - 1, of which there are at most k. The next step is served as if it started at
its b, with the rows up to its first token from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4.ops.compressor.entry import store_entries
from dsv4.ops.compressor.projected import EntryStep
from dsv4.ops.compressor.summary.state import SummaryState
from dsv4.ops.pages import BatchView, SlotMapping

EMPTY = float("-inf")


@dataclass(frozen=True)
class _Rows:
    """This step's rows, and what is kept of those before it.

    kv, score: [T, overlap * D] fp32
    start: [R], each request's first position of the step
    token: [R], its first token
    kept: [R, overlap, 3, D] fp32, of the rows before `since`
    since: [R], at most `start`
    ring: [R, k, 2, overlap * D] fp32, the rows from `since` on; k may be 0
    page_tokens: of a page of entries
    """

    kv: Tensor
    score: Tensor
    start: Tensor
    token: Tensor
    kept: Tensor
    since: Tensor
    ring: Tensor
    page_tokens: int
    ratio: int
    overlap: int


def compress(states: Sequence[SummaryState], step: EntryStep, batch: BatchView) -> None:
    """Pool what ends in this step into entries of each cache, and keep summaries of what stays
    open.

    State and tails that no request wrote are never read. A page may be filled by one request and
    continued from by another in the same step.
    """
    for state in states:
        _compress(state, step, batch)


def _compress(state: SummaryState, step: EntryStep, batch: BatchView) -> None:
    lens = batch.query_start_loc.diff()[: batch.num_reqs]
    start = (batch.seq_lens[: batch.num_reqs] - lens).long()
    here = _rows_of(state, step, start, batch.query_start_loc[: batch.num_reqs].long())

    if state.tail is not None:
        # Before anything reads one: a request may hit a page that another fills in this very step.
        valid = torch.arange(here.kv.shape[0], device=step.device) < batch.query_start_loc[batch.num_reqs]
        _write_tails(state.tail, state.block_table, step, here, valid)
    _write_kept(state, here, start + lens, (lens > 0).nonzero().squeeze(-1))
    _write_entries(state, step, here)


def _rows_of(state: SummaryState, step: EntryStep, start: Tensor, token: Tensor) -> _Rows:
    kv, score = state.projected.kv, state.projected.gate + state.projected.ape[step.positions % step.ratio]
    page, page_tokens = state.state_page.long(), state.entries.pages.rows * step.ratio
    kept, since, ring = state.kept.summaries[page], start, kv.new_zeros(len(start), 0, 2, kv.shape[-1])
    if state.kept.ring is not None and state.kept.since is not None:
        resumes = start % _fresh_every(page_tokens, step.ratio, step.overlap) > 0
        since, ring = torch.where(resumes, state.kept.since[page], start), state.kept.ring[page]
    return _Rows(
        kv,
        score,
        start=start,
        token=token,
        kept=kept,
        since=since,
        ring=ring,
        page_tokens=page_tokens,
        ratio=step.ratio,
        overlap=step.overlap,
    )


def _fresh_every(page_tokens: int, ratio: int, overlap: int) -> int:
    """Positions at whose multiples a request needs nothing of its state page, whatever is there."""
    return page_tokens if overlap == 2 else ratio


def _write_tails(tail: Tensor, block_table: Tensor, step: EntryStep, here: _Rows, valid: Tensor) -> None:
    """Columns A of the last window of each page that ends in this step.

    valid: [T] bool, false for padding
    """
    tokens = (valid & ((step.positions + 1) % here.page_tokens == 0)).nonzero().squeeze(-1)
    if tokens.numel():
        request, last = step.request_of_token[tokens].long(), step.positions[tokens]
        closed = _so_far(here, request, last + 1, last, torch.zeros_like(tokens, dtype=torch.bool))
        tail[block_table[request, last // here.page_tokens].long()] = closed


def _write_kept(state: SummaryState, here: _Rows, ends: Tensor, active: Tensor) -> None:
    """What stays open.

    ends: [R], the position behind each request's last
    active: [N], the requests that have tokens
    """
    page, end, drafted = state.state_page[active].long(), ends[active], state.kept.drafted
    since = torch.maximum(here.start[active] + 1, end - drafted)
    window = since // here.ratio * here.ratio
    carried = [_so_far(here, active, window, since - 1, _starts_page(here, window))]
    if here.overlap == 2:  # `following`: what the entry of the window after the open one has so far
        carried.append(
            _so_far(here, active, window + here.ratio, since - 1, torch.zeros_like(active, dtype=torch.bool))
        )
    state.kept.summaries[page] = torch.stack(carried, 1)
    if state.kept.ring is None or state.kept.since is None:
        return
    state.kept.since[page] = since.int()
    at = since[:, None] + torch.arange(drafted, device=end.device)  # [N, k]
    request, place = (at < end[:, None]).nonzero(as_tuple=True)
    at = at[request, place]
    token = (here.token - here.start)[active][request] + at
    state.kept.ring[page[request], at % drafted] = torch.stack([here.kv[token], here.score[token]], 1)


def _write_entries(state: SummaryState, step: EntryStep, here: _Rows) -> None:
    tokens = (state.entries.slots >= 0).nonzero().squeeze(-1)
    if tokens.numel() == 0:
        return
    request, last = step.request_of_token[tokens].long(), step.positions[tokens]
    window = last - step.ratio + 1
    from_tail = _starts_page(here, window)
    summary = _so_far(here, request, window, last, from_tail)
    if state.tail is not None:
        page = state.block_table[request, (window // here.page_tokens - 1).clamp(min=0)].long()
        summary = _merge(summary, _only(state.tail[page], from_tail & (window > 0)))
    pooled, entries = summary[:, 2] / summary[:, 1], SlotMapping(state.entries.pages, state.entries.slots[tokens])
    store_entries(pooled, state.projected.norm_weight, step.eps, step.entry_cos_sin[tokens], entries)


def _starts_page(here: _Rows, window: Tensor) -> Tensor:
    """Whether a page's tail holds columns A of the window before `window`: [N] bool."""
    return (window % here.page_tokens == 0) & (here.overlap == 2)


def _so_far(here: _Rows, request: Tensor, window: Tensor, last: Tensor, only_b: Tensor) -> Tensor:
    """Summary [N, 3, D] of A of the window before `window`, unless only_b, and B of its own rows.

    request, window, last, only_b: [N]; rows up to position `last` count
    """
    m, since = here.ratio, here.since[request]
    offset = torch.arange((1 - here.overlap) * m, m, device=window.device)
    rows = _summarise_rows(here, request, window[:, None] + offset, use_a=offset < 0, last=last, only_b=only_b)
    kept = here.kept[request]  # [N, overlap, 3, D]
    # What is kept ends inside or at this window: it is in `entry`, or there is nothing of this
    # request's. It ends inside the window before: the rows of that one are in `following`. It ends
    # earlier: all rows are here.
    resumes = since % _fresh_every(here.page_tokens, m, here.overlap) > 0
    earlier = _only(kept[:, 0], (since >= window) & resumes)
    if here.overlap == 2:
        earlier = _merge(earlier, _only(kept[:, 1], (since < window) & (since > window - m) & ~only_b))
    return _merge(rows, earlier)


def _summarise_rows(here: _Rows, request: Tensor, at: Tensor, use_a: Tensor, last: Tensor, only_b: Tensor) -> Tensor:
    """Summary [N, 3, D] of the rows at positions `at` [N, K] from `since` up to `last`.

    use_a: [K], columns A instead of B
    """
    present = (at >= here.since[request][:, None]) & (at <= last[:, None]) & ~(use_a & only_b[:, None])
    kv, score = _rows_at(here, request, at, present)  # [N, K, overlap * D]
    if here.overlap == 2:
        dim = kv.shape[-1] // 2
        kv, score = (torch.where(use_a[:, None], x[..., :dim], x[..., dim:]) for x in (kv, score))
    score = score.masked_fill(~present[..., None], EMPTY)
    top = score.amax(1)
    weight = torch.exp(score - _finite(top)[:, None])
    return torch.stack([top, weight.sum(1), (weight * kv.masked_fill(~present[..., None], 0.0)).sum(1)], 1)


def _rows_at(here: _Rows, request: Tensor, at: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """kv and score [N, K, overlap * D] of rows that are present: the step's, or kept ones."""
    start = here.start[request][:, None]
    token = torch.where(present & (at >= start), here.token[request][:, None] + at - start, 0)
    kv, score = here.kv[token], here.score[token]
    drafted = here.ring.shape[1]
    if drafted == 0:
        return kv, score
    kept = here.ring[request[:, None], at % drafted]
    before = (present & (at < start))[..., None]
    return torch.where(before, kept[:, :, 0], kv), torch.where(before, kept[:, :, 1], score)


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
