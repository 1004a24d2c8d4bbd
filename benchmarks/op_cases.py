# SPDX-License-Identifier: Apache-2.0
"""What bench_ops.py runs: every kernel at the sizes of Flash and Pro, with its reference, its bytes
and FLOPs, and its peers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import op_peers
import torch
from torch import Tensor

from dsv4.model.kv_layout import IndexFormat, KvFormat, round_up
from dsv4.ops import plan
from dsv4.ops.attention import reference as attention_reference
from dsv4.ops.attention import triton as attention
from dsv4.ops.compressor.paged import PagedState
from dsv4.ops.compressor.paged import reference as compressor_twin
from dsv4.ops.compressor.paged import triton as compressor
from dsv4.ops.compressor.projected import EntryStep, Projected
from dsv4.ops.compressor.summary import SummaryPages, SummaryState
from dsv4.ops.compressor.summary import reference as summary_twin
from dsv4.ops.compressor.summary import triton as summary
from dsv4.ops.indexer import reference as indexer_reference
from dsv4.ops.indexer import triton as indexer
from dsv4.ops.mhc import reference as mhc_reference
from dsv4.ops.mhc import triton as mhc
from dsv4.ops.mhc.site import PendingPost, Site, SublayerInput
from dsv4.ops.moe import mxfp4
from dsv4.ops.moe import reference as moe_reference
from dsv4.ops.moe import triton as moe
from dsv4.ops.pages import BatchView, Pages, PageTable, RowsFormat, Selection, SlotMapping
from dsv4.ops.plan import reference as plan_twin
from dsv4.ops.plan import triton as plan_kernels
from dsv4.ops.plan.caches import entry_slot_mapping
from dsv4.ops.plan.tokens import plan_tokens
from dsv4.ops.rope import cos_sin

Call = Callable[[], Any]


@dataclass(frozen=True)
class Model:
    """The sizes of one checkpoint that kernels see, on one rank."""

    name: str
    hidden: int
    heads: int
    topk: int
    experts: int
    intermediate: int


FLASH = Model("flash", 4096, 64, 512, 256, 2048)
PRO = Model("pro", 7168, 128, 1024, 384, 3072)
TINY = Model("tiny", 256, 8, 16, 8, 256)


@dataclass
class Case:
    """One measurement. kernel, reference: without arguments; what they return is compared after
    `read`, as `compare` says.

    bytes_moved: what must be read and written once; flops: of matrix products; peers: other
    implementations by name.
    served: whether the kernel ever serves on this device; of one that does not, no speed is asked.
    """

    kernel: Call
    reference: Call
    bytes_moved: int
    flops: int = 0
    peers: dict[str, op_peers.Peer] = field(default_factory=dict)
    compare: str = "close"  # close | bytes | sets
    read: Callable[[Any], Any] = lambda result: result
    served: bool = True


@dataclass(frozen=True)
class Plan:
    """A case by name, model and sizes (T tokens, N entries, K keys, R ratio), built only when its
    turn comes."""

    name: str
    model: str
    sizes: Mapping[str, int]
    build: Callable[[], Case]

    def __str__(self) -> str:
        return f"{self.name} {self.model} {' '.join(f'{k}={v}' for k, v in self.sizes.items())}"


def plans(device: str, small: bool) -> list[Plan]:
    """Every case, in the order of the run. small: sizes for Triton's interpreter."""
    return [plan for m in ((TINY,) if small else (FLASH, PRO)) for plan in _plans(m, torch.device(device), small)]


