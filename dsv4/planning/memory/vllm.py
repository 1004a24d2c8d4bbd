# SPDX-License-Identifier: Apache-2.0
"""vLLM's KV accounting without vLLM: groups, blocks of one shared pool, what one request must be
able to hold before it is admitted, and what it holds once it decodes.

Mirrors `_get_packed_kv_cache_groups`, `SlidingWindowSpec.max_admission_blocks_per_request` and
`VllmConfig.max_in_flight_tokens` of vLLM 0.32 and 0.33 (`vllm/v1/core/kv_cache_utils.py`, in 0.33
`kv_cache_planning.py`), and what `KVCacheManager.allocate_slots` and `remove_skipped_blocks` leave
a decoding request with; tests compare with all of them.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dsv4.model.config import V4Config
from dsv4.model.kv_layout import CacheFormats, ModelCache, StateMapping, model_caches
from dsv4.planning.deployment import MAX_CONTEXT, Deployment
from dsv4.planning.memory import overheads
from dsv4.planning.memory.account import Proof, exchange_terms, graph_range, term, verdict_of, weight_terms
from dsv4.planning.memory.weights import pipeline_layers


@dataclass(frozen=True)
class KvGroup:
    """Caches that share a block table: every block holds one page of each."""

    page_tokens: int
    sliding_window: int | None
    per_request: bool
    caches: tuple[ModelCache, ...]

    @property
    def page_bytes(self) -> int:
        return sum(cache.spec.page_bytes for cache in self.caches)

    @property
    def max_layers_per_page_size(self) -> int:
        return max(Counter(cache.spec.page_bytes for cache in self.caches).values())

    def request_blocks(self, max_model_len: int, in_flight_tokens: int) -> int:
        """Blocks that admission reserves for one request of `max_model_len` tokens."""
        if self.per_request:
            return 1
        if self.sliding_window is None:
            return -(-max_model_len // self.page_tokens)
        tokens = min(self.sliding_window - 1 + in_flight_tokens, max_model_len)
        return -(-tokens // self.page_tokens) + 1  # the window may start inside a block

    def decoding_blocks(self, max_model_len: int, unsettled_tokens: int) -> float:
        """Blocks that a decoding request of `max_model_len` tokens holds, over the positions it may
        have in its pages: the window before the last settled token, and the tokens that follow.
        """
        if self.per_request:
            return 1
        whole = -(-max_model_len // self.page_tokens)
        if self.sliding_window is None:
            return whole
        tokens = self.sliding_window - 1 + unsettled_tokens
        return min((tokens - 1) / self.page_tokens + 1, whole)


@dataclass(frozen=True)
class VllmPool:
    """The KV pool of one rank: `groups` draw blocks of `block_bytes` from it."""

    groups: tuple[KvGroup, ...]
    block_bytes: int

    def request_blocks(self, max_model_len: int, in_flight_tokens: int) -> int:
        """Blocks that must be free for one request of `max_model_len` tokens to be admitted."""
        return sum(g.request_blocks(max_model_len, in_flight_tokens) for g in self.groups)

    def request_bytes(self, max_model_len: int, in_flight_tokens: int) -> int:
        """Bytes one request needs to be admitted: vLLM's "KV cache is needed"."""
        return self.block_bytes * self.request_blocks(max_model_len, in_flight_tokens)

    def decoding_blocks(self, max_model_len: int, unsettled_tokens: int) -> int:
        """Blocks that a decoding request of `max_model_len` tokens holds: its window and state are
        a few pages, whatever the step.
        """
        return math.ceil(sum(g.decoding_blocks(max_model_len, unsettled_tokens) for g in self.groups))

    def state_bytes(self, in_flight_tokens: int, max_model_len: int) -> int:
        """The part of `request_bytes` that windows and compressor states take: the in-flight
        reserve.
        """
        windowed = [g for g in self.groups if g.sliding_window is not None]
        return self.block_bytes * sum(g.request_blocks(max_model_len, in_flight_tokens) for g in windowed)

    def num_blocks(self, pool_bytes: int) -> int:
        return max(pool_bytes, 0) // self.block_bytes

    def printed_concurrency(self, pool_bytes: int, max_model_len: int, in_flight_tokens: int) -> float:
        """vLLM's start-up line "Maximum concurrency for ... tokens per request", which charges
        the in-flight reserve to every request. `requests_at_once` is what the pool holds.
        """
        return self.num_blocks(pool_bytes) / self.request_blocks(max_model_len, in_flight_tokens)

    def need_bytes(self, requests: int, max_model_len: int, flight: InFlight) -> int:
        """Bytes with which `requests` of `max_model_len` tokens decode together while the last of
        them is prefilled: one is admitted, the others hold what decoding takes, and one block is
        the null block.
        """
        others = (requests - 1) * self.decoding_blocks(max_model_len, flight.unsettled_tokens)
        return self.block_bytes * (self.request_blocks(max_model_len, flight.tokens) + others + 1)

    def requests_at_once(self, pool_bytes: int, max_model_len: int, flight: InFlight) -> int:
        """The most requests that `need_bytes` allows in `pool_bytes`; 0 when not one starts."""
        left = self.num_blocks(pool_bytes) - 1 - self.request_blocks(max_model_len, flight.tokens)
        return 0 if left < 0 else left // self.decoding_blocks(max_model_len, flight.unsettled_tokens) + 1

    def max_model_len(self, pool_bytes: int, flight: InFlight, limit: int, concurrency: int = 1) -> int:
        """Longest context of which `concurrency` requests are held at once; 0 when none is."""
        low, high = 0, limit
        while low < high:
            middle = (low + high + 1) // 2
            fits = self.need_bytes(concurrency, middle, flight) <= pool_bytes
            low, high = (middle, high) if fits else (low, middle - 1)
        return low


