# SPDX-License-Identifier: Apache-2.0
"""Every launch that serving can need, made once, so that no request waits for a compiler.

A kernel is compiled for the shapes and the storage of a deployment, and for the few choices that
depend on a step. Here each layer takes a few steps of tokens that belong to nobody: they read no
row, and write none. Engines call `warm_up` when their caches are allocated; `make kernels` compiles
what it launches.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dsv4.model.config import HCA_RATIO, LayerKind, LayerSpec, Routing, V4Config
from dsv4.model.kv_layout import (
    PAGE_TOKENS,
    WINDOW_PAGE_TOKENS,
    CacheFormats,
    CacheRole,
    IndexFormat,
    StateMapping,
    layer_caches,
)
from dsv4.ops import attention, indexer, mhc, moe, plan
from dsv4.ops.compressor import paged, summary
from dsv4.ops.compressor.projected import EntryInputs, EntryStep, Projected, entry_widths
from dsv4.ops.compressor.ring import RingState, compress_step
from dsv4.ops.kernels import processors
from dsv4.ops.pages import BatchView, Pages, PageTable, Selection, SlotMapping, row_storage, view_pages

_PAIRS = ((CacheRole.STATE, CacheRole.COMPRESSED), (CacheRole.INDEX_STATE, CacheRole.INDEX_KEY))


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """What of a deployment decides how kernels are compiled.

    tp: tensor-parallel ranks; the kernels see one's share
    dtype: of the activations
    max_context: tokens of the longest request
    routed_ids: dtype of the token ids where the engine leaves routing to us, else None
    drafted: tokens that a step may have to take back
    block: tokens that a DSpark draft proposes at once; 0 without one
    """

    config: V4Config
    tp: int
    dtype: torch.dtype
    device: torch.device
    mapping: StateMapping
    index_format: IndexFormat
    max_context: int
    routed_ids: torch.dtype | None
    drafted: int = 0
    block: int = 0


@dataclass(frozen=True)
class ServedLayer:
    """The caches of one layer, as the engine allocated them.

    pages: by role; those of `StateMapping.SUMMARY` hold summaries
    tails: fp32 [pages, tail_bytes / 4] behind the pages of entries
    """

    layer: LayerSpec
    pages: Mapping[CacheRole, Pages]
    tails: Mapping[CacheRole, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class NullStep:
    """A step of tokens that belong to nobody.

    context: the host's bound on the contexts; query_len: on one request's tokens in the step
    """

    tokens: int
    requests: int
    context: int
    query_len: int


def warm_up(model: ServedModel, layers: Sequence[ServedLayer]) -> float:
    """Launch all that serving can need; returns the seconds that it took, most of them to
    compile."""
    start = time.monotonic()
    steps = null_steps(model)
    for tokens in sorted({step.tokens for step in steps}):
        mix_streams(model, tokens)
        feed_forward(model, tokens)
    for step in steps:
        plan_step(model, layers, step)
        for layer in layers:
            attend(model, layer, step)
    if model.block:
        draft_block(model, layers[0].pages[CacheRole.WINDOW])
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.monotonic() - start


def null_steps(model: ServedModel) -> list[NullStep]:
    """The steps that between them meet every choice that a kernel's launch makes: one request, and
    enough tokens to fill the device without splitting any; every size of a row of scores."""
    contexts = {min(HCA_RATIO - 1, model.max_context), model.max_context}
    context = PAGE_TOKENS
    while context < model.max_context:
        contexts.add(context)
        context *= 2
    many = 2 * processors(model.device)
    short = min(4 * PAGE_TOKENS, model.max_context)
    return [
        *(NullStep(1, 1, context, 1) for context in sorted(contexts)),
        NullStep(many, many, short, 1),
        *(NullStep(tokens, 1, short, tokens) for tokens in (2, 16, many)),
    ]


# ---- what a step launches once ----------------------------------------------------------------


def plan_step(model: ServedModel, served: Sequence[ServedLayer], step: NullStep) -> None:
    """A step's plan. Where pages are vLLM's, how many groups of caches there are is for vLLM to
    say: here each kind of cache is one."""
    c, device = model.config, model.device
    frequencies = torch.zeros(c.qk_rope_head_dim // 2, device=device)
    plan.rope_tables(torch.zeros(step.tokens, dtype=torch.int64, device=device), frequencies, frequencies.clone())
    table, is_ring = (
        _int32(step.requests, _columns(model.max_context), device=device),
        model.mapping is StateMapping.RING,
    )
    layers = {layer.compress_ratio: layer for layer in c.layers if layer.kind is not LayerKind.SWA}
    caches: list[plan.Cache] = [
        plan.WindowCache(table, PAGE_TOKENS if is_ring else WINDOW_PAGE_TOKENS, c.sliding_window)
    ]
    for ratio in sorted(layers):
        topk = None if ratio == HCA_RATIO else c.index_topk
        caches.append(plan.EntryCache(table, PAGE_TOKENS, ratio, model.max_context, topk))
    homes, batch = None, _batch(model, step)
    if is_ring:
        # SGLang's own dtypes.
        requests, places = (torch.zeros(n, dtype=torch.int64, device=device) for n in (step.requests, step.tokens))
        batch, homes = replace(batch, seq_lens=batch.seq_lens.long()), plan.Homes(places, PAGE_TOKENS)
        kept, columns = _int32(2, model.max_context, device=device), _columns(step.context)
        plan.page_tables(kept, requests, places, table, table.clone(), page_tokens=PAGE_TOKENS, columns=columns)
        for ratio in sorted(layers) if step.query_len == 1 else ():
            owners, of = (requests[:, None], model.max_context + 1) if ratio == HCA_RATIO else (table, PAGE_TOKENS)
            caches.append(plan.Rings(owners, of, ratio, layers[ratio].overlap))
    elif model.mapping is StateMapping.PAGED:
        rows = {of.pages[role].rows for of in served for role, _ in _PAIRS if role in of.pages}
        caches += [plan.RowCache(table, n) for n in sorted(rows)]
    plan.planned(batch, caches, homes)


def draft_block(model: ServedModel, window: Pages) -> None:
    """What a DSpark draft launches that the backbone does not: a block's plan, and rows of the
    context without queries."""
    c, device, tokens = model.config, model.device, model.block
    batch = _batch(model, NullStep(tokens, 1, model.max_context, tokens))
    table = _int32(1, _columns(model.max_context), device=device)
    plan.planned(batch, [plan.BlockCache(table, window.rows, c.sliding_window, model.block)])
    kv, nowhere = _zeros(model, tokens, c.head_dim), torch.full((tokens,), -1, dtype=torch.int32, device=device)
    angles, mapping = torch.zeros(tokens, c.qk_rope_head_dim, device=device), SlotMapping(window, nowhere)
    attention.norm_rope_store(kv[:, None], kv, _zeros(model, c.head_dim), c.rms_norm_eps, angles, mapping)


# ---- what one layer launches ---------------------------------------------------------------


def attend(model: ServedModel, served: ServedLayer, step: NullStep) -> None:
    """What a layer's attention launches in a step."""
    c, layer, device, n = model.config, served.layer, model.device, step.tokens
    heads = c.num_attention_heads // model.tp
    q, kv = _zeros(model, n, heads, c.head_dim), _zeros(model, n, c.head_dim)
    table, window = torch.zeros(n, c.qk_rope_head_dim, device=device), served.pages[CacheRole.WINDOW]
    weight = _zeros(model, c.head_dim)
    nowhere, nothing = torch.full((n,), -1, dtype=torch.int32, device=device), _int32(n, device=device)
    q = attention.norm_rope_store(q, kv, weight, c.rms_norm_eps, table, SlotMapping(window, nowhere))
    entries = None
    if layer.kind is not LayerKind.SWA:
        _pool(model, served, step, nowhere)
        entries = _entries(model, served, step)
    own = Selection(window, _int32(n, c.sliding_window, device=device), nothing)
    attention.sparse_attention(q, own, entries, torch.zeros(heads, device=device), table)


