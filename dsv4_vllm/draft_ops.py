# SPDX-License-Identifier: Apache-2.0
"""Operators of vLLM's draft loop that its Python code calls on every CPU and only CPU builds carry.

Until the published wheel contains its CPU extension; then delete. Each does what the Triton kernel
of its name does on a GPU. Integers arrive as int64.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

REJECTED = -1


def _starts(ends: Tensor) -> Tensor:
    """First index of each request, of the inclusive sums of lengths."""
    return torch.cat([ends.new_zeros(1), ends[:-1]])


def prepare_inputs(
    ends: Tensor, sampled: Tensor, query_start_loc: Tensor, at: Tensor, rejected: Tensor, num_reqs: int
) -> None:
    """Where each request's last kept token is, and how many of its drafts were refused. ends:
    inclusive sums of drafts; sampled: valid tokens, drafts kept and one more.
    """
    drafted = ends - _starts(ends)
    refused = torch.where(drafted > 0, drafted + 1 - sampled, 0)[:num_reqs]
    rejected[:num_reqs] = refused
    at[:num_reqs] = query_start_loc[1 : num_reqs + 1] - 1 - refused


def prepare_next_tokens(
    sampled: Tensor,
    discarded: Tensor,
    backup: Tensor,
    next_ids: Tensor,
    counts: Tensor,
    vocab_size: int,
    width: int,
    num_reqs: int,
) -> None:
    """The last valid token of each request, or its backup, and how many are valid."""
    rows = sampled[:num_reqs, :width]
    valid = (rows != REJECTED) & (rows < vocab_size) & ~discarded[:num_reqs, None].bool()
    last = torch.where(valid, torch.arange(rows.shape[1]), -1).amax(1)
    found = rows.gather(1, last.clamp(min=0)[:, None])[:, 0]
    next_ids[:num_reqs] = torch.where(last >= 0, found, backup[:num_reqs])
    counts[:num_reqs] = valid.sum(1)


def step_metadata(
    positions: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    out_positions: Tensor,
    out_slots: Tensor,
    block_size: int,
    max_model_len: int,
    pad: int,
) -> None:
    """One drafted token further: positions, slots and lengths."""
    n = positions.shape[0]
    after = positions + 1
    over = after >= max_model_len
    at = torch.where(over, 0, after)
    block = (at // block_size).clamp(max=block_table.shape[1] - 1)
    slots = block_table.gather(1, block[:, None].long())[:, 0] * block_size + at % block_size
    out_positions[:n] = at
    out_slots[:n] = torch.where(over, pad, slots)
    out_slots[n:] = pad
    seq_lens[:n] = torch.where(over, 1, seq_lens[:n] + 1).clamp(max=max_model_len)


def reject_greedy(
    out: Tensor, ends: Tensor, drafts: Tensor, argmax: Tensor, bonus: Tensor, greedy: Tensor | None, width: int
) -> None:
    """Keep drafts up to the first that is not the target's choice, then that choice, or one more
    where all are kept.
    """
    for row, (first, end) in enumerate(zip(_starts(ends).tolist(), ends.tolist(), strict=True)):
        if greedy is None or greedy[row]:
            _keep(out[row], argmax[first:end], drafts[first:end] == argmax[first:end], bonus[row])


def reject_random(
    out: Tensor,
    ends: Tensor,
    drafts: Tensor,
    draft_probs: Tensor | None,
    target_probs: Tensor,
    bonus: Tensor,
    recovered: Tensor,
    uniform: Tensor,
    greedy: Tensor,
    width: int,
    vocab_size: int,
    certain: bool,
) -> None:
    """Keep drafts by target over draft probability. Source: https://arxiv.org/abs/2211.17192,
    algorithm 1. certain: the draft gave its token probability 1.
    """
    for row, (first, end) in enumerate(zip(_starts(ends).tolist(), ends.tolist(), strict=True)):
        if greedy[row]:
            continue
        ids = drafts[first:end]
        p = target_probs[first:end].gather(1, ids.clamp(min=0)[:, None])[:, 0]
        q = torch.ones_like(p)
        if not certain and draft_probs is not None:
            q = draft_probs[first:end].gather(1, ids.clamp(min=0)[:, None])[:, 0]
        kept = (ids >= 0) & (q > 0) & (p >= q * uniform[first:end])
        _keep(out[row], torch.where(kept, ids, recovered[first:end]), kept, bonus[row])


def _keep(out: Tensor, tokens: Tensor, kept: Tensor, bonus: Tensor) -> None:
    """Write tokens up to and with the first that was not kept, or all and the bonus."""
    n = int(kept.long().cumprod(0).sum())
    out[: n + 1] = torch.cat([tokens, bonus.view(1)])[: n + 1]


def expand(output: Tensor, values: Tensor, ends: Tensor, replace_from: int, replace_to: int) -> None:
    """Each request's value at all of its tokens."""
    lens = (ends - _starts(ends)).long()
    changed = torch.where(values == replace_from, torch.full_like(values, replace_to), values)
    output[: int(lens.sum())] = changed.repeat_interleave(lens)


def sample_recovered(
    out: Tensor,
    ends: Tensor,
    drafts: Tensor,
    draft_probs: Tensor | None,
    target_probs: Tensor,
    inverse_q: Tensor,
    vocab_size: int,
    certain: bool,
) -> None:
    """A token of what the target gives more than the draft, by exponential races."""
    request = torch.arange(ends.numel()).repeat_interleave(ends - _starts(ends))
    if certain or draft_probs is None:
        left = target_probs.scatter(1, drafts.clamp(min=0)[:, None], 0.0)
    else:
        left = (target_probs - draft_probs).clamp(min=0)
    out[: left.shape[0]] = (left * inverse_q[request]).argmax(1)


OPS: tuple[tuple[str, Callable[..., None]], ...] = (
    (
        "eagle_prepare_inputs_padded_kernel_impl(Tensor ends, Tensor sampled, Tensor query_start_loc, Tensor(a!) at,"
        " Tensor(b!) rejected, int num_reqs) -> ()",
        prepare_inputs,
    ),
    (
        "eagle_prepare_next_token_padded_kernel_impl(Tensor sampled, Tensor discarded, Tensor backup, Tensor(a!) ids,"
        " Tensor(b!) counts, int vocab_size, int width, int num_reqs) -> ()",
        prepare_next_tokens,
    ),
    (
        "eagle_step_slot_mapping_metadata_kernel_impl(Tensor positions, Tensor block_table, Tensor(a!) seq_lens,"
        " Tensor(b!) out_positions, Tensor(c!) out_slots, int block_size, int max_model_len, int pad) -> ()",
        step_metadata,
    ),
    (
        "rejection_greedy_sample_kernel_impl(Tensor(a!) out, Tensor ends, Tensor drafts, Tensor argmax, Tensor bonus,"
        " Tensor? greedy, int width) -> ()",
        reject_greedy,
    ),
    (
        "rejection_random_sample_kernel_impl(Tensor(a!) out, Tensor ends, Tensor drafts, Tensor? draft_probs,"
        " Tensor target_probs, Tensor bonus, Tensor recovered, Tensor uniform, Tensor greedy, int width,"
        " int vocab_size, bool certain) -> ()",
        reject_random,
    ),
    (
        "sample_recovered_tokens_kernel_impl(Tensor(a!) out, Tensor ends, Tensor drafts, Tensor? draft_probs,"
        " Tensor target_probs, Tensor inverse_q, int vocab_size, bool certain) -> ()",
        sample_recovered,
    ),
)
