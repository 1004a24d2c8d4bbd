# SPDX-License-Identifier: Apache-2.0
"""SGLang's KV accounting without SGLang: bytes per full token, request-scoped bytes, tokens of the pool.

Mirrors `DSV4PoolConfigurator` of SGLang 0.5.22 and 0.5.23 (`sglang/srt/model_executor/pool_configurator.py`); tests compare
with it. Two sizings exist: an explicit `--swa-full-tokens-ratio` ties window slots to full tokens, otherwise (cap mode)
the window pool is sized from `--max-running-requests`.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsv4.model.config import LayerKind, V4Config
from dsv4.model.kv_layout import (
    SGLANG_PAGE_TOKENS,
    CacheFormats,
    IndexFormat,
    KvFormat,
    index_row,
    kv_row,
    round_up,
    sglang_compressed_bytes_per_entry,
    sglang_state_ring_rows,
    sglang_window_bytes_per_token,
    state_row,
)

EVICTION_INTERVAL = 128  # SGLANG_SWA_EVICTION_INTERVAL's default
PREFIX_TAILS_PER_REQUEST = 4  # cached prefixes that cap mode keeps resumable, per running request


@dataclass(frozen=True)
class SglangRequest:
    """What sizes the pool. max_running_requests and chunked_prefill_tokens are per attention-DP rank and per step.

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
    """Byte model of one rank's pool: `full_tokens * bytes_per_full_token + fixed_bytes`."""

    bytes_per_full_token: float
    bytes_per_window_token: float
    fixed_bytes: float
    window_tokens: int | None  # cap mode's window pool; None when tied to full tokens
    swa_full_tokens_ratio: float
    live_window_tokens_per_request: int
    window_tokens_in_flight: int

    def full_tokens(self, pool_bytes: float) -> int:
        """max_total_num_tokens that fits `pool_bytes`."""
        return int(max(pool_bytes - self.fixed_bytes, 0) / self.bytes_per_full_token) // SGLANG_PAGE_TOKENS * SGLANG_PAGE_TOKENS

    def bytes_for(self, full_tokens: int) -> float:
        """Pool bytes that hold `full_tokens` tokens."""
        return round_up(full_tokens, SGLANG_PAGE_TOKENS) * self.bytes_per_full_token + self.fixed_bytes

    def max_requests(self, full_tokens: int, context: int) -> float:
        """Requests of `context` tokens at once, by compressed KV and by window slots."""
        window = self.window_tokens
        if window is None:
            window = int(full_tokens * self.swa_full_tokens_ratio) // SGLANG_PAGE_TOKENS * SGLANG_PAGE_TOKENS
        by_window = (window - self.window_tokens_in_flight) / self.live_window_tokens_per_request
        return max(min(full_tokens / context, by_window), 0.0)


def sglang_pool(config: V4Config, formats: CacheFormats, request: SglangRequest, stage: range | None = None) -> SglangPool:
    """The pool of one rank of pipeline stage `stage` (default: the whole model)."""
    layers = [layer for layer in config.layers if stage is None or layer.index in stage]
    speculative = request.draft_tokens > 0
    # Both indexer dtypes are priced as FP8 on NVIDIA: the FP4 path keeps the FP8 estimate.
    index_bytes = index_row(config, CacheFormats(formats.kv, IndexFormat.FP8, formats.itemsize)).row_bytes
    window = sglang_window_bytes_per_token(config, formats) * len(layers)
    full = 0.0
    hca_state = 0.0
    slots = request.max_running_requests + 1
    for layer in layers:
        if layer.kind is LayerKind.SWA:
            continue
        full += sglang_compressed_bytes_per_entry(config, layer, formats) / layer.compress_ratio
        ring = sglang_state_ring_rows(layer, speculative)
        if layer.kind is LayerKind.CSA:
            full += index_bytes / layer.compress_ratio
            rows = state_row(layer, config.head_dim).row_bytes + state_row(layer, config.index_head_dim).row_bytes
            window += rows * ring / SGLANG_PAGE_TOKENS
        else:
            rows_allocated = round_up(slots * ring + ring + 1, 128)
            hca_state += rows_allocated * state_row(layer, config.head_dim).row_bytes
    # The engine prices the draft's pool as one more layer of the same mix.
    inflation = (len(layers) + 1) / len(layers) if speculative else 1.0
    window_tokens = None if request.swa_full_tokens_ratio is not None else _cap_window_tokens(config, request)
    ratio = request.swa_full_tokens_ratio or 0.0
    window *= inflation
    return SglangPool(
        bytes_per_full_token=full * inflation + ratio * window,
        bytes_per_window_token=window,
        fixed_bytes=hca_state + (window_tokens or 0) * window,
        window_tokens=window_tokens,
        swa_full_tokens_ratio=ratio,
        live_window_tokens_per_request=live_window_tokens(config, request),
        window_tokens_in_flight=_window_tokens_in_flight(request),
    )


def live_window_tokens(config: V4Config, request: SglangRequest) -> int:
    """Window slots that one decoding request may hold: the window, its eviction slack and the tokens being written."""
    draft = max(request.draft_tokens, 1)
    trailing = config.sliding_window + EVICTION_INTERVAL * draft + SGLANG_PAGE_TOKENS
    if request.draft_tokens == 0:
        return trailing + SGLANG_PAGE_TOKENS
    return trailing + 2 * request.draft_tokens  # overlap scheduling keeps two steps' allocations outstanding


def _window_tokens_in_flight(request: SglangRequest) -> int:
    chunks = 2 if request.overlap_schedule else 1
    return chunks * request.chunked_prefill_tokens + SGLANG_PAGE_TOKENS


def _cap_window_tokens(config: V4Config, request: SglangRequest) -> int:
    cap = live_window_tokens(config, request) * request.max_running_requests + _window_tokens_in_flight(request)
    tails = PREFIX_TAILS_PER_REQUEST * request.max_running_requests if request.radix_cache else 0
    return round_up(cap + tails * (config.sliding_window + SGLANG_PAGE_TOKENS), SGLANG_PAGE_TOKENS)


def historic_bytes_per_full_token(
    config: V4Config, swa_full_tokens_ratio: float, speculative: bool, extra_layers: int = 0, hca_state_in_window: bool = False
) -> float:
    """bytes_per_full_token of builds before 0.5.22, which public logs print; nothing here plans with it.

    They priced rows without page padding and did not inflate for a draft. extra_layers: draft layers counted as window
    layers. hca_state_in_window: builds of May 2026 priced the ratio-128 state per window page too.
    """
    formats = CacheFormats(KvFormat.FP8_DS_MLA, IndexFormat.FP8)
    row = kv_row(config, formats).row_bytes
    window = float(row * (config.num_hidden_layers + extra_layers))
    full = 0.0
    for layer in config.layers:
        if layer.kind is LayerKind.SWA:
            continue
        full += row / layer.compress_ratio
        state = state_row(layer, config.head_dim).row_bytes
        if layer.kind is LayerKind.CSA:
            full += index_row(config, formats).row_bytes / layer.compress_ratio
            state += state_row(layer, config.index_head_dim).row_bytes
        elif not hca_state_in_window:
            continue
        window += state * sglang_state_ring_rows(layer, speculative) / SGLANG_PAGE_TOKENS
    return swa_full_tokens_ratio * window + full