@dataclass(frozen=True)
class InFlight:
    """Tokens scheduled and not yet settled. tokens: of all requests, which admission reserves for.
    unsettled_tokens: of one decoding request, with the slots its draft writes ahead.
    """

    tokens: int
    unsettled_tokens: int = 1


def in_flight_tokens(max_num_batched_tokens: int, async_scheduling: bool, pp: int) -> int:
    """Tokens scheduled and not yet settled: every concurrent batch may be full.

    Async scheduling keeps one batch more than the pipeline has stages (GPU model runner V2, the
    default since 0.30).
    """
    return max_num_batched_tokens * (pp + 1 if async_scheduling else pp)


def in_flight(d: Deployment) -> InFlight:
    """What `d` has in flight. A request decodes in one step at a time, with async scheduling in
    two; each step writes its token, the drafted ones, and as many slots ahead for the next draft.
    """
    drafted = d.speculation.num_tokens
    steps = 2 if d.async_scheduling else 1
    tokens = in_flight_tokens(d.max_num_batched_tokens, d.async_scheduling, d.pp)
    return InFlight(tokens, steps * (1 + drafted) + drafted)


@functools.lru_cache(maxsize=64)
def vllm_pool(
    config: V4Config,
    formats: CacheFormats,
    num_draft_layers: int = 0,
    stage: range | None = None,
    mapping: StateMapping = StateMapping.PAGED,
    drafted: int = 0,
) -> VllmPool:
    """The pool of one rank. Groups are formed over the whole model, then cut to the layers of
    pipeline stage `stage`.

    drafted: tokens that a step of SUMMARY may have to take back
    mapping: PAGED where native V4 serves, SUMMARY where dsv4's plugin does (docs/kv-mapping.md).
    """
    groups = _groups(model_caches(config, formats, num_draft_layers, mapping, drafted))
    if stage is not None:
        groups = tuple(
            replace(g, caches=tuple(c for c in g.caches if any(layer in stage for layer in c.layers))) for g in groups
        )
    return VllmPool(groups, max(g.page_bytes for g in groups))  # as wide as the widest group's pages side by side


def stage_with_draft(stage: range, config: V4Config, num_draft_layers: int) -> range:
    """Layers of a pipeline stage, with the draft's when it is the last one."""
    is_last = stage.stop == config.num_hidden_layers
    return range(stage.start, stage.stop + (num_draft_layers if is_last else 0))


