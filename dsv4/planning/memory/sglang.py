# SPDX-License-Identifier: Apache-2.0
"""SGLang's KV accounting without SGLang: bytes per full token, request-scoped bytes, tokens of the
pool.

Mirrors `DSV4PoolConfigurator` of SGLang 0.5.22 and 0.5.23
(`sglang/srt/model_executor/pool_configurator.py`); tests compare with it. Two sizings exist: an
explicit `--swa-full-tokens-ratio` ties window slots to full tokens, otherwise (cap mode) the window
pool is sized from `--max-running-requests`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from dsv4.model.config import LayerKind, V4Config
from dsv4.model.kv_layout import (
    PAGE_TOKENS,
    CacheFormats,
    CacheRole,
    IndexFormat,
    StateMapping,
    layer_caches,
    round_up,
    state_ring_rows,
)
from dsv4.planning.deployment import MAX_CONTEXT, Deployment
from dsv4.planning.memory import overheads
from dsv4.planning.memory.account import Proof, exchange_terms, graph_range, term, verdict_of, weight_terms
from dsv4.planning.memory.weights import pipeline_layers

EVICTION_INTERVAL = 128  # SGLANG_SWA_EVICTION_INTERVAL's default
SPARE_TOKENS = 2 * PAGE_TOKENS  # the scheduler admits a request where more than one page would be left
PREFIX_TAILS_PER_REQUEST = 4  # cached prefixes that cap mode keeps resumable, per running request


@dataclass(frozen=True, kw_only=True)
class SglangRequest:
    """What sizes the pool. max_running_requests and chunked_prefill_tokens are per attention-DP
    rank and per step.

    swa_full_tokens_ratio: None means cap mode. draft_tokens: 0 without speculation.
    """

    max_running_requests: int
    chunked_prefill_tokens: int
    swa_full_tokens_ratio: float | None = None
    draft_tokens: int = 0
    overlap_schedule: bool = True
    radix_cache: bool = True


@dataclass(frozen=True)
class SglangPool:
    """Byte model of one rank's pool: `full_tokens * bytes_per_full_token + fixed_bytes`.

    window_tokens: cap mode's window pool; None when it is tied to full tokens.
    decoding_window_pages: that a decoding request holds, over the positions it may have in them.
    written_ahead_tokens: slots that a decoding request has beyond its length.
    prefill_window_tokens: that the scheduler asks for to admit a request; later chunks wait.
    """

    bytes_per_full_token: float
    fixed_bytes: float
    window_tokens: int | None
    swa_full_tokens_ratio: float
    decoding_window_pages: float
    written_ahead_tokens: int
    prefill_window_tokens: int

    def full_tokens(self, pool_bytes: float) -> int:
        """max_total_num_tokens that fits `pool_bytes`."""
        return int(max(pool_bytes - self.fixed_bytes, 0) / self.bytes_per_full_token) // PAGE_TOKENS * PAGE_TOKENS

    def request_tokens(self, context: int) -> int:
        """Full tokens that one request of `context` tokens holds: whole pages."""
        return round_up(context + self.written_ahead_tokens, PAGE_TOKENS)

    def need_bytes(self, requests: int, context: int) -> int:
        """Pool bytes with which `requests` of `context` tokens decode together while the last of
        them is prefilled.
        """
        tokens = requests * self.request_tokens(context) + SPARE_TOKENS
        if self.window_tokens is None and requests > 1:
            pages = math.ceil((requests - 1) * self._decoding_pages(context)) + self._prefill_pages(context)
            tokens = max(tokens, math.ceil(pages * PAGE_TOKENS / self.swa_full_tokens_ratio))
        return math.ceil(round_up(tokens, PAGE_TOKENS) * self.bytes_per_full_token + self.fixed_bytes)

    def requests_at_once(self, full_tokens: int, context: int) -> int:
        """Requests of `context` tokens at once, by compressed KV and by window pages. A chunk is
        cut where the whole window pool is too short for it: windows never refuse the first request.
        """
        window = self.window_tokens
        if window is None:
            window = int(full_tokens * self.swa_full_tokens_ratio)
        left = window // PAGE_TOKENS - self._prefill_pages(context)
        by_window = 1 + max(math.floor(left / self._decoding_pages(context)), 0)
        return min(max(full_tokens - SPARE_TOKENS, 0) // self.request_tokens(context), by_window)

    def _decoding_pages(self, context: int) -> float:
        return min(self.decoding_window_pages, self.request_tokens(context) // PAGE_TOKENS)

    def _prefill_pages(self, context: int) -> int:
        return -(-min(self.prefill_window_tokens, self.request_tokens(context)) // PAGE_TOKENS) + 1


def sglang_pool(
    config: V4Config, formats: CacheFormats, request: SglangRequest, stage: range | None = None
) -> SglangPool:
    """The pool of one rank of pipeline stage `stage` (default: the whole model)."""
    layers = [layer for layer in config.layers if stage is None or layer.index in stage]
    speculative = request.draft_tokens > 0
    # Both indexer dtypes are priced as FP8 on NVIDIA: the FP4 path keeps the FP8 estimate.
    priced = replace(formats, index=IndexFormat.FP8)
    window = full = hca_state = 0.0  # bytes per window token, per full token, and for all requests
    slots = request.max_running_requests + 1
    for layer in layers:
        for cache in layer_caches(config, layer, priced, StateMapping.RING):
            if cache.role is CacheRole.WINDOW:
                window += cache.page_bytes / PAGE_TOKENS
            elif cache.role is CacheRole.COMPRESSED:
                full += cache.page_bytes / PAGE_TOKENS
            elif cache.role is CacheRole.INDEX_KEY:
                full += cache.row.row_bytes / layer.compress_ratio
            elif layer.kind is LayerKind.CSA:
                window += cache.row.row_bytes * state_ring_rows(layer, speculative) / PAGE_TOKENS
            else:
                ring = state_ring_rows(layer, speculative)
                hca_state += round_up(slots * ring + ring + 1, 128) * cache.row.row_bytes
    # The engine prices the draft's pool as one more layer of the same mix.
    inflation = (len(layers) + 1) / len(layers) if speculative else 1.0
    window_tokens = None if request.swa_full_tokens_ratio is not None else _cap_window_tokens(config, request)
    ratio = request.swa_full_tokens_ratio or 0.0
    window *= inflation
    return SglangPool(
        bytes_per_full_token=full * inflation + ratio * window,
        fixed_bytes=hca_state + (window_tokens or 0) * window,
        window_tokens=window_tokens,
        swa_full_tokens_ratio=ratio,
        # A whole page before the last token stays, so that a cached prefix ends in a live window.
        decoding_window_pages=(round_up(config.sliding_window, PAGE_TOKENS) + _written_ahead(request)) / PAGE_TOKENS
        + 1,
        written_ahead_tokens=_written_ahead(request),
        prefill_window_tokens=request.chunked_prefill_tokens,
    )


def _written_ahead(request: SglangRequest) -> int:
    """Slots beyond its length that a decoding request with a draft has: two verifying steps
    (`get_alloc_reserve_per_decode`).
    """
    return 2 * request.draft_tokens


def live_window_tokens(config: V4Config, request: SglangRequest) -> int:
    """Window slots that cap mode sets aside for one decoding request: the window, its eviction
    slack and the tokens being written.
    """
    draft = max(request.draft_tokens, 1)
    trailing = config.sliding_window + EVICTION_INTERVAL * draft + PAGE_TOKENS
    if request.draft_tokens == 0:
        return trailing + PAGE_TOKENS
    return trailing + 2 * request.draft_tokens  # overlap scheduling keeps two steps' allocations outstanding


def _window_tokens_in_flight(request: SglangRequest) -> int:
    chunks = 2 if request.overlap_schedule else 1
    return chunks * request.chunked_prefill_tokens + PAGE_TOKENS


def _cap_window_tokens(config: V4Config, request: SglangRequest) -> int:
    cap = live_window_tokens(config, request) * request.max_running_requests + _window_tokens_in_flight(request)
    tails = PREFIX_TAILS_PER_REQUEST * request.max_running_requests if request.radix_cache else 0
    return round_up(cap + tails * (config.sliding_window + PAGE_TOKENS), PAGE_TOKENS)


# ----------------------------------------------------------------------------------------------
# The proof


def stage_pool(d: Deployment, stage: int) -> SglangPool:
    """SGLang's pool on a rank of pipeline stage `stage`."""
    request = SglangRequest(
        max_running_requests=d.max_num_seqs,
        chunked_prefill_tokens=d.max_num_batched_tokens,
        swa_full_tokens_ratio=d.swa_full_tokens_ratio,
        draft_tokens=d.speculation.num_tokens + 1 if d.has_draft else 0,
        overlap_schedule=d.async_scheduling,
    )
    return sglang_pool(d.config, d.formats, request, pipeline_layers(d.config.num_hidden_layers, d.pp)[stage])


