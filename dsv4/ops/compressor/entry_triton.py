# SPDX-License-Identifier: Apache-2.0
"""What the kernels of all mappings share: groups of arguments, and what makes a pooled row an
entry.

Fields in capitals are constants of the kernel; they stay constants in a group that is an argument,
not in one that has been assigned to a variable.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import triton
import triton.language as tl
from torch import Tensor

from dsv4.ops.compressor.projected import Projected
from dsv4.ops.pages import SlotMapping
from dsv4.ops.quant.triton import format_code, hadamard_row, rotate_pairs, store_row

Group = TypeVar("Group")
constant = functools.cache(tl.constexpr)  # of an integer; building one takes longer than looking it up
ROWS_AT_ONCE = 8  # all rows of a CSA entry; an HCA entry takes 16 rounds


class ProjectedGroup(NamedTuple):
    """A `Projected`."""

    kv: Any
    kv_stride: Any
    gate: Any
    gate_stride: Any
    ape: Any
    norm_weight: Any
    D: Any


class EntryGroup(NamedTuple):
    """The cache of entries, and the slot in it of the entry that each token completes."""

    slot_mapping: Any
    pages: Any
    page_stride: Any
    num_slots: Any
    ROWS: Any
    FORMAT: Any


def projected_group(given: Projected) -> ProjectedGroup:
    return ProjectedGroup(
        kv=given.kv,
        kv_stride=given.kv.stride(0),
        gate=given.gate,
        gate_stride=given.gate.stride(0),
        ape=given.ape,
        norm_weight=given.norm_weight,
        D=constant(given.norm_weight.shape[0]),
    )


def entry_group(entries: SlotMapping) -> EntryGroup:
    return EntryGroup(
        slot_mapping=entries.slots,
        pages=entries.pages.data,
        page_stride=entries.pages.data.stride(0),
        num_slots=entries.pages.num_slots,
        ROWS=constant(entries.pages.rows),
        FORMAT=constant(format_code(entries.pages.format)),
    )


def at_most_two(op: str, groups: Sequence[Group]) -> tuple[Group, Group | None]:
    """The groups of a launch, which has arguments for two caches; a layer with one has no
    second."""
    if len(groups) > 2:
        raise ValueError(f"{op}: {len(groups)} caches; a launch pools into at most 2")
    return groups[0], groups[1] if len(groups) > 1 else None


def table_shape(block_table: Tensor) -> tuple[int, int]:
    """How far its rows lie apart, and its columns."""
    return block_table.stride(0), block_table.shape[1]


@triton.jit
def store_entry(pooled, norm_weight, eps, cos_sin, entries, slot, D: tl.constexpr, ROPE: tl.constexpr):
    """Normalise, rotate, quantise and store one pooled entry.

    pooled: [D] fp32
    cos_sin: pointer to its table row
    entries: an `EntryGroup`
    """
    d = tl.arange(0, D)
    y = pooled * tl.rsqrt(tl.sum(pooled * pooled, 0) / D + eps) * tl.load(norm_weight + d).to(tl.float32)
    row = rotate_pairs(tl.reshape(y, [1, D]), cos_sin, D - ROPE, ROPE, D)  # [1, D]
    if entries.FORMAT >= 2:  # packed index keys
        x = tl.reshape(row, [D]).to(tl.bfloat16).to(tl.float32)
        row = tl.reshape(hadamard_row(x, D), [1, D])
    page = entries.pages + (slot // entries.ROWS).to(tl.int64) * entries.page_stride
    store_row(page, slot % entries.ROWS, row, D, ROPE, entries.ROWS, entries.FORMAT)
