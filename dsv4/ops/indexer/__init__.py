# SPDX-License-Identifier: Apache-2.0
"""The lightning indexer: which compressed entries a CSA query attends. Source: docs/model.md,
3.5."""

import torch
from torch import Tensor

from dsv4.model.kv_layout import INDEX_SCORES_BYTES
from dsv4.ops.indexer import reference
from dsv4.ops.indexer.query import IndexQuery
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
) -> Selection:
    """The `k` visible entries of largest score per token.

    keys: the layer's index keys; entries: its compressed entries, which are selected
    request_of_token: [T] int32
    entry_lens: [T] int32, visible entries; entry j of a request pools its tokens from 4j on
    max_entries: host bound on entry_lens
    chosen_lens: [T] int32, entry_lens or k where that is less; None: computed here
    """
    num_tokens = entry_lens.shape[0]
    step = max(1, INDEX_SCORES_BYTES // (LOGIT_BYTES * max(max_entries, 1)))
    # Triton compiles anew for pointers that are not aligned to 16 bytes.
    step = step if step < SLICE_TOKENS else step // SLICE_TOKENS * SLICE_TOKENS

    def chosen(part: slice) -> Tensor:
        scores = logits(query[part], keys, request_of_token[part], entry_lens[part], max_entries)
        return topk(scores, entry_lens[part], k, entries, request_of_token[part])

    if num_tokens <= step:
        slots = chosen(slice(None))
    else:
        slots = torch.empty(num_tokens, k, dtype=torch.int32, device=entry_lens.device)
        for start in range(0, num_tokens, step):
            part = slice(start, start + step)
            slots[part] = chosen(part)
    return Selection(entries.pages, slots, entry_lens.clamp(max=k) if chosen_lens is None else chosen_lens)


__all__ = ["IndexQuery", "logits", "prepare_query", "select", "topk"]
