# SPDX-License-Identifier: Apache-2.0
"""The lightning indexer: which compressed entries a CSA query attends. Source: docs/model.md,
3.5."""

import torch
from torch import Tensor

from dsv4.model.kv_layout import INDEX_SCORES_BYTES
from dsv4.ops.indexer import reference
from dsv4.ops.indexer.query import IndexQuery
from dsv4.ops.indexer.ranks import Ranks
from dsv4.ops.pages import PageTable, Selection
from dsv4.ops.registry import operator

prepare_query = operator(
    "indexer.prepare_query", reference.prepare_query, triton="dsv4.ops.indexer.triton:prepare_query"
)
logits = operator("indexer.logits", reference.logits, triton="dsv4.ops.indexer.triton:logits")
topk = operator("indexer.topk", reference.topk, triton="dsv4.ops.indexer.triton:topk")

LOGIT_BYTES = 4
SLICE_TOKENS = 4  # int32 of so many tokens are 16 bytes


def select(
    query: IndexQuery,
    keys: PageTable,
    entries: PageTable,
    request_of_token: Tensor,
    entry_lens: Tensor,
    *,
    max_entries: int,
    k: int,
    chosen_lens: Tensor | None = None,
    ranks: Ranks | None = None,
) -> Selection:
    """The `k` visible entries of largest score per token.

    keys: the layer's index keys; entries: its compressed entries, which are selected
    request_of_token: [T] int32
    entry_lens: [T] int32, visible entries; entry j of a request pools its tokens from 4j on
    max_entries: host bound on entry_lens
    chosen_lens: [T] int32, entry_lens or k where that is less; None: computed here
    ranks: who may share the work
    """
    num_tokens = entry_lens.shape[0]
    step = max(1, INDEX_SCORES_BYTES // (LOGIT_BYTES * max(max_entries, 1)))
    # Triton compiles anew for pointers that are not aligned to 16 bytes.
    step = step if step < SLICE_TOKENS else step // SLICE_TOKENS * SLICE_TOKENS

    def chosen(part: slice) -> Tensor:
        scores = logits(query[part], keys, request_of_token[part], entry_lens[part], max_entries)
        return topk(scores, entry_lens[part], k, entries, request_of_token[part])

    def chosen_of(start: int, stop: int, room: int) -> Tensor:
        """Of some tokens, with room behind them: [room, k]."""
        if start == 0 and stop == room == num_tokens <= step:
            return chosen(slice(None))
        slots = torch.empty(room, k, dtype=torch.int32, device=entry_lens.device)
        for first in range(start, stop, step):
            part = slice(first, min(first + step, stop))
            slots[part.start - start : part.stop - start] = chosen(part)
        return slots

    if ranks is not None and ranks.share(num_tokens, max_entries):
        share = -(-num_tokens // (ranks.size * SLICE_TOKENS)) * SLICE_TOKENS
        start = min(ranks.rank * share, num_tokens)
        slots = ranks.gather(chosen_of(start, min(start + share, num_tokens), share))[:num_tokens]
    else:
        slots = chosen_of(0, num_tokens, num_tokens)
    return Selection(entries.pages, slots, entry_lens.clamp(max=k) if chosen_lens is None else chosen_lens)


__all__ = ["IndexQuery", "Ranks", "logits", "prepare_query", "select", "topk"]