def _groups(caches: Sequence[ModelCache]) -> tuple[KvGroup, ...]:
    buckets: dict[tuple[int, int | None, bool], list[ModelCache]] = {}
    for cache in caches:
        buckets.setdefault((cache.spec.page_tokens, cache.spec.sliding_window, cache.spec.per_request), []).append(
            cache
        )
    whole = [KvGroup(*key, tuple(members)) for key, members in buckets.items()]
    counts = [Counter(c.spec.page_bytes for c in g.caches) for g in whole]
    # A bucket with as many layers of each page size repeats one pattern; the longest mixed pattern
    # must stay whole.
    balanced = [len(set(count.values())) == 1 for count in counts]
    floor = max(
        (g.max_layers_per_page_size for g, b, c in zip(whole, balanced, counts, strict=True) if b and len(c) > 1),
        default=0,
    )
    if not floor:
        return _capped_to_widest(whole)
    repeats = _least_padding([g.max_layers_per_page_size for g, b in zip(whole, balanced, strict=True) if b], floor)
    split: list[KvGroup] = []
    for group, is_balanced in zip(whole, balanced, strict=True):
        parts = -(-group.max_layers_per_page_size // repeats) if is_balanced else 1
        split += _split(group, parts)
    return tuple(split)


def _capped_to_widest(whole: Sequence[KvGroup]) -> tuple[KvGroup, ...]:
    """Without a pattern to keep whole, window and per-request groups are split until they fit the
    widest other group's block.
    """

    def splits(group: KvGroup) -> bool:
        return group.per_request or group.sliding_window is not None

    widest = max(g.caches[0].spec.page_bytes if splits(g) else g.page_bytes for g in whole)
    groups: list[KvGroup] = []
    for group in whole:
        per_block = max(widest // group.caches[0].spec.page_bytes, 1)
        groups += _split(group, -(-len(group.caches) // per_block) if splits(group) else 1)
    return tuple(groups)


def _split(group: KvGroup, parts: int) -> list[KvGroup]:
    """Deal the repeats of the group's pattern (one cache per page size) round robin to `parts`
    groups.
    """
    if parts == 1:
        return [group]
    by_size: dict[int, list[ModelCache]] = {}
    for cache in group.caches:
        by_size.setdefault(cache.spec.page_bytes, []).append(cache)
    repeats = list(zip(*by_size.values(), strict=True))
    dealt = ([cache for repeat in repeats[i::parts] for cache in repeat] for i in range(parts))
    return [replace(group, caches=tuple(caches)) for caches in dealt]


def _least_padding(values: Sequence[int], lower_bound: int) -> int:
    """The chunk size that pads `values` least; ties prefer the larger. Mirrors
    `_approximate_gcd`.
    """
    candidates = range(lower_bound, max(*values, lower_bound) + 1)
    return min(candidates, key=lambda d: (sum(-v % d for v in values), -d))


# ----------------------------------------------------------------------------------------------
# The proof


def stage_pool(d: Deployment, stage: int) -> VllmPool:
    """vLLM's pool on a rank of pipeline stage `stage`."""
    layers = stage_with_draft(pipeline_layers(d.config.num_hidden_layers, d.pp)[stage], d.config, d.num_draft_layers)
    drafted = d.speculation.num_tokens
    return vllm_pool(d.config, d.formats, d.num_draft_layers, layers, mapping=d.state, drafted=drafted)


def requests_in(d: Deployment, pool_bytes: int) -> int:
    """Requests of max_model_len that a pool of so many bytes on every rank holds at once."""
    flight = in_flight(d)
    stages = (stage_pool(d, stage) for stage in range(d.pp))
    return d.num_pools * min(pool.requests_at_once(pool_bytes, d.max_model_len, flight) for pool in stages)


def prove_stage(d: Deployment, stage: int, per_replica: int) -> Proof:
    """Memory of one rank of pipeline stage `stage`, for `per_replica` requests at once."""
    terms = [
        *weight_terms(d, stage),
        term("outside PyTorch", overheads.non_torch(d.tp * d.dp)),
        term("activation peak", overheads.activation(d.config, d.max_num_batched_tokens)),
        term("CUDA graphs", graph_range(d)),
        *exchange_terms(d),
    ]
    budget = int(d.memory_fraction * d.gpu.total_bytes)
    pool = stage_pool(d, stage)
    flight = in_flight(d)
    low, high = budget - sum(t.high for t in terms), budget - sum(t.low for t in terms)
    need = pool.need_bytes(per_replica, d.max_model_len, flight)
    return Proof(
        deployment=d,
        stage=stage,
        terms=tuple(terms),
        budget_bytes=budget,
        pool_low=low,
        pool_high=high,
        start_bytes=pool.need_bytes(1, d.max_model_len, flight),
        reserve_bytes=pool.state_bytes(flight.tokens, d.max_model_len),
        decoding_bytes=pool.block_bytes * pool.decoding_blocks(d.max_model_len, flight.unsettled_tokens),
        need_bytes=need,
        held_low=pool.requests_at_once(low, d.max_model_len, flight) * d.num_pools,
        held_high=pool.requests_at_once(high, d.max_model_len, flight) * d.num_pools,
        printed_low=pool.printed_concurrency(low, d.max_model_len, flight.tokens),
        printed_high=pool.printed_concurrency(high, d.max_model_len, flight.tokens),
        longest=lambda pool_bytes: pool.max_model_len(pool_bytes, flight, MAX_CONTEXT, per_replica),
        shortfall_bytes=max(need - low, 0),
        verdict=verdict_of(need <= low, need <= high),
    )