def _plans(m: Model, device: torch.device, small: bool) -> Iterator[Plan]:
    def case(build: Callable[..., Case], name: str, *args: Any, **sizes: int) -> Plan:
        return Plan(name, m.name, sizes, lambda: build(m, *sizes.values(), *args, device))

    fp8, mxfp4_keys, plain_keys = IndexFormat.FP8, IndexFormat.MXFP4, IndexFormat.PLAIN
    for t in (2,) if small else (1, 64, 257, 8192):
        yield case(_norm_rope_store, "norm_rope_store", KvFormat.FP8_DS_MLA, T=t)
        yield case(_prepare_query, "prepare_query", fp8, T=t)
        yield case(_mhc_pre, "mhc.pre", T=t)
        yield case(_mhc_post, "mhc.post", T=t)
        yield case(_mhc_post_pre, "mhc.post_pre", T=t)
        yield case(_mhc_head, "mhc.head", T=t)
        yield case(_route_topk, "route_topk", T=t)
        yield case(_route_hash, "route_hash", T=t)
        yield case(_swiglu, "swiglu", T=t)
        yield case(_output_a, "output_a", T=t)
    yield case(_norm_rope_store, "norm_rope_store plain", KvFormat.PLAIN, T=2 if small else 257)
    for index_format in (mxfp4_keys, plain_keys):
        yield case(_prepare_query, f"prepare_query {index_format.value}", index_format, T=2 if small else 257)
    for kind, ratio in (("csa", 4), ("hca", 128)):
        yield case(_compressor, f"compressor.update {kind}", ratio, T=2 * ratio if small else 8192)
        yield case(_summary, f"summary.compress {kind}", ratio, T=2 * ratio if small else 8192)
        for t in (2,) if small else (1, 64, 257):
            yield case(_summary_decode, f"summary.compress decode {kind}", ratio, T=t)
    decode = ((2, 70),) if small else ((1, 262_144), (8, 262_144), (8, 32_768), (64, 8192))
    for t, n in decode:
        yield case(_logits, "index.logits decode", fp8, T=t, N=n)
        yield case(_topk, "topk", T=t, N=n)
    for index_format in (mxfp4_keys, plain_keys):
        t, n = decode[-1]
        yield case(_logits, f"index.logits decode {index_format.value}", index_format, T=t, N=n)
    t, n = (16, 70) if small else (1024, 32_768)
    yield case(_prefill_logits, "index.logits prefill", fp8, T=t, N=n)
    yield case(_prefill_logits, f"index.logits prefill {mxfp4_keys.value}", mxfp4_keys, T=t, N=n)
    for t in (2,) if small else (1, 8, 64, 256, 4096):
        yield case(_sparse, "sparse csa", KvFormat.FP8_DS_MLA, T=t, K=m.topk)
    for t in (2,) if small else (1, 8, 64):
        yield case(_sparse, "sparse hca", KvFormat.FP8_DS_MLA, T=t, K=40 if small else 8192)
    yield case(_sparse, "sparse csa plain", KvFormat.PLAIN, T=2 if small else 64, K=m.topk)
    for t in (2,) if small else (1, 64, 257):
        yield case(_ragged_sparse, "sparse ragged", T=t, K=m.topk)
        yield case(_ragged_logits, "index.logits ragged", T=t, N=200 if small else 8192)
    for t, n in ((2, 260),) if small else ((1, 1 << 20), (64, 1 << 17), (256, 8192)):
        yield case(_plan_step, "plan.step", T=t, N=n)
        yield case(_page_tables, "plan.page_tables", T=t, N=n)
    for t in (2,) if small else (1, 64, 8192):
        yield case(_rope_tables, "plan.rope_tables", T=t)
    for t in (2,) if small else (1, 64, 1024):
        yield case(_experts, "experts_mxfp4", T=t)


# ---- memory --------------------------------------------------------------------------------

NAN = 0xFF  # as a byte of every number of a format, NaN


def make_pages(row_format: RowsFormat, num_pages: int, rows: int, device: torch.device) -> Pages:
    """Pages of random rows, about normally distributed."""
    dim = 512 if isinstance(row_format, KvFormat) else 128
    if row_format in (KvFormat.PLAIN, IndexFormat.PLAIN):
        return Pages(torch.randn(num_pages, rows, dim, device=device).bfloat16(), rows, row_format)
    if row_format is KvFormat.FP8_DS_MLA:
        values = torch.cat([_codes((num_pages, rows, 448), device), _bf16_bytes((num_pages, rows, 64), device)], -1)
        scales = torch.full((num_pages, rows, 8), 127, dtype=torch.uint8, device=device)
    elif row_format is IndexFormat.FP8:
        values = _codes((num_pages, rows, 128), device)
        scales = torch.full((num_pages, rows, 1), 0.5, device=device).view(torch.uint8)
    else:
        values = torch.randint(0, 256, (num_pages, rows, 64), dtype=torch.uint8, device=device)
        scales = torch.randint(125, 129, (num_pages, rows, 4), dtype=torch.uint8, device=device)
    page = torch.cat([values.flatten(1), scales.flatten(1)], 1)
    data = torch.zeros(num_pages, round_up(page.shape[1], 576), dtype=torch.uint8, device=device)
    data[:, : page.shape[1]] = page
    return Pages(data, rows, row_format)