def _pool(model: ServedModel, served: ServedLayer, step: NullStep, nowhere: Tensor) -> None:
    """Pooling into all caches of a compressed layer."""
    c, layer, device = model.config, served.layer, model.device
    batch = _batch(model, step)
    tokens = plan.plan_tokens(batch)
    entry_step = EntryStep(
        positions=tokens.positions,
        request_of_token=tokens.request_of_token,
        ratio=layer.compress_ratio,
        overlap=layer.overlap,
        eps=c.rms_norm_eps,
        entry_cos_sin=torch.zeros(step.tokens, c.qk_rope_head_dim, device=device),
    )
    inputs = _entry_inputs(model, layer, step.tokens)
    given = zip(_PAIRS, ((inputs.kv_gate, c.head_dim), (inputs.index_kv_gate, c.index_head_dim)), strict=True)
    caches = [
        (_projected(model, layer, dim, kv_gate), windows, entries)
        for (windows, entries), (kv_gate, dim) in given
        if kv_gate is not None
    ]
    pages, table = served.pages, _int32(step.requests, _columns(model.max_context), device=device)
    if model.mapping is StateMapping.SUMMARY:
        states = [
            summary.SummaryState(
                projected,
                kept=summary.SummaryPages.view(
                    pages[windows].data[:, 0], layer.overlap, projected.norm_weight.shape[0]
                ),
                state_page=table[:, 0],
                tail=served.tails[entries].unflatten(-1, (3, -1)) if entries in served.tails else None,
                block_table=table,
                entries=SlotMapping(pages[entries], nowhere),
            )
            for projected, windows, entries in caches
        ]
        summary.compress(states, entry_step, batch)
    elif model.mapping is StateMapping.PAGED:
        rows = [
            paged.PagedState(
                projected,
                rows=SlotMapping(pages[windows], nowhere),
                block_table=table,
                entries=SlotMapping(pages[entries], nowhere),
            )
            for projected, windows, entries in caches
        ]
        paged.update(rows, entry_step, shared=step.query_len > 1)
    else:
        rings = plan.Rings(table, PAGE_TOKENS, layer.compress_ratio, windows=layer.overlap)
        ring_plan = plan.plan_many(rings, tokens, batch) if step.query_len > 1 else rings.empty(batch, plan.Room(batch))
        compress_step(
            [
                RingState(
                    projected,
                    pages[windows],
                    _scratch(pages[windows], ring_plan.num_pages) if ring_plan.num_pages else None,
                    SlotMapping(pages[entries], nowhere),
                )
                for projected, windows, entries in caches
            ],
            ring_plan,
            entry_step,
        )


