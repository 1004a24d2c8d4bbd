# SPDX-License-Identifier: Apache-2.0
"""Plain-PyTorch reference of the attention operators. Source: docs/model.md, 3.2, 3.6 and 3.7."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.ops.norm import head_rms_norm, rms_norm
from dsv4.ops.pages import KV_ROPE_DIM, Selection, SlotMapping, load_rows, store_rows
from dsv4.ops.rope import apply_rope

# Tokens are attended in slices whose gathered keys fit in this many bytes.
GATHER_BYTES = 32 << 20


def norm_rope_store(
    q: Tensor, kv: Tensor, kv_weight: Tensor, eps: float, cos_sin: Tensor, window: SlotMapping
) -> Tensor:
    """Per-head norm and RoPE of q; weighted norm and RoPE of kv, written into its window slot.

    q: [T, H, 512]; kv: [T, 512]; kv_weight: [512]; cos_sin: [T, rope_dim] fp32; window: where each
    token's row goes. Returns the rotated q [T, H, 512] in its dtype. K and V are the same row.
    """
    store_rows(window.pages, window.slots, apply_rope(rms_norm(kv, kv_weight, eps), cos_sin), cos_sin.shape[-1])
    return apply_rope(head_rms_norm(q, eps), cos_sin)


def sparse_attention(
    q: Tensor,
    window: Selection,
    entries: Selection | None,
    sink: Tensor,
    cos_sin: Tensor | None = None,
    *,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(q . k * D**-0.5) over window and compressed keys jointly, with one extra logit per
    head in the denominator.

    q: [T, H, D]
    window, entries: the keys, which are the values too; entries is None on window-only layers
    sink: [H] fp32, unscaled; -inf adds nothing, +inf leaves zeros
    cos_sin: [T, rope_dim]; with it o is rotated back by its query's position, which `output_a`
    leaves out when it gets none

    Returns o [T, H, D] in q's dtype and the log-sum-exp [T, H] fp32 without the sink. A token with
    no valid key gets zeros and -inf.
    """
    out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    lists, widths = [window], [window.slots.shape[1]]
    if entries is not None and entries.lens.numel():
        # What no token reads is not gathered: HCA's lists are as long as the longest context may
        # be.
        width = min(int(entries.lens.max()), entries.slots.shape[1])
        if width:
            lists.append(entries)
            widths.append(width)
    step = max(1, GATHER_BYTES // max(1, 4 * q.shape[-1] * sum(widths)))
    for start in range(0, q.shape[0], step):
        part = slice(start, start + step)
        gathered = [_gather(s, part, width, q.shape[-1]) for s, width in zip(lists, widths, strict=True)]
        # A list alone is not copied.
        keys, valid = (
            gathered[0] if len(gathered) == 1 else (torch.cat(each, 1) for each in zip(*gathered, strict=True))
        )
        o, lse[part] = _attend(q[part], keys, valid, sink)
        out[part] = o if cos_sin is None else apply_rope(o, cos_sin[part], inverse=True)
    return out, lse


def _gather(selection: Selection, tokens: slice, width: int, dim: int) -> tuple[Tensor, Tensor]:
    """Some tokens' rows [T, width, dim] fp32 and which are valid [T, width]; invalid rows are zero,
    since a page may hold NaN."""
    slots, pages = selection.slots_of(tokens, width), selection.pages
    valid = torch.arange(slots.shape[1], device=slots.device) < selection.lens[tokens, None]
    valid &= (slots >= 0) & (slots < pages.num_slots)
    rows = load_rows(pages, torch.where(valid, slots, 0).flatten(), dim, KV_ROPE_DIM).unflatten(0, slots.shape)
    return rows.masked_fill_(~valid[..., None], 0.0), valid


def _attend(q: Tensor, keys: Tensor, valid: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
    scores = (q.float() @ keys.transpose(1, 2)) * q.shape[-1] ** -0.5  # [T, H, K]
    scores = scores.masked_fill(~valid[:, None], float("-inf"))
    lse = torch.logsumexp(scores, -1)
    total = torch.logaddexp(lse, sink.float())
    # Without a valid key and with a sink of -inf both terms are -inf, whose difference is NaN.
    p = torch.exp(scores - total.masked_fill(total == float("-inf"), 0.0)[..., None])
    return (p @ keys).to(q.dtype), lse


def output_a(o: Tensor, cos_sin: Tensor | None, wo_a: Tensor) -> Tensor:
    """Rotate each head's output back by its query's position, then project each group of heads.

    o: [T, H, D]; cos_sin: [T, rope_dim], None when o is already rotated back; wo_a: [G, R, (H / G)
    * D] in o's dtype.
    Returns [T, G * R] in o's dtype.
    """
    rotated = o if cos_sin is None else apply_rope(o, cos_sin, inverse=True)
    rotated = rotated.flatten(1).unflatten(1, (wo_a.shape[0], -1))  # [T, G, (H / G) * D]
    return torch.bmm(rotated.transpose(0, 1), wo_a.transpose(1, 2)).transpose(0, 1).flatten(1)
