# SPDX-License-Identifier: Apache-2.0
"""A step of attention without tokens, for vLLM's memory profile, which runs before there are
caches: the operators take what a real step of that many tokens takes.

Its caches have one page each, and every token is padding: nothing is read, nothing written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from dsv4.model.kv_layout import CacheRole
from dsv4.ops.pages import BatchView
from dsv4.ops.plan import EntryPlan, TokenPlan, WindowPlan
from dsv4_vllm.caches import V4Cache
from dsv4_vllm.metadata import StateMetadata, SummaryMetadata, WindowMetadata


@contextmanager
def one_page_each(caches: Iterable[V4Cache], device: torch.device) -> Iterator[None]:
    """Memory for those caches that vLLM has not allocated yet."""
    unbound = [cache for cache in dict.fromkeys(caches) if not cache.kv_cache.numel()]  # roles may share one
    try:
        for cache in unbound:
            cache.bind_kv_cache(cache.empty_pages(1, device))
        yield
    finally:
        for cache in unbound:
            cache.kv_cache = torch.tensor([])


def padding_only(
    caches: Mapping[CacheRole, V4Cache], num_tokens: int, max_model_len: int, device: torch.device
) -> dict[str, Any]:
    """The metadata of a step of padding tokens, by the caches' names; its host bounds are a full
    context's."""
    nowhere = torch.full((num_tokens,), -1, dtype=torch.int32, device=device)
    nothing = torch.zeros(num_tokens, dtype=torch.int32, device=device)
    page = torch.zeros(1, 1, dtype=torch.int32, device=device)
    tokens = TokenPlan(nothing, nothing.long(), nothing.bool())

    def plan(cache: V4Cache) -> Any:
        spec = cache.spec
        if spec.role is CacheRole.WINDOW:
            assert spec.sliding_window is not None
            slots = torch.full((num_tokens, spec.sliding_window), -1, dtype=torch.int32, device=device)
            return WindowMetadata(tokens, WindowPlan(nowhere, slots, nothing))
        if spec.role in (CacheRole.COMPRESSED, CacheRole.INDEX_KEY):
            entries = max_model_len // spec.tokens_per_row
            if CacheRole.INDEX_KEY in caches:
                return EntryPlan(page, nowhere, nothing, entries, None, nothing)
            return EntryPlan(page, nowhere, nothing, entries, page.new_zeros(1, entries), None)
        if spec.per_request:
            ends = torch.zeros(2, dtype=torch.int32, device=device)
            return SummaryMetadata(BatchView(ends, ends[:1], num_tokens, 1, max_model_len, num_tokens), page[:, 0])
        return StateMetadata(page, nowhere, shared=num_tokens > 1)

    return {cache.prefix: plan(cache) for cache in caches.values()}


@contextmanager
def stage(
    caches: Mapping[CacheRole, V4Cache], num_tokens: int, max_model_len: int, device: torch.device
) -> Iterator[dict[str, Any]]:
    """While it lasts, a layer with these caches can attend `padding_only`, which is yielded."""
    with one_page_each(caches.values(), device):
        yield padding_only(caches, num_tokens, max_model_len, device)
