# SPDX-License-Identifier: Apache-2.0
"""The views of paged memory and of a batch that operators take; engine-neutral."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4.model.kv_layout import (
    INDEX_MXFP4_GROUP,
    KV_QUANT_GROUP,
    CacheFormats,
    CacheRole,
    CacheSpec,
    IndexFormat,
    KvFormat,
)
from dsv4.ops.quant.reference import decode_row, encode_row

RowsFormat = KvFormat | IndexFormat
KV_ROPE_DIM = 64  # the rotated channels of an attention row; fp8_ds_mla keeps them in bf16


@dataclass(frozen=True)
class Pages:
    """One cache's memory.

    data: plain rows [P, rows, D], or packed bytes uint8 [P, >= rows * row_bytes]; the page stride
    `data.stride(0)` is free, the inside of a page is contiguous. rows: rows per page. A row's flat
    slot is `page * rows + row`; -1 is none.
    """

    data: Tensor
    rows: int
    format: RowsFormat

    @property
    def num_slots(self) -> int:
        return self.data.shape[0] * self.rows

    @property
    def packed(self) -> bool:
        return self.format not in (KvFormat.PLAIN, IndexFormat.PLAIN)


def row_storage(role: CacheRole, formats: CacheFormats, model_dtype: torch.dtype) -> tuple[RowsFormat, torch.dtype]:
    """How rows of a role are stored, and the dtype of their memory: compressor state is fp32,
    packed rows are bytes."""
    if role in (CacheRole.STATE, CacheRole.INDEX_STATE):
        return KvFormat.PLAIN, torch.float32
    row_format: RowsFormat = formats.index if role is CacheRole.INDEX_KEY else formats.kv
    return row_format, model_dtype if row_format in (KvFormat.PLAIN, IndexFormat.PLAIN) else torch.uint8


def view_pages(memory: Tensor, spec: CacheSpec, row_format: RowsFormat) -> Pages:
    """See an engine's cache tensor [P, rows, content], contiguous inside a page, as `Pages`."""
    pages = Pages(memory, spec.rows_per_page, row_format)
    if pages.packed:
        data = memory if memory.dtype is torch.uint8 else memory.view(torch.uint8)
        pages = Pages(data.flatten(1), spec.rows_per_page, row_format)
    return pages


@dataclass(frozen=True)
class SlotMapping:
    """The row of a cache that each token writes.

    slots: [T] int32; -1 writes nothing
    """

    pages: Pages
    slots: Tensor


@dataclass(frozen=True)
class PageTable:
    """A cache and each request's pages in it.

    block_table: [R, n] int32
    """

    pages: Pages
    block_table: Tensor


@dataclass(frozen=True)
class Selection:
    """Rows of one cache that each token attends: the first lens[t] places of a list; slots outside
    the cache are skipped.

    slots: [N, K] int32, the lists
    lens: [T] int32
    row: [T] int32, which list token t reads; None when list t is token t's own
    """

    pages: Pages
    slots: Tensor
    lens: Tensor
    row: Tensor | None = None

    def slots_of(self, tokens: slice, width: int) -> Tensor:
        """The first `width` places of some tokens' lists: [t, width] int32."""
        return self.slots[tokens, :width] if self.row is None else self.slots[self.row[tokens].long(), :width]


@dataclass(frozen=True)
class BatchView:
    """One engine step, as the core sees it. Padding tokens come last and belong to no request.

    query_start_loc: [R+1] int32; seq_lens: [R] int32, context including this step's tokens.
    num_tokens, num_reqs, max_seq_len, max_query_len: host integers; num_tokens counts padding, the
    last two may be upper bounds, of the context and of the step's tokens of a request.
    """

    query_start_loc: Tensor
    seq_lens: Tensor
    num_tokens: int
    num_reqs: int
    max_seq_len: int
    max_query_len: int

    @property
    def device(self) -> torch.device:
        return self.seq_lens.device


# --------------------------------------------------------------------------------------------
# Rows, in plain PyTorch


def row_widths(pages: Pages, row_dim: int, rope_dim: int) -> tuple[int, int]:
    """Value bytes and scale bytes of a packed row of `row_dim` elements."""
    if pages.format is KvFormat.FP8_DS_MLA:
        return row_dim + rope_dim, (row_dim - rope_dim) // KV_QUANT_GROUP + 1
    return (row_dim, 4) if pages.format is IndexFormat.FP8 else (row_dim // 2, row_dim // INDEX_MXFP4_GROUP)


def store_rows(pages: Pages, slots: Tensor, rows: Tensor, rope_dim: int) -> None:
    """Write rows into their slots; slot -1 writes nothing.

    slots: [T] int; rows: [T, D]. Plain pages store the page's dtype; packed pages store
    `encode_row`'s bytes.
    """
    keep = slots >= 0
    slots, rows = slots[keep].long(), rows[keep]
    page, row = slots // pages.rows, slots % pages.rows
    if not pages.packed:
        pages.data[page, row] = rows.to(pages.data.dtype)
        return
    values, scales = encode_row(rows, pages.format, rope_dim)
    width, scale_width = values.shape[-1], scales.shape[-1]
    columns = torch.arange(width, device=rows.device)
    pages.data[page[:, None], row[:, None] * width + columns] = values
    scale_start = pages.rows * width + row * scale_width
    pages.data[page[:, None], scale_start[:, None] + torch.arange(scale_width, device=rows.device)] = scales


def load_rows(pages: Pages, slots: Tensor, row_dim: int, rope_dim: int) -> Tensor:
    """Read rows: slots [N] int, all valid; fp32 [N, row_dim]."""
    page, row = slots.long() // pages.rows, slots.long() % pages.rows
    if not pages.packed:
        return pages.data[page, row].float()
    width, scale_width = row_widths(pages, row_dim, rope_dim)
    values = pages.data[page[:, None], row[:, None] * width + torch.arange(width, device=slots.device)]
    scale_start = pages.rows * width + row * scale_width
    scales = pages.data[page[:, None], scale_start[:, None] + torch.arange(scale_width, device=slots.device)]
    return decode_row(values, scales, pages.format, rope_dim)
