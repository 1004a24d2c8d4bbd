# SPDX-License-Identifier: Apache-2.0
"""vLLM's own Triton kernels and ours write and read the same bytes: fp8_ds_mla pages and compressor
state.

vLLM replaces Triton by placeholders where there is no GPU driver, so its kernels' source is taken
from the installed package and run in the interpreter unchanged.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import triton

from dsv4.model.kv_layout import KvFormat
from dsv4.ops import attention
from dsv4.ops.compressor import paged as compressor
from dsv4.ops.compressor.projected import EntryStep, Projected
from dsv4.ops.pages import Pages, Selection, SlotMapping, load_rows, store_rows
from dsv4.ops.rope import cos_sin
from tests.support.kernel_cases import clone_pages, make_pages, memory

FREQ = 1.6e5 ** (-torch.arange(0, 64, 2) / 64)
ROWS = 64


@pytest.fixture
def native(tmp_path: Path) -> ModuleType:
    """The three native kernels, as functions of one module."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("vllm is not installed")
    folder = Path(spec.submodule_search_locations[0], "models/deepseek_v4/common/ops")
    parts = ["import triton", "import triton.language as tl"]
    for file, scope, name in (
        ("cache_utils.py", "", "quantize_and_insert_k_kernel"),
        ("cache_utils.py", "DequantizeAndGatherKCacheKernel", "kernel"),
        ("save_partial_states.py", "SavePartialStatesKernel", "kernel"),
        ("fused_compress_quant_cache.py", "", "_fused_kv_compress_norm_rope_insert_sparse_attn"),
    ):
        tree = ast.parse((folder / file).read_text())
        body = (
            next(n.body for n in tree.body if isinstance(n, ast.ClassDef) and n.name == scope) if scope else tree.body
        )
        function = next(n for n in body if isinstance(n, ast.FunctionDef) and n.name == name)
        function.name = f"{scope or 'module'}_{name}".lower()
        function.decorator_list = [ast.parse("triton.jit", mode="eval").body]
        parts.append(ast.unparse(function))
    (tmp_path / "native_kernels.py").write_text("\n\n".join(parts) + "\n")
    spec = importlib.util.spec_from_file_location("native_kernels", tmp_path / "native_kernels.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["native_kernels"] = module
    spec.loader.exec_module(module)
    return module


def native_pages(num_pages: int) -> Pages:
    return make_pages(KvFormat.FP8_DS_MLA, num_pages, ROWS, 512)


def test_native_writer_and_our_kernel_write_the_same_page(native: ModuleType) -> None:
    """Rows of +-1 have a mean square of exactly 1, so that our norm leaves weight * sign and the
    bytes can be compared."""
    slots = torch.tensor([0, 63, 64, -1, 130], dtype=torch.int64)
    sign = torch.where(torch.rand(5, 512) < 0.5, -1.0, 1.0).bfloat16()
    weight = (torch.randn(512) * torch.linspace(-9, 9, 512).exp2()).bfloat16()
    mine, theirs = native_pages(3), native_pages(3)
    table = cos_sin(torch.zeros(5, dtype=torch.int64), FREQ)
    attention.norm_rope_store(sign[:, None], sign, weight.float(), 0.0, table, SlotMapping(mine, slots.int()))
    rows = (sign.float() * weight.float()).bfloat16()
    native.module_quantize_and_insert_k_kernel[(5,)](
        rows,
        slots,
        theirs.data,
        5,
        input_dim=512,
        fp8_dim=448,
        bf16_dim=64,
        scale_dim=8,
        quant_block=64,
        cache_block_size=ROWS,
        token_data_size=576,
        block_stride=theirs.data.stride(0),
        fp8_max=448.0,
        n_quant_blocks=8,
    )
    assert torch.equal(memory(mine), memory(theirs))


def test_native_reader_reads_what_our_kernel_wrote(native: ModuleType) -> None:
    pages = native_pages(4)
    table = torch.tensor([[3, 1]], dtype=torch.int32)
    n = 100
    at = torch.arange(n)
    slots = table[0, at // ROWS] * ROWS + (at % ROWS).int()
    kv = torch.randn(n, 512).bfloat16() * 3
    attention.norm_rope_store(
        kv[:, None], kv, torch.rand(512) + 0.5, 1e-6, cos_sin(at, FREQ), SlotMapping(pages, slots)
    )
    out = torch.zeros(1, n, 512, dtype=torch.bfloat16)
    native.dequantizeandgatherkcachekernel_kernel[(1, 8)](
        out,
        out.stride(0),
        out.stride(1),
        pages.data,
        torch.tensor([n], dtype=torch.int32),
        table,
        0,
        None,
        max_blocks_per_seq=2,
        fp8_dim=448,
        bf16_dim=64,
        scale_dim=8,
        quant_block=64,
        cache_block_size=ROWS,
        token_data_size=576,
        block_stride=pages.data.stride(0),
        output_dim=512,
        fp8_max=448.0,
        n_quant_blocks=8,
    )
    assert torch.equal(out[0].float(), load_rows(pages, slots, 512, 64))


def test_our_attention_reads_what_the_native_writer_wrote(native: ModuleType) -> None:
    n = 70
    mine, theirs = native_pages(2), native_pages(2)
    slots, rows = torch.randperm(2 * ROWS)[:n], torch.randn(n, 512).bfloat16() * 2
    store_rows(mine, slots, rows, 64)
    native.module_quantize_and_insert_k_kernel[(n,)](
        rows,
        slots,
        theirs.data,
        n,
        input_dim=512,
        fp8_dim=448,
        bf16_dim=64,
        scale_dim=8,
        quant_block=64,
        cache_block_size=ROWS,
        token_data_size=576,
        block_stride=theirs.data.stride(0),
        fp8_max=448.0,
        n_quant_blocks=8,
    )
    q = torch.randn(2, 8, 512).bfloat16()
    window = torch.stack([slots[:64], slots[6:]]).int()
    lens, sink = torch.tensor([64, 50], dtype=torch.int32), torch.randn(8)
    of_mine, of_theirs = (
        attention.sparse_attention(q, Selection(pages, window, lens), None, sink) for pages in (mine, theirs)
    )
    for a, b in zip(of_mine, of_theirs, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("ratio", "overlap", "state_rows", "rows"), [(4, 2, 4, 64), (128, 1, 8, 2)])
def test_native_compressor_and_ours_share_state_and_entries(
    native: ModuleType, ratio: int, overlap: int, state_rows: int, rows: int
) -> None:
    """Ours saves the state, both pool it; then theirs saves it: the same bytes both times."""
    num_tokens, width = 2 * ratio, overlap * 512
    state = make_pages(KvFormat.PLAIN, num_tokens // state_rows + 1, state_rows, 2 * width, torch.float32)
    native_state = clone_pages(state)
    table = torch.randperm(num_tokens // state_rows).int()[None]
    positions = torch.arange(num_tokens)
    slots = (table[0, positions // state_rows] * state_rows + positions % state_rows).int()
    kv, gate, ape = torch.randn(num_tokens, width), torch.randn(num_tokens, width), torch.randn(ratio, width)
    weight = torch.rand(512) + 0.5
    projected = Projected(kv, gate, ape, weight)
    compressor.save_state(projected, positions, SlotMapping(state, slots))
    native.savepartialstateskernel_kernel[(num_tokens,)](
        kv,
        kv.stride(0),
        gate,
        gate.stride(0),
        ape,
        ape.stride(0),
        positions,
        native_state.data,
        native_state.data.stride(0),
        native_state.data.stride(1),
        slots,
        state_rows,
        HEAD_SIZE=width,
        TRITON_BLOCK_SIZE=triton.next_power_of_2(width),
        STATE_WIDTH=width,
        COMPRESS_RATIO=ratio,
    )
    assert torch.equal(memory(state), memory(native_state))

    entry_slots = torch.where((positions + 1) % ratio == 0, positions // ratio, -1).int()
    mine, theirs = (make_pages(KvFormat.FP8_DS_MLA, 2, rows, 512) for _ in range(2))
    request, freq_table = torch.zeros(num_tokens, dtype=torch.int32), cos_sin(positions, FREQ)
    step = EntryStep(
        positions=positions,
        request_of_token=request,
        ratio=ratio,
        overlap=overlap,
        eps=1e-6,
        entry_cos_sin=freq_table[positions // ratio * ratio],
    )
    paged = compressor.PagedState(projected, SlotMapping(state, slots), table, SlotMapping(mine, entry_slots))
    compressor.compress_store([paged], step)
    native.module__fused_kv_compress_norm_rope_insert_sparse_attn[(num_tokens,)](
        state.data,
        state.data.stride(0),
        state.data.stride(1),
        request,
        positions,
        slots,
        table,
        table.stride(0),
        state_rows,
        weight,
        1e-6,
        freq_table,
        freq_table.stride(0),
        theirs.data,
        entry_slots,
        rows,
        HEAD_SIZE=512,
        TRITON_BLOCK_SIZE=512,
        STATE_WIDTH=width,
        COMPRESS_RATIO=ratio,
        OVERLAP=overlap - 1,
        ROPE_HEAD_DIM=64,
        FP8_MAX=448.0,
        QUANT_BLOCK=64,
        TOKEN_STRIDE=576,
        SCALE_DIM=8,
        KV_BLOCK_STRIDE=theirs.data.stride(0),
        SANITIZE_CACHE_NANS=False,
    )
    # Theirs is a two-pass softmax, ours a running one: the last bits of fp32 differ, which may flip
    # a bf16 rounding and with it the nearest e4m3, whose neighbour is 1/8 away.
    different = memory(mine) != memory(theirs)
    assert different.sum() <= 0.01 * 576 * num_tokens // ratio
    where = entry_slots[entry_slots >= 0]
    torch.testing.assert_close(load_rows(mine, where, 512, 64), load_rows(theirs, where, 512, 64), rtol=2.0**-3, atol=0)
