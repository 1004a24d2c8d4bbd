# SPDX-License-Identifier: Apache-2.0
"""Plain-PyTorch reference of the indexer. Source: docs/model.md, 3.5.

Variant: the Hadamard rotation is applied for packed keys (official inference, SGLang), not for
plain ones, where it changes nothing but rounding (docs/model.md, 3.5). fp8 keys and queries carry
one power-of-two scale per 128 values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.model.kv_layout import IndexFormat
from dsv4.ops.indexer.query import IndexQuery
from dsv4.ops.pages import PageTable, load_rows
from dsv4.ops.plan.caches import topk_slots
from dsv4.ops.quant.reference import dequantize_e2m1, hadamard, quantize_e2m1, quantize_e4m3, ue8m0_value
from dsv4.ops.rope import apply_rope


def prepare_query(q: Tensor, weights: Tensor, cos_sin: Tensor, index_format: IndexFormat) -> IndexQuery:
    """RoPE on the last channels, Hadamard and quantisation as the keys' format wants, and the score
    scale.

    q: [T, Hi, 128]; weights: [T, Hi], the output of weights_proj; cos_sin: [T, rope_dim] fp32 at
    the token's position. Weights are multiplied by 128**-0.5 * Hi**-0.5 in fp32; they may be
    negative.
    """
    num_heads, dim = q.shape[1:]
    weights = weights.float() * (dim**-0.5 * num_heads**-0.5)
    q = apply_rope(q, cos_sin)
    if index_format is IndexFormat.PLAIN:
        return IndexQuery(q, None, weights, index_format)
    rotated = hadamard(q.bfloat16()).bfloat16()
    if index_format is IndexFormat.FP8:
        codes, scale = quantize_e4m3(rotated, dim)
        return IndexQuery(codes, None, weights * ue8m0_value(scale[..., 0]), index_format)
    packed, scale = quantize_e2m1(rotated)
    return IndexQuery(packed, scale, weights, index_format)


def query_values(query: IndexQuery) -> Tensor:
    """The query's numbers as fp32 [T, Hi, 128]; fp8's scale stays in the weights."""
    if query.format is IndexFormat.PLAIN:
        return query.values.float()
    if query.format is IndexFormat.FP8:
        return query.values.view(torch.float8_e4m3fn).float()
    assert query.scales is not None
    return dequantize_e2m1(query.values, query.scales)


def logits(
    query: IndexQuery, keys: PageTable, request_of_token: Tensor, entry_lens: Tensor, max_entries: int
) -> Tensor:
    """score[t, j] = sum_h w[t, h] * relu(q[t, h] . k[j]): fp32 [T, max_entries], -inf from
    entry_lens[t] on.

    A kernel may leave anything there: `topk` reads the first entry_lens[t] of a row.

    Tokens of one request are neighbours. Only entries below the request's largest length are read.
    """
    q, pages = query_values(query), keys.pages
    out = torch.full((q.shape[0], max_entries), float("-inf"), device=q.device)
    request, counts = request_of_token.unique_consecutive(return_counts=True)
    start = 0
    for r, count in zip(request.tolist(), counts.tolist(), strict=True):
        tokens = slice(start, start + count)
        start += count
        n = int(entry_lens[tokens].max())
        if n == 0:
            continue
        entry = torch.arange(n, device=q.device)
        slots = keys.block_table[r][entry // pages.rows].long() * pages.rows + entry % pages.rows
        k = load_rows(pages, slots, q.shape[-1], rope_dim=0)  # [n, 128]
        dots = torch.relu(q[tokens].flatten(0, 1) @ k.T).unflatten(0, (count, -1))  # [count, Hi, n]
        score = (query.weights[tokens, None] @ dots).squeeze(1)
        out[tokens, :n] = score.masked_fill(entry >= entry_lens[tokens, None], float("-inf"))
    return out


def topk(
    logits: Tensor, entry_lens: Tensor, k: int, entries: PageTable | None = None, request_of_token: Tensor | None = None
) -> Tensor:
    """Indices of the k largest of each row's first entry_lens[t] logits: int32 [T, k], ties to the
    lowest index.

    logits: [T, N] fp32. Unused places are -1 and come last; a row with at most k entries selects
    all of them, in order. With `entries` and request_of_token [T], cache slots of the entries
    instead of indices. Their order is not part of the contract: the reference sorts by score, the
    kernel by index.
    """
    if entries is not None and request_of_token is not None:
        return topk_slots(topk(logits, entry_lens, k), entries, request_of_token)
    num_tokens, n = logits.shape
    out = torch.full((num_tokens, k), -1, dtype=torch.int32, device=logits.device)
    lens = entry_lens[:, None].long()
    kept = min(k, n)
    everything = torch.arange(kept, device=logits.device).expand(num_tokens, -1)
    if n <= k:
        out[:, :kept] = torch.where(everything < lens, everything, -1).int()
        return out
    visible = logits.masked_fill(torch.arange(n, device=logits.device) >= lens, float("-inf"))
    order = visible.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    topk_indices = torch.where(lens <= k, everything, order)
    out[:] = torch.where(everything < lens, topk_indices, -1).int()
    return out
