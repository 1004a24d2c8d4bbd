# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of the compressor; every function here has its twin in `compressor/reference.py`."""

from __future__ import annotations

import torch  # noqa: F401  the GPU driver Triton launches through
import triton
import triton.language as tl
from torch import Tensor

from dsv4.ops.kernels import Shipped
from dsv4.ops.pages import Pages
from dsv4.ops.quant.triton import format_code, hadamard_sign, rotate_pairs, store_row

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


def save_state(kv: Tensor, gate: Tensor, ape: Tensor, positions: Tensor, state: Pages, slots: Tensor) -> None:
    """See `reference.save_state`."""
    num_tokens, width = kv.shape
    if num_tokens == 0:
        return
    save_state_kernel[(num_tokens,)](
        kv, kv.stride(0), gate, gate.stride(0), ape, positions, state.data, state.data.stride(0), state.data.shape[0] * state.rows, slots,
        WIDTH=width, BLOCK=triton.next_power_of_2(width), RATIO=ape.shape[0], ROWS=state.rows, num_warps=4,
    )  # fmt: skip


@triton.jit
def compress_store_kernel(
    kv, kv_stride, gate, gate_stride, ape, state_slots, state_num_slots,
    state, state_page_stride, state_pages, block_table, block_table_stride, block_table_width, request_of_token, positions,
    entry_slots, norm_weight, eps, cos_sin, cache, cache_page_stride, cache_num_slots,
    RATIO: tl.constexpr, OVERLAP: tl.constexpr, D: tl.constexpr, ROPE: tl.constexpr, BR: tl.constexpr,
    STATE_ROWS: tl.constexpr, ROWS: tl.constexpr, FORMAT: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """grid (T,): the tokens that complete no entry leave early; the others pool OVERLAP * RATIO rows, BR at a time.

    SAVE: each token first writes its state, and a row of a token of this step is taken from kv and gate, since the program
    that writes its state may not have run yet.
    """
    t = tl.program_id(0).to(tl.int64)
    WIDTH: tl.constexpr = OVERLAP * D
    if SAVE:
        slot = tl.load(state_slots + t)
        if (slot >= 0) & (slot < state_num_slots):
            c = tl.arange(0, WIDTH)
            to = state + (slot // STATE_ROWS).to(tl.int64) * state_page_stride + (slot % STATE_ROWS) * (2 * WIDTH)
            bias = tl.load(ape + (tl.load(positions + t) % RATIO) * WIDTH + c)
            tl.store(to + c, tl.load(kv + t * kv_stride + c))
            tl.store(to + WIDTH + c, tl.load(gate + t * gate_stride + c) + bias)
    entry_slot = tl.load(entry_slots + t)
    if (entry_slot >= 0) & (entry_slot < cache_num_slots):
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
            row = tl.where(stored, page, 0).to(tl.int64) * state_page_stride + (tl.maximum(at, 0) % STATE_ROWS) * (2 * WIDTH)
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
        pooled = pooled / weight
        y = pooled * tl.rsqrt(tl.sum(pooled * pooled, 0) / D + eps) * tl.load(norm_weight + d).to(tl.float32)
        row_out = rotate_pairs(tl.reshape(y, [1, D]), cos_sin + t * ROPE, D - ROPE, ROPE, D)  # [1, D]
        if FORMAT >= 2:  # packed index keys
            x = tl.reshape(row_out, [D]).to(tl.bfloat16).to(tl.float32)
            row_out = tl.reshape(tl.sum(x[:, None] * hadamard_sign(D), 0) * (D**-0.5), [1, D])
        page_out = cache + (entry_slot // ROWS).to(tl.int64) * cache_page_stride
        store_row(page_out, entry_slot % ROWS, row_out, D, ROPE, ROWS, FORMAT)


def _launch(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor] | None, state: Pages, state_block_table: Tensor, request_of_token: Tensor,
    positions: Tensor, entry_slots: Tensor, ratio: int, overlap: int, norm_weight: Tensor, eps: float, entry_cos_sin: Tensor, cache: Pages,
) -> None:  # fmt: skip
    """inputs: kv, gate, ape and the state slots to save to, or None."""
    dim = norm_weight.shape[0]
    kv, gate, ape, state_slots = inputs or (state.data, state.data, state.data, entry_slots)
    compress_store_kernel[(positions.shape[0],)](
        kv, kv.stride(0), gate, gate.stride(0), ape, state_slots, state.data.shape[0] * state.rows,
        state.data, state.data.stride(0), state.data.shape[0],
        state_block_table, state_block_table.stride(0), state_block_table.shape[1], request_of_token, positions,
        entry_slots, norm_weight, eps, entry_cos_sin, cache.data, cache.data.stride(0), cache.data.shape[0] * cache.rows,
        RATIO=ratio, OVERLAP=overlap, D=dim, ROPE=entry_cos_sin.shape[1], BR=min(ROWS_AT_ONCE, overlap * ratio),
        STATE_ROWS=state.rows, ROWS=cache.rows, FORMAT=format_code(cache.format), SAVE=inputs is not None, num_warps=4,
    )  # fmt: skip


def compress_store(
    state: Pages,
    state_block_table: Tensor,
    request_of_token: Tensor,
    positions: Tensor,
    entry_slots: Tensor,
    ratio: int,
    overlap: int,
    norm_weight: Tensor,
    eps: float,
    entry_cos_sin: Tensor,
    cache: Pages,
) -> None:
    """See `reference.compress_store`."""
    if positions.numel() == 0:
        return
    _launch(
        None, state, state_block_table, request_of_token, positions, entry_slots, ratio, overlap, norm_weight, eps, entry_cos_sin, cache
    )


def update(
    kv: Tensor,
    gate: Tensor,
    ape: Tensor,
    positions: Tensor,
    request_of_token: Tensor,
    state: Pages,
    state_slots: Tensor,
    state_block_table: Tensor,
    entry_slots: Tensor,
    overlap: int,
    norm_weight: Tensor,
    eps: float,
    entry_cos_sin: Tensor,
    cache: Pages,
) -> None:
    """See `reference.update`."""
    if positions.numel() == 0:
        return
    _launch(
        (kv, gate, ape, state_slots), state, state_block_table, request_of_token, positions, entry_slots, ape.shape[0], overlap,
        norm_weight, eps, entry_cos_sin, cache,
    )  # fmt: skip


_TYPES = {
    "kv": "*fp32",
    "gate": "*fp32",
    "ape": "*fp32",
    "pages": "*fp32",
    "state": "*fp32",
    "positions": "*i64",
    "slots": "*i32",
    "state_slots": "*i32",
    "entry_slots": "*i32",
    "block_table": "*i32",
    "request_of_token": "*i32",
    "norm_weight": "*bf16",
    "cos_sin": "*fp32",
}


def _compress(name: str, ratio: int, dim: int, row_format: int, save: bool = True) -> Shipped:
    overlap = 2 if ratio == 4 else 1
    constants = {
        "RATIO": ratio,
        "OVERLAP": overlap,
        "D": dim,
        "ROPE": 64,
        "BR": ROWS_AT_ONCE,
        "STATE_ROWS": 4 if ratio == 4 else 8,
        "ROWS": 256 // ratio,
        "FORMAT": row_format,
        "SAVE": save,
    }
    return Shipped(name, compress_store_kernel, {**_TYPES, "cache": "*u8" if row_format else "*bf16"}, constants, 4)


SHIPPED = (
    Shipped("save_state csa", save_state_kernel, _TYPES, {"WIDTH": 1024, "BLOCK": 1024, "RATIO": 4, "ROWS": 4}, 4),
    _compress("compress csa fp8", 4, 512, 1),
    _compress("compress hca fp8", 128, 512, 1),
    _compress("compress hca bf16", 128, 512, 0, save=False),
    _compress("compress index fp8", 4, 128, 2),
    _compress("compress index mxfp4", 4, 128, 3),
)
