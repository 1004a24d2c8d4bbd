# SPDX-License-Identifier: Apache-2.0
"""Other implementations of an operator, from the libraries in vLLM's wheel, loaded without
importing vLLM itself.

Each is found below a folder named `vllm` on the path: an installed vLLM, or a few of its files
(docs/kernels.md says which) given to bench_ops.py by --peers. A peer that is not there, or that
does not run, raises when called, which the run records.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv4.model.kv_layout import KvFormat
from dsv4.ops.moe import triton as moe
from dsv4.ops.pages import Pages, PageTable, Selection

ROW_BYTES = 584  # of fp8_ds_mla, the only rows that FlashMLA reads
FLOAT4_E2M1 = 562949953487106  # Marlin's id of the type: vllm.scalar_type.scalar_types.float4_e2m1f.id
MARLIN_BLOCKS = (8, 16, 32, 48, 64)
MARLIN_BLOCKS_PER_SM = 4


@dataclass(frozen=True)
class Peer:
    """call: without arguments. compared: whether its results must be the first of the
    reference's."""

    call: Callable[[], Any]
    compared: bool = True


def _rows_of(pages: Pages) -> Tensor:
    """Pages as FlashMLA's [P, rows, 1, 584]; it takes values and scales apart itself."""
    stride = pages.data.stride(0)
    return pages.data.as_strided((pages.data.shape[0], pages.rows, 1, ROW_BYTES), (stride, ROW_BYTES, ROW_BYTES, 1))


def lazily(prepare: Callable[[], Callable[[], Any]], compared: bool = True) -> Peer:
    """A peer whose libraries, plans and buffers are made at the first call, outside what is
    timed."""
    made: list[Callable[[], Any]] = []

    def call() -> Any:
        if not made:
            made.append(prepare())
        return made[0]()

    return Peer(call, compared)


def _library(pattern: str) -> None:
    """Load a library of vLLM's; its operators are then in torch.ops."""
    spec = importlib.util.find_spec("vllm")
    files = [
        f
        for folder in (spec.submodule_search_locations or () if spec else ())
        for f in sorted(Path(folder).glob(pattern))
    ]
    if not files:
        raise FileNotFoundError(f"no vllm/{pattern} on the path")
    torch.ops.load_library(str(files[0]))


def flash_mla(q: Tensor, window: Selection, entries: Selection, sink: Tensor) -> Peer:
    """FlashMLA's sparse decode on the same pages. Its schedule is made once, as engines make it
    once a step."""

    def prepare() -> Callable[[], Tensor]:
        _library("_flashmla_C*.so")
        assert window.pages.format is KvFormat.FP8_DS_MLA
        everyone = slice(0, q.shape[0])
        indices, more = (s.slots_of(everyone, s.slots.shape[1])[:, None].contiguous() for s in (window, entries))

        def run(schedule: Tensor | None, splits: Tensor | None) -> tuple[Tensor, ...]:
            return torch.ops._flashmla_C.sparse_decode_fwd(
                q[:, None],
                _rows_of(window.pages),
                indices,
                window.lens,
                sink,
                schedule,
                splits,
                _rows_of(entries.pages),
                more,
                entries.lens,
                q.shape[-1],
                q.shape[-1] ** -0.5,
                None,
            )

        _, _, schedule, splits = run(None, None)
        return lambda: run(schedule, splits)[0][:, 0]

    return lazily(prepare)


def deep_gemm(query: Any, of: PageTable, lens: Tensor, entries: int) -> Peer:
    """DeepGEMM's paged index scores on the same pages. Its schedule is made once, as engines make
    it once a step."""

    def prepare() -> Callable[[], Tensor]:
        from vllm.third_party import deep_gemm as library

        pages = of.pages
        keys = pages.data.as_strided((pages.data.shape[0], 64, 1, 132), (pages.data.stride(0), 132, 132, 1))
        q, rows = query.values.view(torch.float8_e4m3fn)[:, None], lens[:, None].contiguous()
        schedule = library.get_paged_mqa_logits_metadata(rows, 64, library.get_num_sms())

        def run() -> Tensor:
            scores = library.fp8_fp4_paged_mqa_logits(
                (q, None), keys, query.weights, rows, of.block_table, schedule, entries, clean_logits=False
            )
            return scores[:, :entries]

        return run

    return lazily(prepare)


def marlin(x: Tensor, num_experts: int, inner: int, weights: Tensor, ids: Tensor, limit: float) -> Peer:
    """vLLM's Marlin on mxfp4 experts, its two products and our activation between them.

    Its weights are random in its own order, since what reorders them is in a library too large to
    carry: they cost the same time, and the result is not compared.
    """

    def prepare() -> Callable[[], Tensor]:
        _library("_moe_C_stable_libtorch*.so")
        (tokens, dim), top_k, device = x.shape, ids.shape[1], x.device
        block = next((b for b in MARLIN_BLOCKS if tokens * top_k / num_experts / b < 0.9), MARLIN_BLOCKS[-1])
        order, experts, padded = aligned_pairs(ids, num_experts, block)
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        locks = torch.zeros(processors * MARLIN_BLOCKS_PER_SM, dtype=torch.int32, device=device)

        def random(low: int, high: int, dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.randint(low, high, shape, dtype=dtype, device=device)

        def product(n: int, k: int, tokens: int, top_k: int, weigh: bool) -> Callable[[Tensor], Tensor]:
            packed = random(-(1 << 31), 1 << 31, torch.int32, num_experts, k // 16, n * 2)
            scales = random(117, 121, torch.uint8, num_experts, k // 32, n).view(torch.float8_e8m0fnu)
            return lambda a: torch.ops._moe_C.moe_wna16_marlin_gemm(
                a,
                None,
                packed,
                None,
                scales,
                None,
                None,
                None,
                locks,
                order,
                experts,
                padded,
                weights,
                block,
                top_k,
                weigh,
                FLOAT4_E2M1,
                tokens,
                n,
                k,
                False,
                True,
                False,
                -1,
                -1,
                -1,
            )

        gate_up = product(2 * inner, dim, tokens, top_k, False)
        down = product(dim, inner, tokens * top_k, 1, True)

        def run() -> Tensor:
            gate, up = gate_up(x).view(-1, 2 * inner).chunk(2, -1)
            return down(moe.swiglu(gate, up, limit)).view(tokens, top_k, dim).sum(1)

        return run

    return lazily(prepare, compared=False)


def aligned_pairs(ids: Tensor, num_experts: int, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of token and expert in blocks of one expert each, as Marlin wants them: ids [T, K].

    Returns the pairs, an expert's last block filled up with the number of pairs, int32 [n]; each
    block's expert, int32 [n / block]; and n, int32 [1].
    """
    flat = ids.flatten().long()
    counts = torch.bincount(flat, minlength=num_experts)
    room = (counts + block - 1) // block * block
    n = int(room.sum())
    order = flat.argsort(stable=True)
    expert = flat[order]
    place = (
        torch.arange(flat.numel(), device=ids.device)
        - (counts.cumsum(0) - counts)[expert]
        + (room.cumsum(0) - room)[expert]
    )
    pairs = torch.full((n,), flat.numel(), dtype=torch.int32, device=ids.device)
    pairs[place] = order.int()
    experts = torch.arange(num_experts, device=ids.device).repeat_interleave(room // block).int()
    return pairs, experts, torch.tensor([n], dtype=torch.int32, device=ids.device)