def _codes(shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.randn(shape, device=device).to(torch.float8_e4m3fn).view(torch.uint8)


def _bf16_bytes(shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.randn(shape, device=device).bfloat16().view(torch.uint8)


def table_rows(num_tokens: int, device: torch.device) -> Tensor:
    return cos_sin(
        torch.randint(0, 1_000_000, (num_tokens,), device=device), 1e4 ** (-torch.arange(0, 64, 2, device=device) / 64)
    )


# ---- cases: each takes the model, its sizes, what else it needs, and the device ------------


def _norm_rope_store(m: Model, t: int, row_format: KvFormat, device: torch.device) -> Case:
    q, kv = torch.randn(t, m.heads, 512, device=device).bfloat16(), torch.randn(t, 512, device=device).bfloat16()
    pages = make_pages(row_format, t // 64 + 1, 64, device)
    again = Pages(pages.data.clone(), 64, row_format)
    slots, weight, table = torch.randperm(t, device=device).int(), torch.rand(512, device=device), table_rows(t, device)

    def run(op: Callable[..., Tensor], to: Pages) -> tuple[Tensor, Tensor]:
        return op(q, kv, weight, 1e-6, table, SlotMapping(to, slots)), to.data

    row_bytes = 584 if row_format is KvFormat.FP8_DS_MLA else 1024
    return Case(
        lambda: run(attention.norm_rope_store, pages), lambda: run(attention_reference.norm_rope_store, again),
        4 * q.numel() + 2 * kv.numel() + t * (row_bytes + 256 + 4), compare="bytes",
    )  # fmt: skip


def _output_a(m: Model, t: int, device: torch.device) -> Case:
    o, table = torch.randn(t, m.heads, 512, device=device).bfloat16(), table_rows(t, device)
    wo_a = torch.randn(m.heads // 8, 1024, 8 * 512, device=device).bfloat16() / 64
    args = (o, table, wo_a)
    moved = 2 * (o.numel() + wo_a.numel() + t * wo_a.shape[0] * 1024)
    return Case(
        lambda: attention.output_a(*args), lambda: attention_reference.output_a(*args), moved, 2 * t * wo_a.numel()
    )


def _prepare_query(m: Model, t: int, index_format: IndexFormat, device: torch.device) -> Case:
    q, w, table = (
        torch.randn(t, 64, 128, device=device).bfloat16(),
        torch.randn(t, 64, device=device).bfloat16(),
        table_rows(t, device),
    )

    def run(op: Callable[..., Any]) -> list[Tensor]:
        query = op(q, w, table, index_format)
        return [x for x in (query.values, query.weights, query.scales) if x is not None]

    out = {IndexFormat.FP8: 128, IndexFormat.MXFP4: 68, IndexFormat.PLAIN: 256}[index_format]
    moved = t * 64 * (256 + out + 2 + 4) + 256 * t
    return Case(
        lambda: run(indexer.prepare_query), lambda: run(indexer_reference.prepare_query), moved, compare="bytes"
    )


def _streams(m: Model, t: int, device: torch.device) -> Tensor:
    return torch.randn(t, 4, m.hidden, device=device).bfloat16()


def _site(m: Model, device: torch.device, rows: int = 24, scales: int = 3) -> Site:
    fn = torch.randn(rows, 4 * m.hidden, device=device) * (4 * m.hidden) ** -0.5
    base, scale, weight = (
        torch.randn(rows, device=device),
        torch.rand(scales, device=device),
        torch.rand(m.hidden, device=device),
    )
    return Site(fn, base, scale, weight, rms_eps=1e-6, hc_eps=1e-6, iters=20)


def _pending(m: Model, t: int, device: torch.device) -> PendingPost:
    y = torch.randn(t, m.hidden, device=device).bfloat16()
    return PendingPost(_streams(m, t, device), y, torch.rand(t, 4, device=device), torch.rand(t, 4, 4, device=device))


def _made(made: SublayerInput) -> tuple[Tensor, ...]:
    return made.streams, made.x, made.post, made.comb


def _mhc_pre(m: Model, t: int, device: torch.device) -> Case:
    streams, site = _streams(m, t, device), _site(m, device)
    moved = t * m.hidden * 2 * 5 + site.fn.numel() * 4 + t * 80
    flops = 2 * t * 24 * 4 * m.hidden
    return Case(lambda: mhc.pre(streams, site), lambda: mhc_reference.pre(streams, site), moved, flops, read=_made)


def _mhc_post(m: Model, t: int, device: torch.device) -> Case:
    pending = _pending(m, t, device)
    return Case(lambda: mhc.post(pending), lambda: mhc_reference.post(pending), t * (m.hidden * 2 * 9 + 80))


def _mhc_post_pre(m: Model, t: int, device: torch.device) -> Case:
    pending, site = _pending(m, t, device), _site(m, device)
    moved = t * (m.hidden * 2 * 10 + 160) + site.fn.numel() * 4
    flops = 2 * t * 24 * 4 * m.hidden
    return Case(
        lambda: mhc.post_pre(pending, site), lambda: mhc_reference.post_pre(pending, site), moved, flops, read=_made
    )


def _mhc_head(m: Model, t: int, device: torch.device) -> Case:
    streams, site = _streams(m, t, device), _site(m, device, rows=4, scales=1)
    return Case(
        lambda: mhc.head(streams, site), lambda: mhc_reference.head(streams, site), t * m.hidden * 10 + 64 * m.hidden
    )


def _route_topk(m: Model, t: int, device: torch.device) -> Case:
    args = (torch.randn(t, m.experts, device=device), torch.randn(m.experts, device=device), 6, 2.5)
    return Case(lambda: moe.route_topk(*args), lambda: moe_reference.route_topk(*args), t * (4 * m.experts + 48))


def _route_hash(m: Model, t: int, device: torch.device) -> Case:
    table = torch.randint(0, m.experts, (129_280, 6), dtype=torch.int32, device=device)
    args = (torch.randn(t, m.experts, device=device), table, torch.randint(0, 129_280, (t,), device=device), 2.5)
    return Case(lambda: moe.route_hash(*args), lambda: moe_reference.route_hash(*args), t * (8 + 4 * 32 + 24 + 48))


def _swiglu(m: Model, t: int, device: torch.device) -> Case:
    gate, up = torch.randn(t, 2 * m.intermediate, device=device).bfloat16().chunk(2, -1)
    return Case(
        lambda: moe.swiglu(gate, up, 10.0), lambda: moe_reference.swiglu(gate, up, 10.0), 6 * t * m.intermediate
    )


def _experts(m: Model, t: int, device: torch.device) -> Case:
    """On NVIDIA its kernels only have to be right: there the engines serve by Marlin, which is the
    peer."""
    e, d, i, k = m.experts, m.hidden, m.intermediate, min(6, m.experts)
    w13, w2 = (torch.randint(0, 256, s, dtype=torch.uint8, device=device) for s in ((e, 2 * i, d // 2), (e, d, i // 2)))
    s13, s2 = (
        torch.randint(117, 121, s, dtype=torch.uint8, device=device) for s in ((e, 2 * i, d // 32), (e, d, i // 32))
    )
    x, weights = torch.randn(t, d, device=device).bfloat16(), torch.rand(t, k, device=device)
    ids = torch.rand(t, e, device=device).argsort(-1)[:, :k].int()
    args = (x, w13, s13, w2, s2, weights, ids, 10.0)
    moved = ids.unique().numel() * 3 * i * d * 17 // 32 + 4 * t * d
    return Case(
        lambda: mxfp4.experts_mxfp4(*args), lambda: moe_reference.experts_mxfp4(*args), moved, 6 * t * k * d * i,
        {"marlin": op_peers.marlin(x, e, i, weights, ids, 10.0)}, served=torch.version.hip is not None,
    )  # fmt: skip


# Head dim, format and row bytes of the caches that a layer pools into.
_POOLED: dict[int, list[tuple[int, RowsFormat, int]]] = {
    4: [(512, KvFormat.FP8_DS_MLA, 584), (128, IndexFormat.FP8, 132)],
    128: [(512, KvFormat.FP8_DS_MLA, 584)],
}


def _projected(t: int, ratio: int, dim: int, device: torch.device) -> Projected:
    width = (2 if ratio == 4 else 1) * dim
    kv, gate, ape = (torch.randn(n, width, device=device) for n in (t, t, ratio))
    return Projected(kv, gate, ape, torch.rand(dim, device=device))


def _entry_step(positions: Tensor, request_of_token: Tensor, ratio: int) -> EntryStep:
    freq = 1.6e5 ** (-torch.arange(0, 64, 2, device=positions.device) / 64)
    return EntryStep(
        positions=positions,
        request_of_token=request_of_token,
        ratio=ratio,
        overlap=2 if ratio == 4 else 1,
        eps=1e-6,
        entry_cos_sin=cos_sin(positions // ratio * ratio, freq),
    )


def _copy(pages: Pages) -> Pages:
    return Pages(pages.data.clone(), pages.rows, pages.format)


def _copied(mapping: SlotMapping) -> SlotMapping:
    return SlotMapping(_copy(mapping.pages), mapping.slots)


def _pooled_bytes(t: int, ratio: int, factor: int) -> int:
    """factor: how often a token's fp32 row of one projection is read or written."""
    overlap = 2 if ratio == 4 else 1
    return sum(t * overlap * dim * 4 * factor + t // ratio * row_bytes for dim, _, row_bytes in _POOLED[ratio])


def _compressor(m: Model, t: int, ratio: int, device: torch.device) -> Case:
    """A prefill of one request from its first token, into all caches of a layer."""
    overlap, state_rows = (2, 4) if ratio == 4 else (1, 8)
    positions = torch.arange(t, device=device)
    request, table = (
        torch.zeros(t, dtype=torch.int32, device=device),
        torch.arange(t // state_rows, dtype=torch.int32, device=device)[None],
    )
    entry_slots = torch.where((positions + 1) % ratio == 0, positions // ratio, -1).int()
    step = _entry_step(positions, request, ratio)
    ours = []
    for dim, row_format, _ in _POOLED[ratio]:
        rows = torch.zeros(t // state_rows, state_rows, 2 * overlap * dim, device=device)
        state = Pages(rows, state_rows, KvFormat.PLAIN)
        cache = make_pages(row_format, t // 256 + 1, 256 // ratio, device)
        rows = SlotMapping(state, positions.int())
        ours.append(PagedState(_projected(t, ratio, dim, device), rows, table, SlotMapping(cache, entry_slots)))
    twins = [replace(to, rows=_copied(to.rows), entries=_copied(to.entries)) for to in ours]

    def run(op: Callable[..., None], states: list[PagedState]) -> list[Tensor]:
        op(states, step)
        return [x for to in states for x in (to.rows.pages.data, to.entries.pages.data)]

    moved = _pooled_bytes(t, ratio, 4)
    return Case(
        lambda: run(compressor.update, ours), lambda: run(compressor_twin.update, twins), moved, compare="bytes"
    )


def _summary(m: Model, t: int, ratio: int, device: torch.device) -> Case:
    """The same with open windows kept as summaries."""
    return _summarise(ratio, torch.tensor([0, t], device=device), torch.tensor([t], device=device), t)


def _summary_decode(m: Model, t: int, ratio: int, device: torch.device) -> Case:
    """One token of each request, at a page's start: elsewhere a call changes what the next one
    reads, and none could be compared."""
    return _summarise(ratio, torch.arange(t + 1, device=device), torch.full((t,), 257, device=device), 1)


def _summarise(ratio: int, starts: Tensor, seq_lens: Tensor, longest: int) -> Case:
    num_reqs, t, device = seq_lens.shape[0], int(starts[-1]), starts.device
    context = int(seq_lens.max())
    batch = BatchView(starts.int(), seq_lens.int(), t, num_reqs, context, longest)
    tokens = plan_tokens(batch)
    pages = context // 256 + 1
    table = torch.arange(num_reqs * pages, dtype=torch.int32, device=device).view(num_reqs, pages)
    overlap, entry_slots = (2 if ratio == 4 else 1), entry_slot_mapping(table, tokens, 256 // ratio, ratio)
    step = _entry_step(tokens.positions, tokens.request_of_token, ratio)
    ours = []
    for dim, row_format, _ in _POOLED[ratio]:
        state = SummaryState(
            _projected(t, ratio, dim, device),
            kept=SummaryPages(torch.zeros(num_reqs, overlap, 3, dim, device=device)),
            state_page=torch.arange(num_reqs, dtype=torch.int32, device=device),
            tail=torch.zeros(num_reqs * pages, 3, dim, device=device) if overlap == 2 else None,
            block_table=table,
            entries=SlotMapping(make_pages(row_format, num_reqs * pages, 256 // ratio, device), entry_slots),
        )
        ours.append(state)
    twins = [
        replace(
            to,
            kept=to.kept.clone(),
            tail=None if to.tail is None else to.tail.clone(),
            entries=_copied(to.entries),
        )
        for to in ours
    ]

    def run(op: Callable[..., None], states: list[SummaryState]) -> list[Tensor]:
        op(states, step, batch)
        return [x for to in states for x in (to.kept.summaries, to.tail, to.entries.pages.data) if x is not None]

    moved = _pooled_bytes(t, ratio, 2) + sum(num_reqs * overlap * dim * 12 for dim, *_ in _POOLED[ratio])
    return Case(lambda: run(summary.compress, ours), lambda: run(summary_twin.compress, twins), moved, compare="bytes")


def _plan_step(m: Model, t: int, context: int, device: torch.device) -> Case:
    """One token of each of t requests, which are all as long: the groups of caches that vLLM makes
    of a model, and SGLang's rings."""
    ends, lens = torch.arange(t + 1, device=device).int(), torch.full((t,), context, dtype=torch.int32, device=device)
    batch = BatchView(ends, lens, t, t, context, 1)

    def table(page_tokens: int) -> Tensor:
        columns = -(-context // page_tokens)
        return torch.randperm(t * columns, device=device).int().view(t, columns)

    pages = table(256)
    caches: list[plan.Cache] = [
        *(plan.WindowCache(table(64), 64, 128) for _ in range(2)),
        *(plan.EntryCache(table(256), 256, 4, context, m.topk) for _ in range(2)),
        plan.EntryCache(pages, 256, 128, context, None),
        plan.RowCache(table(8), 8),
        plan.Rings(pages, 256, 4, 2),
    ]
    rooms = [plan.Room(batch) for _ in range(2)]
    made = [
        plan.StepPlan(plan.TokenPlan.empty(room), tuple(cache.empty(batch, room) for cache in caches)) for room in rooms
    ]
    written = [x for x in _tensors(made[0]) if x is not pages]

    def run(op: Callable[..., None], to: plan.StepPlan) -> list[Tensor]:
        op(batch, caches, to)
        return _tensors(to)

    return Case(
        lambda: run(plan_kernels.step, made[0]),
        lambda: run(plan_twin.step, made[1]),
        2 * sum(x.numel() * x.element_size() for x in written),
        compare="bytes",
    )


def _tensors(value: Any) -> list[Tensor]:
    """All of a plan's, in order."""
    if isinstance(value, Tensor):
        return [value]
    inside = value if isinstance(value, tuple) else vars(value).values() if hasattr(value, "__dict__") else ()
    return [tensor for each in inside for tensor in _tensors(each)]


def _page_tables(m: Model, t: int, context: int, device: torch.device) -> Case:
    places = torch.randint(0, 1 << 20, (t, context), dtype=torch.int32, device=device)
    requests, to_window = torch.randperm(t, device=device), torch.randint(0, 1 << 17, (1 << 20,), device=device)
    columns = -(-context // 256)
    made = [[torch.zeros(t, columns, dtype=torch.int32, device=device) for _ in range(2)] for _ in range(2)]

    def run(op: Callable[..., None], to: list[Tensor]) -> list[Tensor]:
        op(places, requests, to_window, *to, page_tokens=256, columns=columns)
        return to

    return Case(
        lambda: run(plan_kernels.page_tables, made[0]),
        lambda: run(plan_twin.page_tables, made[1]),
        t * columns * 20,
        compare="bytes",
    )


def _rope_tables(m: Model, t: int, device: torch.device) -> Case:
    positions = torch.randint(0, 1 << 20, (t,), device=device)
    freq, other = (theta ** (-torch.arange(0, 64, 2, device=device) / 64) for theta in (1e4, 1.6e5))

    def run(op: Callable[..., plan.RopeTables]) -> list[Tensor]:
        made = op(positions, freq, other)
        return [made.window, made.compressed, *made.entry.values()]

    return Case(lambda: run(plan_kernels.rope_tables), lambda: run(plan_twin.rope_tables), t * (8 + 4 * 256))


def _index_query(t: int, index_format: IndexFormat, device: torch.device) -> Any:
    weights = torch.randn(t, 64, device=device)
    return indexer.prepare_query(
        torch.randn(t, 64, 128, device=device).bfloat16(), weights, table_rows(t, device), index_format
    )


def _index_bytes(index_format: IndexFormat) -> int:
    return {IndexFormat.FP8: 132, IndexFormat.MXFP4: 68, IndexFormat.PLAIN: 256}[index_format]


def _logits_case(
    query: Any, keys: PageTable, owner: Tensor, lens: Tensor, entries: int, moved: int, flops: int
) -> Case:
    """Only what lies within each token's length is compared: the kernels leave the rest as it
    was."""
    valid = torch.arange(entries, device=lens.device) < lens[:, None]
    args = (query, keys, owner, lens, entries)
    case = Case(lambda: indexer.logits(*args), lambda: indexer_reference.logits(*args), moved, flops)
    case.read = lambda scores: torch.where(valid, scores, 0.0)
    return case


def _logits(m: Model, t: int, entries: int, index_format: IndexFormat, device: torch.device) -> Case:
    """A request per token."""
    pages = make_pages(index_format, t * (entries // 64 + 1), 64, device)
    table = torch.randperm(pages.data.shape[0], device=device).int().view(t, -1)
    query, owner = _index_query(t, index_format, device), torch.arange(t, dtype=torch.int32, device=device)
    lens = torch.full((t,), entries, dtype=torch.int32, device=device)
    moved = t * entries * (_index_bytes(index_format) + 4)
    case = _logits_case(query, PageTable(pages, table), owner, lens, entries, moved, flops=2 * t * 64 * 128 * entries)
    if index_format is IndexFormat.FP8:
        case.peers["deep_gemm"] = op_peers.deep_gemm(query, PageTable(pages, table), lens, entries)
    return case


def _prefill_logits(m: Model, t: int, entries: int, index_format: IndexFormat, device: torch.device) -> Case:
    """The last t tokens of one request."""
    pages = make_pages(index_format, entries // 64 + 1, 64, device)
    table = torch.randperm(pages.data.shape[0], device=device).int()[None]
    query, owner = _index_query(t, index_format, device), torch.zeros(t, dtype=torch.int32, device=device)
    lens = entries - (t - 1 - torch.arange(t, device=device, dtype=torch.int32)) // 4
    moved = entries * _index_bytes(index_format) + t * entries * 4
    return _logits_case(query, PageTable(pages, table), owner, lens, entries, moved, flops=2 * t * 64 * 128 * entries)


def _ragged_logits(m: Model, t: int, entries: int, device: torch.device) -> Case:
    """Any lengths, none and exact page ends among them; pages behind a request's last are NaN."""
    pages = make_pages(IndexFormat.FP8, t * (entries // 64 + 1), 64, device)
    table = torch.randperm(pages.data.shape[0], device=device).int().view(t, -1)
    lens = torch.randint(0, entries + 1, (t,), dtype=torch.int32, device=device)
    for i, n in enumerate((65, 0, 64, 1, entries)[:t]):
        lens[i] = n
    behind = torch.arange(table.shape[1], device=device) * 64 >= lens[:, None]
    pages.data[table[behind].long()] = NAN
    query, owner = _index_query(t, IndexFormat.FP8, device), torch.arange(t, dtype=torch.int32, device=device)
    total = int(lens.sum())
    return _logits_case(query, PageTable(pages, table), owner, lens, entries, total * 136, flops=2 * total * 64 * 128)


def _topk(m: Model, t: int, n: int, device: torch.device) -> Case:
    """Scores without ties, which any choice would be right for."""
    scores = torch.stack([torch.randperm(n, device=device) for _ in range(t)]).float() - n / 2
    lens = torch.full((t,), n, dtype=torch.int32, device=device)
    case = Case(
        lambda: indexer.topk(scores, lens, m.topk), lambda: indexer_reference.topk(scores, lens, m.topk),
        scores.numel() * 4 + t * m.topk * 4, compare="sets",
    )  # fmt: skip
    case.peers["torch.topk"] = op_peers.Peer(lambda: torch.topk(scores, m.topk, dim=-1).indices)
    return case


def _sparse(m: Model, t: int, keys: int, row_format: KvFormat, device: torch.device) -> Case:
    """Every token its own window and its own entries: 64 rows to a page, or 2 for the many entries
    of HCA."""
    rows = 64 if keys == m.topk else 2
    window = make_pages(row_format, 2 * t, 64, device)
    entries = make_pages(row_format, min(t, 256) * keys // rows + 1, rows, device)
    window_slots = torch.arange(128 * t, dtype=torch.int32, device=device).view(t, 128)
    entry_slots = torch.randint(0, entries.data.shape[0] * rows, (t, keys), dtype=torch.int32, device=device)
    lens = [torch.full((t,), n, dtype=torch.int32, device=device) for n in (128, keys)]
    q, sink = torch.randn(t, m.heads, 512, device=device).bfloat16(), torch.randn(m.heads, device=device)
    args = (q, Selection(window, window_slots, lens[0]), Selection(entries, entry_slots, lens[1]), sink)
    row_bytes = 584 if row_format is KvFormat.FP8_DS_MLA else 1024
    case = Case(
        lambda: attention.sparse_attention(*args), lambda: attention_reference.sparse_attention(*args),
        t * (128 + keys) * row_bytes + 4 * q.numel(), 4 * t * m.heads * 512 * (128 + keys),
    )  # fmt: skip
    if row_format is KvFormat.FP8_DS_MLA:
        case.peers["flash_mla"] = op_peers.flash_mla(*args)
    return case


def _ragged_sparse(m: Model, t: int, keys: int, device: torch.device) -> Case:
    """Any lengths, none among them, a fifth of the places empty, and a page of NaN behind every
    length."""
    window, entries = (make_pages(KvFormat.FP8_DS_MLA, 2 * t + 1, 64, device) for _ in range(2))
    lists = []
    for pages, width in ((window, 128), (entries, keys)):
        pages.data[-1] = NAN
        lens = torch.randint(0, width + 1, (t,), dtype=torch.int32, device=device)
        for i, n in enumerate((width, 0, 1, 64)[:t]):
            lens[i] = n
        slots = torch.randint(0, 128 * t, (t, width), dtype=torch.int32, device=device)
        slots = torch.where(torch.rand(t, width, device=device) < 0.2, -1, slots)
        lists.append(
            Selection(
                pages, torch.where(torch.arange(width, device=device) < lens[:, None], slots, 128 * t).int(), lens
            )
        )
    q, sink = torch.randn(t, m.heads, 512, device=device).bfloat16(), torch.randn(m.heads, device=device)
    args = (q, *lists, sink, table_rows(t, device))
    total = sum(int(s.lens.sum()) for s in lists)
    return Case(
        lambda: attention.sparse_attention(*args), lambda: attention_reference.sparse_attention(*args),
        total * 584 + 4 * q.numel(), 4 * total * m.heads * 512,
    )  # fmt: skip