def _entries(model: ServedModel, served: ServedLayer, step: NullStep) -> Selection:
    """The entries that the tokens attend: all of them, or those that an indexer chooses."""
    c, layer, device, n = model.config, served.layer, model.device, step.tokens
    pages, owner, lens = served.pages[CacheRole.COMPRESSED], _int32(n, device=device), _int32(n, device=device)
    max_entries = step.context // layer.compress_ratio
    if layer.kind is LayerKind.HCA:
        return Selection(pages, _int32(step.requests, max_entries, device=device), lens, owner)
    weights = _entry_inputs(model, layer, n).index_weights
    assert weights is not None
    query = indexer.prepare_query(
        _zeros(model, n, c.index_n_heads, c.index_head_dim),
        weights,
        torch.zeros(n, c.qk_rope_head_dim, device=device),
        model.index_format,
    )
    table = _int32(step.requests, _columns(step.context), device=device)
    keys, entries = PageTable(served.pages[CacheRole.INDEX_KEY], table), PageTable(pages, table)
    return indexer.select(query, keys, entries, owner, lens, max_entries=max_entries, k=c.index_topk)


def mix_streams(model: ServedModel, tokens: int) -> None:
    """What the hyper-connections launch: at the first site, between two, and at the end."""
    c, streams = model.config, _zeros(model, tokens, model.config.hc_mult, model.config.hidden_size)
    at = mhc.pre(streams, _site(model))
    at = mhc.pre(at.pending(at.x), _site(model))
    mhc.head(mhc.post(at.pending(at.x)), _site(model, rows=c.hc_mult, scales=1))


