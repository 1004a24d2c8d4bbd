# SPDX-License-Identifier: Apache-2.0
"""The views of paged memory and of a batch that operators take; engine-neutral."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4.kv_layout import CacheSpec, IndexFormat, KvFormat

RowsFormat = KvFormat | IndexFormat


@dataclass(frozen=True)
class Pages:
    """One cache's memory.

    data: plain rows [P, rows, D], or packed bytes uint8 [P, >= rows * row_bytes]; the page stride `data.stride(0)` is
    free, the inside of a page is contiguous. rows: rows per page. A row's flat slot is `page * rows + row`; -1 is none.
    """

    data: Tensor
    rows: int
    format: RowsFormat

    @property
    def packed(self) -> bool:
        return self.format not in (KvFormat.PLAIN, IndexFormat.PLAIN)


def view_pages(memory: Tensor, spec: CacheSpec, row_format: RowsFormat) -> Pages:
    """See an engine's cache tensor [P, rows, content], contiguous inside a page, as `Pages`."""
    pages = Pages(memory, spec.rows_per_page, row_format)
    if pages.packed:
        data = memory if memory.dtype is torch.uint8 else memory.view(torch.uint8)
        pages = Pages(data.flatten(1), spec.rows_per_page, row_format)
    return pages


@dataclass(frozen=True)
class BatchView:
    """One engine step, as the core sees it. Padding tokens come last and belong to no request.

    query_start_loc: [R+1] int32; seq_lens: [R] int32, context including this step's tokens.
    num_tokens, num_reqs, max_seq_len, max_query_len: host integers; num_tokens counts padding, the last two may be upper
    bounds, of the context and of the step's tokens of a request.
    """

    query_start_loc: Tensor
    seq_lens: Tensor
    num_tokens: int
    num_reqs: int
    max_seq_len: int
    max_query_len: int
