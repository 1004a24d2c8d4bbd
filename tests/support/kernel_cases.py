# SPDX-License-Identifier: Apache-2.0
"""Paged memory, batches and bounds for kernel tests. Memory that no row owns is 0xFF bytes: NaN in
every format."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.model.kv_layout import IndexFormat, KvFormat, RowFormat, round_up
from dsv4.ops.pages import Pages, RowsFormat, store_rows
from dsv4.ops.quant.reference import encode_row

PACKED_WIDTH = {
    KvFormat.FP8_DS_MLA: RowFormat(576, 8),
    IndexFormat.FP8: RowFormat(128, 4),
    IndexFormat.MXFP4: RowFormat(64, 4),
}
ULP = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
ROUNDING = {dtype: ulp / 2 for dtype, ulp in ULP.items()}  # relative error of one rounding to nearest


def make_pages(
    row_format: RowsFormat,
    num_pages: int,
    rows: int,
    dim: int,
    dtype: torch.dtype = torch.bfloat16,
    alignment: int = 576,
) -> Pages:
    """NaN-filled pages with a page stride larger than the page, as engines have when caches share a
    block."""
    if row_format in (KvFormat.PLAIN, IndexFormat.PLAIN):
        row_bytes = dim * dtype.itemsize
        memory = torch.full((num_pages, round_up(rows * row_bytes, 512) + 512), 0xFF, dtype=torch.uint8)
        data = memory.view(dtype)[:, : rows * dim].unflatten(1, (rows, dim))
        return Pages(data, rows, row_format)
    page_bytes = round_up(rows * PACKED_WIDTH[row_format].row_bytes, alignment)
    memory = torch.full((num_pages, page_bytes + alignment), 0xFF, dtype=torch.uint8)
    return Pages(memory[:, :page_bytes], rows, row_format)


def clone_pages(pages: Pages) -> Pages:
    """A copy with the same strides, padding bytes included."""
    copy = memory(pages).clone().view(pages.data.dtype)
    return Pages(
        copy.as_strided(pages.data.shape, pages.data.stride(), pages.data.storage_offset()), pages.rows, pages.format
    )


def memory(pages: Pages) -> Tensor:
    """Every byte of the pages and of what lies between them: uint8, flat."""
    return torch.tensor([], dtype=torch.uint8).set_(pages.data.untyped_storage())


def fill_pages(pages: Pages, slots: Tensor, rows: Tensor, rope_dim: int) -> None:
    """Write rows with the reference."""
    store_rows(pages, slots, rows, rope_dim)


def assert_bytes_equal(actual: Pages, expected: Pages) -> None:
    """Bit for bit, what nobody owns included."""
    a, b = memory(actual), memory(expected)
    different = (a != b).nonzero().flatten()
    assert different.numel() == 0, f"{different.numel()} of {a.numel()} bytes differ, first at {different[:8].tolist()}"


def assert_encodes(
    values: Tensor, scales: Tensor, source: Tensor, row_format: RowsFormat, rope_dim: int, slack: float
) -> None:
    """The bytes are the encoding of `source`, or of a row within `slack` (relative) of it.

    fp32 sums in another order differ in the last bits, and a value that lies within them of a
    rounding boundary may fall on either side. values, scales: uint8 [T, *]; source: fp32 [T, D].
    """
    options = [encode_row(source * factor, row_format, rope_dim) for factor in (1.0, 1.0 + slack, 1.0 - slack)]
    exact = (values == options[0][0]).float().mean()
    assert exact > 0.995, f"only {exact:.4f} of the value bytes are the reference's"
    for got, column in ((values, 0), (scales, 1)):
        ok = torch.stack([got == option[column] for option in options]).any(0)
        assert ok.all(), f"{int((~ok).sum())} bytes encode another number"


def assert_within(actual: Tensor, exact: Tensor, at_precision: Tensor, name: str = "") -> None:
    """Design rule 6.8: error against the fp32 reference at most twice that of the reference at the
    kernel's precision, plus a rounding.

    The error is the largest of a row (last axis), since a row's elements share their sums. Same
    infinities and NaNs.
    """
    actual_f, exact_f = actual.double(), exact.double()
    assert torch.equal(actual_f.isnan(), exact_f.isnan()), f"{name}: NaN elsewhere"
    assert torch.equal(actual_f.isinf(), exact_f.isinf()), f"{name}: infinity elsewhere"
    finite = exact_f.isfinite()
    assert torch.equal(actual_f[~finite & ~exact_f.isnan()], exact_f[~finite & ~exact_f.isnan()]), (
        f"{name}: another infinity"
    )
    zero = torch.zeros((), dtype=torch.float64)
    error = torch.where(finite, (actual_f - exact_f).abs(), zero).amax(-1)
    allowed = 2 * torch.where(finite, (at_precision.double() - exact_f).abs(), zero).amax(-1)
    allowed = allowed + ROUNDING[actual.dtype] * torch.where(finite, exact_f.abs(), zero).amax(-1)
    worst = (error - allowed).max() if error.numel() else zero
    assert worst <= 0, f"{name}: error {error.max():.3e}, allowed {allowed.flatten()[(error - allowed).argmax()]:.3e}"
