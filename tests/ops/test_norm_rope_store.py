# SPDX-License-Identifier: Apache-2.0
"""q and kv are normalised, rotated and stored as the reference does it, and nothing else in the
cache is touched."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dsv4.model.kv_layout import KvFormat
from dsv4.ops import attention
from dsv4.ops.attention import reference
from dsv4.ops.norm import rms_norm
from dsv4.ops.pages import Pages, SlotMapping, load_rows
from dsv4.ops.rope import apply_rope, cos_sin
from tests.support.kernel_cases import (
    assert_bytes_equal,
    assert_encodes,
    assert_within,
    clone_pages,
    make_pages,
    memory,
)

EPS = 1e-6
FREQ = 1e4 ** (-torch.arange(0, 64, 2) / 64)


def inputs(
    num_tokens: int, num_heads: int, dtype: torch.dtype, rows: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, kv, its weight, the table and slots: every other token is stored, on both ends of a page
    among others."""
    q, kv = torch.randn(num_tokens, num_heads, 512).to(dtype), (torch.randn(num_tokens, 512) * 3).to(dtype)
    positions = torch.randint(0, 1_000_000, (num_tokens,))
    slots = (torch.arange(num_tokens, dtype=torch.int32) * 2 + rows - 1).int()
    slots[1::3] = -1
    return q, kv, torch.rand(512) + 0.5, cos_sin(positions, FREQ), slots


def pages_for(row_format: KvFormat, num_tokens: int, rows: int, dtype: torch.dtype) -> Pages:
    return make_pages(row_format, (2 * num_tokens + rows) // rows + 1, rows, 512, dtype)


@pytest.mark.parametrize(
    ("num_tokens", "num_heads", "rows"), [(1, 8, 64), (2, 16, 2), (63, 3, 64), (5, 64, 256), (2, 128, 64), (257, 8, 64)]
)
@pytest.mark.parametrize("row_format", list(KvFormat))
def test_rotated_queries_and_stored_rows_are_the_references(
    num_tokens: int, num_heads: int, rows: int, row_format: KvFormat
) -> None:
    q, kv, weight, table, slots = inputs(num_tokens, num_heads, torch.bfloat16, rows)
    pages = pages_for(row_format, num_tokens, rows, torch.bfloat16)
    expected_pages = clone_pages(pages)
    out = attention.norm_rope_store(q, kv, weight, EPS, table, SlotMapping(pages, slots))
    low = reference.norm_rope_store(q, kv, weight, EPS, table, SlotMapping(expected_pages, slots))
    exact = apply_rope(reference.head_rms_norm(q.float(), EPS), table)
    assert_within(out, exact, low)

    kept = slots >= 0
    rows_at = slots[kept]
    if row_format is KvFormat.PLAIN:
        exact_kv = apply_rope(rms_norm(kv.float(), weight, EPS), table)[kept]
        assert_within(
            load_rows(pages, rows_at, 512, 64).bfloat16(), exact_kv, load_rows(expected_pages, rows_at, 512, 64)
        )
    else:
        source = apply_rope(rms_norm(kv, weight, EPS), table)[kept].float()
        page, row = rows_at.long() // rows, rows_at.long() % rows
        values = torch.stack([pages.data[p, r * 576 : (r + 1) * 576] for p, r in zip(page, row, strict=True)])
        scales = torch.stack(
            [pages.data[p, rows * 576 + r * 8 : rows * 576 + (r + 1) * 8] for p, r in zip(page, row, strict=True)]
        )
        # kv is rounded to bf16 twice before; a flip of the first moves the result by one bf16 ulp.
        assert_encodes(values, scales, source, row_format, 64, slack=2.0**-8)
    # Blank the rows that were meant to be written: every other byte is as it was.
    for p in (pages, expected_pages):
        for slot in rows_at.tolist():
            if row_format is KvFormat.PLAIN:
                p.data[slot // rows, slot % rows] = 0
            else:
                at = slot % rows
                p.data[slot // rows, at * 576 : (at + 1) * 576] = 0
                p.data[slot // rows, rows * 576 + at * 8 : rows * 576 + (at + 1) * 8] = 0
    assert_bytes_equal(pages, expected_pages)


def test_bytes_are_the_references_bit_for_bit_where_the_norm_is_exact() -> None:
    """Rows of +-2**k have a mean square that fp32 holds exactly in any order of summation."""
    num_tokens, rows = 17, 8
    _, _, _, table, slots = inputs(num_tokens, 1, torch.bfloat16, rows)
    kv = torch.where(torch.rand(num_tokens, 512) < 0.5, -2.0, 2.0).bfloat16()
    weight = torch.randn(512).exp2()
    pages = pages_for(KvFormat.FP8_DS_MLA, num_tokens, rows, torch.bfloat16)
    expected = clone_pages(pages)
    q = torch.randn(num_tokens, 1, 512).bfloat16()
    attention.norm_rope_store(q, kv, weight, 0.0, table, SlotMapping(pages, slots))
    reference.norm_rope_store(q, kv, weight, 0.0, table, SlotMapping(expected, slots))
    assert_bytes_equal(pages, expected)


def test_fp32_rows_for_the_cpu_platform() -> None:
    q, kv, weight, table, slots = inputs(3, 8, torch.float32, 4)
    pages = pages_for(KvFormat.PLAIN, 3, 4, torch.float32)
    expected = clone_pages(pages)
    out = attention.norm_rope_store(q, kv, weight, EPS, table, SlotMapping(pages, slots))
    want = reference.norm_rope_store(q, kv, weight, EPS, table, SlotMapping(expected, slots))
    torch.testing.assert_close(
        out, want, rtol=4 * 2.0**-23, atol=4 * 2.0**-23
    )  # four fp32 roundings: rms, norm, two products
    kept = slots[slots >= 0]
    torch.testing.assert_close(
        load_rows(pages, kept, 512, 64), load_rows(expected, kept, 512, 64), rtol=5 * 2.0**-23, atol=2.0**-20
    )


def test_slots_beyond_the_pages_write_nothing() -> None:
    q, kv, weight, table, _ = inputs(3, 1, torch.bfloat16, 4)
    pages = make_pages(KvFormat.FP8_DS_MLA, 2, 4, 512)
    before = memory(pages).clone()
    for slots in ([8, 1 << 30, -1], [-1, -1, -1]):
        attention.norm_rope_store(q, kv, weight, EPS, table, SlotMapping(pages, torch.tensor(slots, dtype=torch.int32)))
        assert torch.equal(memory(pages), before)


def test_no_tokens_is_no_launch() -> None:
    q, kv, weight, table, slots = inputs(0, 8, torch.bfloat16, 4)
    pages = pages_for(KvFormat.PLAIN, 0, 4, torch.bfloat16)
    assert attention.norm_rope_store(q, kv, weight, EPS, table, SlotMapping(pages, slots)).shape == (0, 8, 512)


@pytest.mark.parametrize(("num_tokens", "num_heads"), [(1, 128), (2, 64), (63, 8), (257, 16)])
def test_outputs_rotate_back_before_the_grouped_product(num_tokens: int, num_heads: int) -> None:
    """Groups of 8 heads, as in both models."""
    o, wo_a = (
        torch.randn(num_tokens, num_heads, 512).bfloat16(),
        (torch.randn(num_heads // 8, 16, 8 * 512) / 64).bfloat16(),
    )
    table = cos_sin(torch.randint(0, 1000, (num_tokens,)), FREQ)
    exact = reference.output_a(o.float(), table, wo_a.float())
    assert_within(attention.output_a(o, table, wo_a), exact, reference.output_a(o, table, wo_a))
