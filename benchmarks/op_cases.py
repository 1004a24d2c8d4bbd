# SPDX-License-Identifier: Apache-2.0
"""What bench_ops.py runs: every kernel at the sizes of Flash and Pro, with its twin, its bytes and FLOPs, and its peers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dsv4.kv_layout import IndexFormat, KvFormat, round_up
from dsv4.ops.attention import reference as attention_twin
from dsv4.ops.attention import triton as attention
from dsv4.ops.attention import vendor
from dsv4.ops.compressor import reference as compressor_twin
from dsv4.ops.compressor import triton as compressor
from dsv4.ops.indexer import reference as indexer_twin
from dsv4.ops.indexer import triton as indexer
from dsv4.ops.mhc import reference as mhc_twin
from dsv4.ops.mhc import triton as mhc
from dsv4.ops.moe import reference as moe_twin
from dsv4.ops.moe import triton as moe
from dsv4.ops.pages import Pages, RowsFormat
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
    """One measurement. kernel, twin: without arguments, returning tensors; compare: how the two must agree.

    bytes_moved: what must be read and written once; flops: of matrix products; peers: other implementations by name.
    """

    name: str
    model: str
    size: str
    kernel: Call
    twin: Call
    bytes_moved: int
    flops: int = 0
    peers: dict[str, Call] = field(default_factory=dict)
    compare: str = "close"  # close | bytes | sets
    timed: Call | None = None  # what is timed, where the comparison needs more than the kernel


def make_pages(row_format: RowsFormat, num_pages: int, rows: int, row_bytes: int, device: torch.device) -> Pages:
    """Random but finite packed pages: codes below the NaN codes, scales near 1."""
    data = torch.randint(0, 120, (num_pages, round_up(rows * row_bytes, 576)), dtype=torch.uint8, device=device)
    values = rows * (576 if row_format is KvFormat.FP8_DS_MLA else 128)
    if row_format is KvFormat.FP8_DS_MLA:
        data[:, values : values + rows * 8] = 122
        rope = data[:, :values].view(num_pages, rows, 576)[:, :, 448:]
        rope.copy_(torch.randn(num_pages, rows, 64, device=device).bfloat16().view(torch.uint8))
    else:
        data[:, values : values + rows * 4] = torch.tensor([0.0625], device=device).view(torch.uint8).repeat(rows)
    return Pages(data, rows, row_format)


def table_rows(num_tokens: int, device: torch.device) -> Tensor:
    return cos_sin(torch.randint(0, 1_000_000, (num_tokens,), device=device), 1e4 ** (-torch.arange(0, 64, 2, device=device) / 64))


def cases(models: list[Model], device: torch.device, small: bool) -> Iterator[Callable[[], Case]]:
    """Builders, so that one case's memory is gone before the next. small: sizes for Triton's interpreter."""
    for m in models:
        for tokens in (2,) if small else (1, 64, 8192):
            yield lambda m=m, t=tokens: _norm_rope_store(m, t, device)
            yield lambda m=m, t=tokens: _prepare_query(m, t, device)
            yield lambda m=m, t=tokens: _mhc_pre(m, t, device)
            yield lambda m=m, t=tokens: _mhc_post(m, t, device)
            yield lambda m=m, t=tokens: _mhc_post_pre(m, t, device)
            yield lambda m=m, t=tokens: _mhc_head(m, t, device)
            yield lambda m=m, t=tokens: _route(m, t, device)
            yield lambda m=m, t=tokens: _swiglu(m, t, device)
            yield lambda m=m, t=tokens: _output_a(m, t, device)
        for tokens, ratio, dim in (
            ((8, 4, 512), (8, 4, 128), (128, 128, 512)) if small else ((8192, 4, 512), (8192, 4, 128), (8192, 128, 512))
        ):
            yield lambda m=m, t=tokens, r=ratio, d=dim: _compressor(m, t, r, d, device)
        for batch, entries in ((2, 70),) if small else ((1, 262_144), (8, 32_768), (64, 8192)):
            yield lambda m=m, b=batch, n=entries: _logits(m, b, n, device, prefill=False)
            yield lambda m=m, b=batch, n=entries: _topk(m, b, n, device)
        yield lambda m=m: _logits(m, 16 if small else 1024, 70 if small else 32_768, device, prefill=True)
        for batch in (2,) if small else (1, 8, 64, 256, 4096):
            yield lambda m=m, b=batch: _sparse(m, b, m.topk, "csa", device)
        for batch in (2,) if small else (1, 8, 64):
            yield lambda m=m, b=batch: _sparse(m, b, 40 if small else 8192, "hca", device)


def _norm_rope_store(m: Model, t: int, device: torch.device) -> Case:
    q, kv = torch.randn(t, m.heads, 512, device=device).bfloat16(), torch.randn(t, 512, device=device).bfloat16()
    pages, again = (make_pages(KvFormat.FP8_DS_MLA, t // 64 + 1, 64, 584, device) for _ in range(2))
    again.data.copy_(pages.data)
    slots, weight, table = torch.randperm(t, device=device).int(), torch.rand(512, device=device), table_rows(t, device)

    def run(op: Callable[..., Tensor], to: Pages) -> tuple[Tensor, Tensor]:
        return op(q, kv, weight, 1e-6, table, to, slots), to.data

    return Case(
        "norm_rope_store", m.name, f"T={t}", lambda: run(attention.norm_rope_store, pages), lambda: run(attention_twin.norm_rope_store, again),
        4 * q.numel() + 2 * kv.numel() + t * (584 + 256 + 4), compare="bytes",
    )  # fmt: skip


def _output_a(m: Model, t: int, device: torch.device) -> Case:
    o, table = torch.randn(t, m.heads, 512, device=device).bfloat16(), table_rows(t, device)
    wo_a = torch.randn(m.heads // 8, 1024, 8 * 512, device=device).bfloat16() / 64
    args = (o, table, wo_a)
    moved = 2 * (o.numel() + wo_a.numel() + t * wo_a.shape[0] * 1024)
    return Case(
        "output_a", m.name, f"T={t}", lambda: attention.output_a(*args), lambda: attention_twin.output_a(*args), moved, 2 * t * wo_a.numel()
    )


def _prepare_query(m: Model, t: int, device: torch.device) -> Case:
    q, w, table = torch.randn(t, 64, 128, device=device).bfloat16(), torch.randn(t, 64, device=device).bfloat16(), table_rows(t, device)

    def run(op: Callable[..., Any]) -> tuple[Tensor, Tensor]:
        query = op(q, w, table, IndexFormat.FP8)
        return query.values, query.weights

    return Case(
        "prepare_query", m.name, f"T={t}", lambda: run(indexer.prepare_query), lambda: run(indexer_twin.prepare_query),
        3 * q.numel() + 6 * w.numel() + 256 * t, compare="bytes",
    )  # fmt: skip


def _mhc_inputs(m: Model, t: int, device: torch.device) -> tuple[Tensor, ...]:
    streams = torch.randn(t, 4, m.hidden, device=device).bfloat16()
    fn = torch.randn(24, 4 * m.hidden, device=device) * (4 * m.hidden) ** -0.5
    return streams, fn, torch.randn(24, device=device), torch.rand(3, device=device), torch.rand(m.hidden, device=device)


def _mhc_pre(m: Model, t: int, device: torch.device) -> Case:
    args = (*_mhc_inputs(m, t, device), 1e-6, 1e-6, 20)
    moved = t * m.hidden * 2 * 5 + args[1].numel() * 4 + t * 80
    flops = 2 * t * 24 * 4 * m.hidden
    return Case("mhc.pre", m.name, f"T={t}", lambda: mhc.pre(*args), lambda: mhc_twin.pre(*args), moved, flops)


def _post_inputs(m: Model, t: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(t, m.hidden, device=device).bfloat16(), torch.rand(t, 4, device=device), torch.rand(t, 4, 4, device=device)


def _mhc_post(m: Model, t: int, device: torch.device) -> Case:
    args = (_mhc_inputs(m, t, device)[0], *_post_inputs(m, t, device))
    return Case("mhc.post", m.name, f"T={t}", lambda: mhc.post(*args), lambda: mhc_twin.post(*args), t * (m.hidden * 2 * 9 + 80))


def _mhc_post_pre(m: Model, t: int, device: torch.device) -> Case:
    streams, *rest = _mhc_inputs(m, t, device)
    args = (streams, *_post_inputs(m, t, device), *rest, 1e-6, 1e-6, 20)
    moved = t * (m.hidden * 2 * 10 + 160) + rest[0].numel() * 4
    flops = 2 * t * 24 * 4 * m.hidden
    return Case("mhc.post_pre", m.name, f"T={t}", lambda: mhc.post_pre(*args), lambda: mhc_twin.post_pre(*args), moved, flops)


def _mhc_head(m: Model, t: int, device: torch.device) -> Case:
    streams, fn, base, scale, weight = _mhc_inputs(m, t, device)
    args = (streams, fn[:4].contiguous(), base[:4], scale[:1], weight, 1e-6, 1e-6)
    return Case("mhc.head", m.name, f"T={t}", lambda: mhc.head(*args), lambda: mhc_twin.head(*args), t * m.hidden * 10 + 64 * m.hidden)


def _route(m: Model, t: int, device: torch.device) -> Case:
    args = (torch.randn(t, m.experts, device=device), torch.randn(m.experts, device=device), 6, 2.5)
    return Case("route_topk", m.name, f"T={t}", lambda: moe.route_topk(*args), lambda: moe_twin.route_topk(*args), t * (4 * m.experts + 48))


def _swiglu(m: Model, t: int, device: torch.device) -> Case:
    gate, up = torch.randn(t, 2 * m.intermediate, device=device).bfloat16().chunk(2, -1)
    moved = 6 * t * m.intermediate
    return Case("swiglu", m.name, f"T={t}", lambda: moe.swiglu(gate, up, 10.0), lambda: moe_twin.swiglu(gate, up, 10.0), moved)


def _compressor(m: Model, t: int, ratio: int, dim: int, device: torch.device) -> Case:
    """A prefill of one request from its first token."""
    overlap, state_rows = (2, 4) if ratio == 4 else (1, 8)
    width = overlap * dim
    row_format, row_bytes = (KvFormat.FP8_DS_MLA, 584) if dim == 512 else (IndexFormat.FP8, 132)
    rows = 256 // ratio
    states = [Pages(torch.zeros(t // state_rows, state_rows, 2 * width, device=device), state_rows, KvFormat.PLAIN) for _ in range(2)]
    caches = [make_pages(row_format, t // 256 + 1, rows, row_bytes, device) for _ in range(2)]
    caches[1].data.copy_(caches[0].data)
    kv, gate, ape = (torch.randn(n, width, device=device) for n in (t, t, ratio))
    positions = torch.arange(t, device=device)
    request, table = torch.zeros(t, dtype=torch.int32, device=device), torch.arange(t // state_rows, dtype=torch.int32, device=device)[None]
    entry_slots = torch.where((positions + 1) % ratio == 0, positions // ratio, -1).int()
    entry_table = cos_sin(positions // ratio * ratio, 1.6e5 ** (-torch.arange(0, 64, 2, device=device) / 64))
    weight = torch.rand(dim, device=device)

    def run(op: Callable[..., None], i: int) -> tuple[Tensor, Tensor]:
        op(kv, gate, ape, positions, request, states[i], positions.int(), table, entry_slots, overlap, weight, 1e-6, entry_table, caches[i])
        return states[i].data, caches[i].data

    moved = t * width * 4 * 4 + t // ratio * row_bytes
    name = f"compressor.update {'csa' if ratio == 4 else 'hca'}{'' if dim == 512 else ' index'}"
    return Case(name, m.name, f"T={t}", lambda: run(compressor.update, 0), lambda: run(compressor_twin.update, 1), moved, compare="bytes")


def _logits(m: Model, t: int, entries: int, device: torch.device, prefill: bool) -> Case:
    """Decode: a request per token. Prefill: the last t tokens of one request."""
    requests = 1 if prefill else t
    pages = make_pages(IndexFormat.FP8, requests * (entries // 64 + 1), 64, 132, device)
    table = torch.randperm(pages.data.shape[0], device=device).int().view(requests, -1)
    query = indexer.prepare_query(
        torch.randn(t, 64, 128, device=device).bfloat16(), torch.randn(t, 64, device=device), table_rows(t, device), IndexFormat.FP8
    )
    lens = (
        entries - (t - 1 - torch.arange(t, device=device, dtype=torch.int32)) // 4 if prefill else torch.full((t,), entries, device=device)
    )
    lens, owner = lens.int(), torch.zeros(t, device=device).int() if prefill else torch.arange(t, device=device).int()
    valid = torch.arange(entries, device=device) < lens[:, None]

    def run(op: Callable[..., Tensor]) -> Tensor:
        return op(query, pages, table, owner, lens, entries)

    def masked(op: Callable[..., Tensor]) -> Tensor:
        return torch.where(valid, run(op), 0.0)

    case = Case(
        f"index.logits {'prefill' if prefill else 'decode'}", m.name, f"T={t} N={entries}", lambda: masked(indexer.logits),
        lambda: masked(indexer_twin.logits), requests * entries * 132 + t * entries * 4, 2 * t * 64 * 128 * entries,
    )  # fmt: skip
    case.timed = lambda: run(indexer.logits)
    if not prefill:
        case.peers["deep_gemm"] = _deep_gemm(query, pages, table, lens, entries)
    return case


def _deep_gemm(query: Any, pages: Pages, table: Tensor, lens: Tensor, entries: int) -> Call:
    state: dict[str, Any] = {}

    def run() -> Tensor:
        if not state:
            from vllm.third_party import deep_gemm

            keys = pages.data.as_strided((pages.data.shape[0], 64, 1, 132), (pages.data.stride(0), 132, 132, 1))
            plan = deep_gemm.get_paged_mqa_logits_metadata(lens[:, None], 64, deep_gemm.get_num_sms())
            q = query.values.view(torch.float8_e4m3fn)[:, None]
            state["call"] = lambda: deep_gemm.fp8_fp4_paged_mqa_logits(
                (q, None), keys, query.weights, lens[:, None], table, plan, entries, clean_logits=False
            )
        return state["call"]()

    return run


def _topk(m: Model, t: int, n: int, device: torch.device) -> Case:
    scores, lens = torch.randn(t, n, device=device), torch.full((t,), n, dtype=torch.int32, device=device)
    case = Case(
        "topk", m.name, f"T={t} N={n} K={m.topk}", lambda: indexer.topk(scores, lens, m.topk), lambda: indexer_twin.topk(scores, lens, m.topk),
        scores.numel() * 4 + t * m.topk * 4, compare="sets",
    )  # fmt: skip
    case.peers["torch.topk"] = lambda: torch.topk(scores, min(m.topk, n), dim=-1).indices
    return case


def _sparse(m: Model, t: int, keys: int, kind: str, device: torch.device) -> Case:
    """csa: every token its own entries; hca: every entry of the token's request, a request per token."""
    rows = 64 if kind == "csa" else 2
    window = make_pages(KvFormat.FP8_DS_MLA, 2 * t, 64, 584, device)
    entries = make_pages(KvFormat.FP8_DS_MLA, min(t, 64) * keys // rows + 1, rows, 584, device)
    window_slots = torch.arange(128 * t, dtype=torch.int32, device=device).view(t, 128)
    entry_slots = torch.randint(0, entries.data.shape[0] * rows, (t, keys), dtype=torch.int32, device=device)
    lens = [torch.full((t,), n, dtype=torch.int32, device=device) for n in (128, keys)]
    q, sink = torch.randn(t, m.heads, 512, device=device).bfloat16(), torch.randn(m.heads, device=device)
    args = (q, window, window_slots, lens[0], entries, entry_slots, torch.arange(t, dtype=torch.int32, device=device), lens[1], sink, 64)
    return Case(
        f"sparse {kind}", m.name, f"T={t} K={keys}", lambda: attention.sparse_attention(*args), lambda: attention_twin.sparse_attention(*args),
        t * (128 + keys) * 584 + 4 * q.numel(), 4 * t * m.heads * 512 * (128 + keys), {"flash_mla": lambda: vendor.flash_mla(*args)},
    )  # fmt: skip
