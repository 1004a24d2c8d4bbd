# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of the compressor; every function here has its twin in `compressor/reference.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch  # noqa: F401  the GPU driver Triton launches through
import triton
import triton.language as tl
from torch import Tensor

from dsv4.ops.compressor.paged.state import PagedState
from dsv4.ops.compressor.projected import EntryStep, Projected
from dsv4.ops.kernels import Shipped
from dsv4.ops.pages import Pages
from dsv4.ops.quant.triton import format_code, hadamard_row, rotate_pairs, store_row

P = TypeVar("P")
ROWS_AT_ONCE = 8  # all rows of a CSA entry; an HCA entry takes 16 rounds


@triton.jit
def save_state_kernel(
    kv, kv_stride, gate, gate_stride, ape, positions, pages, page_stride, num_slots, slots,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, RATIO: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """grid (T,): write one token's [kv | gate + ape[position % RATIO]]."""
    t = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + t)
    if (slot >= 0) & (slot < num_slots):
        c = tl.arange(0, BLOCK)
        inside = c < WIDTH
        at = pages + (slot // ROWS).to(tl.int64) * page_stride + (slot % ROWS) * (2 * WIDTH)
        bias = tl.load(ape + (tl.load(positions + t) % RATIO) * WIDTH + c, mask=inside)
        tl.store(at + c, tl.load(kv + t * kv_stride + c, mask=inside), mask=inside)
        tl.store(at + WIDTH + c, tl.load(gate + t * gate_stride + c, mask=inside) + bias, mask=inside)


def save_state(projected: Projected, positions: Tensor, pages: Pages, slot_mapping: Tensor) -> None:
    """See `reference.save_state`."""
    kv, gate, ape = projected.kv, projected.gate, projected.ape
    num_tokens, width = kv.shape
    if num_tokens == 0:
        return
    save_state_kernel[(num_tokens,)](
        kv, kv.stride(0), gate, gate.stride(0), ape, positions, pages.data, pages.data.stride(0), pages.data.shape[0] * pages.rows, slot_mapping,
        WIDTH=width, BLOCK=triton.next_power_of_2(width), RATIO=ape.shape[0], ROWS=pages.rows, num_warps=4,
    )  # fmt: skip


@triton.jit
def finish_entry(
    pooled, norm_weight, eps, cos_sin, cache, cache_page_stride, slot,
    D: tl.constexpr, ROPE: tl.constexpr, ROWS: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    """Normalise, rotate, quantise and store one pooled entry, [D] fp32. cos_sin: pointer to its table row."""
    d = tl.arange(0, D)
    y = pooled * tl.rsqrt(tl.sum(pooled * pooled, 0) / D + eps) * tl.load(norm_weight + d).to(tl.float32)
    row = rotate_pairs(tl.reshape(y, [1, D]), cos_sin, D - ROPE, ROPE, D)  # [1, D]
    if FORMAT >= 2:  # packed index keys
        x = tl.reshape(row, [D]).to(tl.bfloat16).to(tl.float32)
        row = tl.reshape(hadamard_row(x, D), [1, D])
    store_row(cache + (slot // ROWS).to(tl.int64) * cache_page_stride, slot % ROWS, row, D, ROPE, ROWS, FORMAT)


@triton.jit
def _compress_store(
    kv, kv_stride, gate, gate_stride, ape, norm_weight, state, state_stride, state_pages, state_slots, block_table, block_table_stride,
    block_table_width, entry_slots, cache, cache_stride, cache_slots, t, request_of_token, positions, cos_sin, eps,
    D: tl.constexpr, STATE_ROWS: tl.constexpr, ROWS: tl.constexpr, FORMAT: tl.constexpr,
    RATIO: tl.constexpr, OVERLAP: tl.constexpr, ROPE: tl.constexpr, BR: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """What the program of token t does for one cache: if it completes an entry, pool OVERLAP * RATIO rows, BR at a time.

    SAVE: each token first writes its state, and a row of a token of this step is taken from kv and gate, since the program
    that writes its state may not have run yet.
    """
    WIDTH: tl.constexpr = OVERLAP * D
    if SAVE:
        slot = tl.load(state_slots + t)
        if (slot >= 0) & (slot < state_pages * STATE_ROWS):
            c = tl.arange(0, WIDTH)
            to = state + (slot // STATE_ROWS).to(tl.int64) * state_stride + (slot % STATE_ROWS) * (2 * WIDTH)
            bias = tl.load(ape + (tl.load(positions + t) % RATIO) * WIDTH + c)
            tl.store(to + c, tl.load(kv + t * kv_stride + c))
            tl.store(to + WIDTH + c, tl.load(gate + t * gate_stride + c) + bias)
    entry_slot = tl.load(entry_slots + t)
    if (entry_slot >= 0) & (entry_slot < cache_slots):
        position = tl.load(positions + t).to(tl.int32)
        request = tl.load(request_of_token + t)
        table = block_table + request.to(tl.int64) * block_table_stride
        d = tl.arange(0, D)
        m = tl.full([D], float("-inf"), tl.float32)
        weight = tl.zeros([D], tl.float32)
        pooled = tl.zeros([D], tl.float32)
        for start in range(0, OVERLAP * RATIO, BR):
            r = start + tl.arange(0, BR)  # oldest first
            back = OVERLAP * RATIO - 1 - r
            at = position - back
            exists = at >= 0
            # Columns A of the window before, columns B of the entry's own.
            column = tl.where(r < (OVERLAP - 1) * RATIO, 0, (OVERLAP - 1) * D)
            at_page = tl.maximum(at, 0) // STATE_ROWS
            stored = exists & (at_page < block_table_width)
            if SAVE:
                i = t - back
                own = exists & (i >= 0)
                # Tokens of one request are neighbours with consecutive positions.
                own = own & (tl.load(request_of_token + i, mask=own, other=-1) == request)
                stored = stored & (own == 0)
            page = tl.load(table + at_page, mask=stored, other=-1)
            stored = stored & (page >= 0) & (page < state_pages)
            row = tl.where(stored, page, 0).to(tl.int64) * state_stride + (tl.maximum(at, 0) % STATE_ROWS) * (2 * WIDTH)
            cell = state + (row + column)[:, None] + d[None, :]
            values = tl.load(cell, mask=stored[:, None], other=0.0)  # [BR, D]
            score = tl.load(cell + WIDTH, mask=stored[:, None], other=float("-inf"))
            if SAVE:
                from_kv = tl.load(kv + (i * kv_stride + column)[:, None] + d[None, :], mask=own[:, None], other=0.0)
                from_gate = tl.load(gate + (i * gate_stride + column)[:, None] + d[None, :], mask=own[:, None], other=0.0)
                bias = tl.load(ape + ((tl.maximum(at, 0) % RATIO) * WIDTH + column)[:, None] + d[None, :], mask=own[:, None], other=0.0)
                values = tl.where(own[:, None], from_kv, values)
                score = tl.where(own[:, None], from_gate + bias, score)
            m_next = tl.maximum(m, tl.max(score, 0))
            m_safe = tl.where(m_next == float("-inf"), 0.0, m_next)
            p = tl.exp(score - m_safe[None, :])
            keep = tl.exp(m - m_safe)
            weight = weight * keep + tl.sum(p, 0)
            pooled = pooled * keep + tl.sum(p * values, 0)
            m = m_next
        finish_entry(
            pooled / weight, norm_weight, eps, cos_sin + t * ROPE, cache, cache_stride, entry_slot, D, ROPE, ROWS, FORMAT
        )  # fmt: skip


@triton.jit
def compress_store_kernel(
    kv, kv_stride, gate, gate_stride, ape, norm_weight, state, state_stride, state_pages, state_slots, block_table, block_table_stride,
    block_table_width, entry_slots, cache, cache_stride, cache_slots,
    kv_2, kv_2_stride, gate_2, gate_2_stride, ape_2, norm_weight_2, state_2, state_2_stride, state_2_pages, state_slots_2, block_table_2,
    block_table_2_stride, block_table_2_width, entry_slots_2, cache_2, cache_2_stride, cache_2_slots,
    request_of_token, positions, cos_sin, eps,
    D: tl.constexpr, STATE_ROWS: tl.constexpr, ROWS: tl.constexpr, FORMAT: tl.constexpr,
    D_2: tl.constexpr, STATE_ROWS_2: tl.constexpr, ROWS_2: tl.constexpr, FORMAT_2: tl.constexpr,
    RATIO: tl.constexpr, OVERLAP: tl.constexpr, ROPE: tl.constexpr, BR: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """grid (T, caches): the second cache's arguments and constants are those with a 2; D_2 is 0 when there is none."""
    t = tl.program_id(0).to(tl.int64)
    if tl.program_id(1) == 0:
        _compress_store(
            kv, kv_stride, gate, gate_stride, ape, norm_weight, state, state_stride, state_pages, state_slots, block_table,
            block_table_stride, block_table_width, entry_slots, cache, cache_stride, cache_slots,
            t, request_of_token, positions, cos_sin, eps, D, STATE_ROWS, ROWS, FORMAT, RATIO, OVERLAP, ROPE, BR, SAVE,
        )  # fmt: skip
    elif D_2 > 0:
        _compress_store(
            kv_2, kv_2_stride, gate_2, gate_2_stride, ape_2, norm_weight_2, state_2, state_2_stride, state_2_pages, state_slots_2,
            block_table_2, block_table_2_stride, block_table_2_width, entry_slots_2, cache_2, cache_2_stride, cache_2_slots,
            t, request_of_token, positions, cos_sin, eps, D_2, STATE_ROWS_2, ROWS_2, FORMAT_2, RATIO, OVERLAP, ROPE, BR, SAVE,
        )  # fmt: skip


def at_most_two(op: str, states: Sequence[P]) -> tuple[P, P]:
    """The caches of a launch, which has arguments for two: a single one fills both places."""
    if len(states) > 2:
        raise ValueError(f"{op}: {len(states)} caches; a launch pools into at most 2")
    return states[0], states[-1]


def _arguments(state: PagedState) -> tuple[Any, ...]:
    given = state.projected
    return (
        given.kv, given.kv.stride(0), given.gate, given.gate.stride(0), given.ape, given.norm_weight,
        state.pages.data, state.pages.data.stride(0), state.pages.data.shape[0], state.slot_mapping,
        state.block_table, state.block_table.stride(0), state.block_table.shape[1],
        state.entry_slot_mapping, state.entries.data, state.entries.data.stride(0), state.entries.data.shape[0] * state.entries.rows,
    )  # fmt: skip


def _constants(state: PagedState) -> tuple[int, ...]:
    return state.projected.norm_weight.shape[0], state.pages.rows, state.entries.rows, format_code(state.entries.format)


def _launch(states: Sequence[PagedState], step: EntryStep, save: bool) -> None:
    if step.positions.numel() == 0:
        return
    one, two = at_most_two("compressor.update", states)
    compress_store_kernel[(step.positions.shape[0], len(states))](
        *_arguments(one), *_arguments(two), step.request_of_token, step.positions, step.entry_cos_sin, step.eps,
        *_constants(one), *(_constants(two) if len(states) > 1 else (0, 0, 0, 0)),
        step.ratio, step.overlap, step.entry_cos_sin.shape[1], min(ROWS_AT_ONCE, step.overlap * step.ratio), save, num_warps=4,
    )  # fmt: skip


def compress_store(states: Sequence[PagedState], step: EntryStep) -> None:
    """See `reference.compress_store`. Raises ValueError for more caches than the two that a CSA layer has."""
    _launch(states, step, save=False)


def update(states: Sequence[PagedState], step: EntryStep) -> None:
    """See `reference.update`. Raises ValueError for more caches than the two that a CSA layer has."""
    _launch(states, step, save=True)


_ONE = {
    "kv": "*fp32", "gate": "*fp32", "ape": "*fp32", "norm_weight": "*bf16", "state": "*fp32", "state_slots": "*i32",
    "block_table": "*i32", "entry_slots": "*i32",
}  # fmt: skip
_TYPES = {
    **_ONE, **{f"{name}_2": kind for name, kind in _ONE.items()},
    "pages": "*fp32", "slots": "*i32", "positions": "*i64", "request_of_token": "*i32", "cos_sin": "*fp32",
}  # fmt: skip


def _compress(name: str, ratio: int, dim: int, row_format: int, index_format: int | None = None, save: bool = True) -> Shipped:
    state_rows, rows = 4 if ratio == 4 else 8, 256 // ratio
    second = (0, 0, 0, 0) if index_format is None else (128, state_rows, rows, index_format)
    constants = {
        "D": dim, "STATE_ROWS": state_rows, "ROWS": rows, "FORMAT": row_format,
        **dict(zip(("D_2", "STATE_ROWS_2", "ROWS_2", "FORMAT_2"), second, strict=True)),
        "RATIO": ratio, "OVERLAP": 2 if ratio == 4 else 1, "ROPE": 64, "BR": ROWS_AT_ONCE, "SAVE": save,
    }  # fmt: skip
    cached = {"cache": "*u8" if row_format else "*bf16", "cache_2": "*u8" if index_format else "*bf16"}
    return Shipped(name, compress_store_kernel, {**_TYPES, **cached}, constants, 4)


SHIPPED = (
    Shipped("save_state csa", save_state_kernel, _TYPES, {"WIDTH": 1024, "BLOCK": 1024, "RATIO": 4, "ROWS": 4}, 4),
    _compress("compress csa fp8 + index fp8", 4, 512, 1, 2),
    _compress("compress csa fp8 + index mxfp4", 4, 512, 1, 3),
    _compress("compress csa bf16 + index bf16", 4, 512, 0, 0),
    _compress("compress index fp8", 4, 128, 2),
    _compress("compress hca fp8", 128, 512, 1),
    _compress("compress hca bf16", 128, 512, 0, save=False),
)