def prove_stage(d: Deployment, stage: int, per_replica: int) -> Proof:
    """Memory of one rank of pipeline stage `stage`, for `per_replica` requests at once."""
    before = term("context before load", overheads.context(d.tp * d.dp))
    weights = weight_terms(d, stage)
    pool = stage_pool(d, stage)

    def pool_bytes(context: int, loaded: int) -> int:
        return int((d.gpu.total_bytes - context) * d.memory_fraction) - loaded

    low = pool_bytes(before.high, sum(t.high for t in weights))
    high = pool_bytes(before.low, sum(t.low for t in weights))
    need = pool.need_bytes(per_replica, d.max_model_len)
    tokens_low, tokens_high = pool.full_tokens(low), pool.full_tokens(high)
    # The fraction leaves the rest of the card to activations and graphs: that must hold them.
    headroom = int((d.gpu.total_bytes - before.high) * (1 - d.memory_fraction))
    runtime = [
        term("activation peak, in the headroom", overheads.activation(d.config, d.max_num_batched_tokens)),
        term("CUDA graphs, in the headroom", graph_range(d)),
        *exchange_terms(d, ", in the headroom"),
    ]
    lack_low, lack_high = (max(sum(getattr(t, end) for t in runtime) - headroom, 0) for end in ("high", "low"))
    return Proof(
        deployment=d,
        stage=stage,
        terms=(before, *weights, *runtime),
        budget_bytes=int((d.gpu.total_bytes - before.high) * d.memory_fraction),
        pool_low=low,
        pool_high=high,
        start_bytes=pool.need_bytes(1, d.max_model_len),
        reserve_bytes=int(pool.fixed_bytes),
        decoding_bytes=int(pool.request_tokens(d.max_model_len) * pool.bytes_per_full_token),
        need_bytes=need,
        held_low=pool.requests_at_once(tokens_low, d.max_model_len) * d.num_pools,
        held_high=pool.requests_at_once(tokens_high, d.max_model_len) * d.num_pools,
        printed_low=None,
        printed_high=None,
        longest=lambda pool_bytes: _longest(pool, pool_bytes, per_replica),
        shortfall_bytes=max(need - low, lack_low, 0),
        headroom_shortfall_bytes=lack_low,
        verdict=verdict_of(need <= low and not lack_low, need <= high and not lack_high),
    )


def _longest(pool: SglangPool, pool_bytes: int, requests: int) -> int:
    """The longest context of which `requests` are held at once; 0 when none is."""
    low, high = 0, MAX_CONTEXT
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if pool.need_bytes(requests, middle) <= pool_bytes else (low, middle - 1)
    return low