def feed_forward(model: ServedModel, tokens: int) -> None:
    """What the feed-forward half of a layer launches beside the engine's own kernels."""
    c, device = model.config, model.device
    width = c.moe_intermediate_size * c.n_shared_experts // model.tp
    gate, up = _zeros(model, tokens, 2 * width).chunk(2, -1)
    moe.swiglu(gate, up, c.swiglu_limit)
    if model.routed_ids is None:
        return
    scores, factor = torch.zeros(tokens, c.n_routed_experts, device=device), c.routed_scaling_factor
    moe.route_topk(scores, torch.zeros(c.n_routed_experts, device=device), c.num_experts_per_tok, factor)
    if any(layer.routing is Routing.HASH for layer in c.layers):
        table = _int32(c.vocab_size, c.num_experts_per_tok, device=device)
        moe.route_hash(scores, table, torch.zeros(tokens, dtype=model.routed_ids, device=device), factor)


# ---- their arguments -----------------------------------------------------------------------


def _zeros(model: ServedModel, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=model.dtype, device=model.device)


def _int32(*shape: int, device: torch.device) -> Tensor:
    return torch.zeros(shape, dtype=torch.int32, device=device)


def _batch(model: ServedModel, step: NullStep) -> BatchView:
    return BatchView(
        _int32(step.requests + 1, device=model.device),
        _int32(step.requests, device=model.device),
        step.tokens,
        step.requests,
        step.context,
        step.query_len,
    )


def _columns(context: int) -> int:
    return -(-context // PAGE_TOKENS)


def _entry_inputs(model: ServedModel, layer: LayerSpec, tokens: int) -> EntryInputs:
    widths = entry_widths(model.config, layer)
    return EntryInputs.split(torch.zeros(tokens, sum(widths), device=model.device), widths)


def _projected(model: ServedModel, layer: LayerSpec, dim: int, kv_gate: Tensor) -> Projected:
    kv, gate = kv_gate.chunk(2, -1)
    ape = torch.zeros(layer.compress_ratio, layer.overlap * dim, device=model.device)
    return Projected(kv, gate, ape, _zeros(model, dim))


def _scratch(rings: Pages, num_pages: int) -> Pages:
    return Pages(rings.data.new_zeros(num_pages, *rings.data.shape[1:]), rings.rows, rings.format)


def _site(model: ServedModel, rows: int | None = None, scales: int = 3) -> mhc.Site:
    c, n = model.config, model.config.hc_mult
    rows = n * (2 + n) if rows is None else rows
    return mhc.Site(
        torch.zeros(rows, n * c.hidden_size, device=model.device),
        torch.zeros(rows, device=model.device),
        torch.zeros(scales, device=model.device),
        _zeros(model, c.hidden_size),
        rms_eps=c.rms_norm_eps,
        hc_eps=c.hc_eps,
        iters=c.hc_sinkhorn_iters,
    )


def allocate(model: ServedModel, formats: CacheFormats, num_pages: int = 2) -> list[ServedLayer]:
    """One layer of each kind that the model has, with caches of its own: where no engine has
    allocated any."""
    return [
        _allocate(model, formats, next(layer for layer in model.config.layers if layer.kind is kind), num_pages)
        for kind in LayerKind
        if model.config.count(kind)
    ]


def _allocate(model: ServedModel, formats: CacheFormats, layer: LayerSpec, num_pages: int) -> ServedLayer:
    pages, tails = {}, {}
    for spec in layer_caches(model.config, layer, formats, model.mapping, model.drafted):
        row_format, dtype = row_storage(spec.role, formats, model.dtype)
        memory = torch.zeros(num_pages, spec.page_bytes, dtype=torch.uint8, device=model.device)
        rows = memory[:, : spec.tail_offset].view(dtype).unflatten(1, (spec.rows_per_page, -1))
        pages[spec.role] = view_pages(rows, spec, row_format)
        if spec.tail_bytes:
            tails[spec.role] = memory[:, spec.tail_offset : spec.tail_offset + spec.tail_bytes].view(torch.float32)
    return ServedLayer(layer, pages, tails)
