# SPDX-License-Identifier: Apache-2.0
"""Plain-PyTorch twin of the attention operators. Source: spec sections 3.2, 3.6 and 3.7."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.ops.norm import head_rms_norm, rms_norm
from dsv4.ops.pages import Pages, load_rows, store_rows
from dsv4.ops.rope import apply_rope

# Tokens are attended in slices whose gathered keys fit in this many bytes.
GATHER_BYTES = 32 << 20


def norm_rope_store(q: Tensor, kv: Tensor, kv_weight: Tensor, eps: float, cos_sin: Tensor, window: Pages, slots: Tensor) -> Tensor:
    """Per-head norm and RoPE of q; weighted norm and RoPE of kv, written into its window slot.

    q: [T, H, 512]; kv: [T, 512]; kv_weight: [512]; cos_sin: [T, rope_dim] fp32; slots: [T], -1 writes nothing.
    Returns the rotated q [T, H, 512] in its dtype. K and V are the same row.
    """
    store_rows(window, slots, apply_rope(rms_norm(kv, kv_weight, eps), cos_sin), cos_sin.shape[-1])
    return apply_rope(head_rms_norm(q, eps), cos_sin)


def sparse_attention(
    q: Tensor,
    window: Pages,
    window_slots: Tensor,
    window_lens: Tensor,
    entries: Pages | None,
    entry_slots: Tensor | None,
    entry_row: Tensor | None,
    entry_lens: Tensor | None,
    sink: Tensor,
    rope_dim: int,
    cos_sin: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(q . k * D**-0.5) over window and compressed keys jointly, with one extra logit per head in the denominator.

    q: [T, H, D]; window_slots: [T, W] int32, the first window_lens[t] valid; entry_slots: [N, K] int32 and entry_row: [T],
    which of its rows token t reads, the first entry_lens[t] places valid, -1 among them skipped; all four None on
    window-only layers. sink: [H] fp32, unscaled. cos_sin: [T, rope_dim], then o is rotated back by its query's position,
    which `output_a` leaves out when it gets none. Returns o [T, H, D] in q's dtype and the log-sum-exp [T, H] fp32
    without the sink. A token with no valid key gets zeros and -inf.
    """
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    max_entries = 0
    if entry_slots is not None and entry_lens is not None and entry_lens.numel():
        max_entries = min(int(entry_lens.max()), entry_slots.shape[1])
    row_bytes = 4 * q.shape[-1] * (window_slots.shape[1] + max_entries)
    step = max(1, GATHER_BYTES // row_bytes)
    for start in range(0, q.shape[0], step):
        part = slice(start, start + step)
        keys, valid = _gather(window, window_slots[part], window_lens[part], q.shape[-1], rope_dim)
        if max_entries and entries is not None:
            slots = entry_slots[entry_row[part].long(), :max_entries]  # type: ignore[index]
            more, more_valid = _gather(entries, slots, entry_lens[part], q.shape[-1], rope_dim)  # type: ignore[index]
            keys, valid = torch.cat([keys, more], 1), torch.cat([valid, more_valid], 1)
        out[part], lse[part] = _attend(q[part], keys, valid, sink)
    return out if cos_sin is None else apply_rope(out, cos_sin, inverse=True), lse


def _gather(pages: Pages, slots: Tensor, lens: Tensor, dim: int, rope_dim: int) -> tuple[Tensor, Tensor]:
    """Rows [T, K, dim] fp32 and which are valid [T, K]; invalid rows are zero, since a page may hold NaN."""
    valid = (torch.arange(slots.shape[1], device=slots.device) < lens[:, None]) & (slots >= 0)
    rows = load_rows(pages, torch.where(valid, slots, 0).flatten(), dim, rope_dim).unflatten(0, slots.shape)
    return rows.masked_fill_(~valid[..., None], 0.0), valid


def _attend(q: Tensor, keys: Tensor, valid: Tensor, sink: Tensor) -> tuple[Tensor, Tensor]:
    scores = (q.float() @ keys.transpose(1, 2)) * q.shape[-1] ** -0.5  # [T, H, K]
    scores = scores.masked_fill(~valid[:, None], float("-inf"))
    lse = torch.logsumexp(scores, -1)
    total = torch.logaddexp(lse, sink.float())
    p = torch.exp(scores - total[..., None])  # exp(-inf) = 0, also where every score is -inf
    return (p @ keys).to(q.dtype), lse


def output_a(o: Tensor, cos_sin: Tensor | None, wo_a: Tensor) -> Tensor:
    """Rotate each head's output back by its query's position, then project each group of heads.

    o: [T, H, D]; cos_sin: [T, rope_dim], None when o is already rotated back; wo_a: [G, R, (H / G) * D] in o's dtype. Returns [T, G * R] in o's dtype.
    """
    rotated = o if cos_sin is None else apply_rope(o, cos_sin, inverse=True)
    rotated = rotated.flatten(1).unflatten(1, (wo_a.shape[0], -1))  # [T, G, (H / G) * D]
    return torch.bmm(rotated.transpose(0, 1), wo_a.transpose(1, 2)).transpose(0, 1).flatten(1)
