# SPDX-License-Identifier: Apache-2.0
"""Number formats inside kernels equal torch's and the references', bit for bit."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from dsv4.ops.quant import reference
from dsv4.ops.quant import triton as quant

BLOCK = 4096


@InterpretedFunction
def _run(x, y, n, WHAT: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    v = tl.load(x + at, mask=inside)
    if WHAT == "encode_e4m3":
        r = quant.encode_e4m3(v)
    elif WHAT == "encode_e2m1":
        r = quant.encode_e2m1(v)
    elif WHAT == "decode_e4m3":
        r = quant.decode_e4m3(v)
    elif WHAT == "decode_e4m3_f16":
        r = quant.decode_e4m3_f16(v, False).to(tl.float32) * 256.0
    elif WHAT == "decode_e2m1":
        r = quant.decode_e2m1(v)
    else:
        r = quant.ue8m0_value(v)
    tl.store(y + at, r, mask=inside)


def run(what: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    y = torch.empty(x.shape, dtype=dtype)
    _run[(triton.cdiv(x.numel(), BLOCK),)](x, y, x.numel(), WHAT=what, BLOCK=BLOCK)
    return y


CODES = torch.arange(256, dtype=torch.uint8)


def boundaries(values: Tensor) -> Tensor:
    """Every number of a format, every midpoint between neighbours, and the fp32 on both sides of
    each; both signs."""
    middle = (values[1:] + values[:-1]) / 2
    points = torch.cat([values, middle])
    bits = points.view(torch.int32)
    points = torch.cat([points, (bits + 1).view(torch.float32), (bits - 1).clamp(min=0).view(torch.float32)])
    extra = torch.tensor(
        [448.0, 449.0, 463.9, 464.0, 465.0, 5.0, 6.5, 1e9, float("inf"), 0.0, 2.0**-9, 2.0**-10, 2.0**-11, 1e-38, 1e-45]
    )
    return torch.cat([points, extra, -points, -extra])


def test_decoding_e4m3_is_exact_for_every_code() -> None:
    expected = CODES.view(torch.float8_e4m3fn).float()
    finite = ~expected.isnan()
    for what in ("decode_e4m3", "decode_e4m3_f16"):
        got = run(what, CODES, torch.float32)
        assert torch.equal(got[finite], expected[finite])
        assert torch.equal(got.signbit()[finite], expected.signbit()[finite])


def test_decoding_ue8m0_is_exact_for_every_code() -> None:
    got = run("ue8m0_value", CODES, torch.float32)
    assert torch.equal(got.view(torch.int32), reference.ue8m0_value(CODES).view(torch.int32))


def test_decoding_e2m1_is_exact_for_every_code() -> None:
    got = run("decode_e2m1", CODES, torch.float32)
    expected = torch.tensor(reference._E2M1)[(CODES & 15).int()]
    assert torch.equal(got.view(torch.int32), expected.view(torch.int32))


def test_encoding_e4m3_rounds_to_nearest_even_and_saturates() -> None:
    finite = CODES[:127].view(torch.float8_e4m3fn).float()
    x = torch.cat([boundaries(finite), torch.randn(20000) * 100, torch.randn(20000) * 1e-2])
    expected = x.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    assert torch.equal(run("encode_e4m3", x, torch.uint8), expected)


def test_encoding_e4m3_keeps_nan() -> None:
    got = run("encode_e4m3", torch.tensor([float("nan"), -float("nan")]), torch.uint8)
    assert (got & 0x7F == 0x7F).all()


def test_encoding_e2m1_rounds_to_nearest_even_and_saturates() -> None:
    x = torch.cat([boundaries(torch.tensor(reference._E2M1[:8])), torch.randn(20000) * 3])
    # A group of one number with amax 6 beside it has scale 1, so the reference's code is that of
    # the number itself.
    packed, scale = reference.quantize_e2m1(torch.stack([x.clamp(-6, 6), torch.full_like(x, 6.0)], -1).repeat(1, 16))
    assert (scale == 127).all()
    assert torch.equal(run("encode_e2m1", x, torch.uint8), packed[:, 0] & 15)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=64))
def test_any_fp32_encodes_to_the_nearest_e4m3(values: list[float]) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    expected = x.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    assert torch.equal(run("encode_e4m3", x, torch.uint8), expected)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=64))
def test_any_fp32_encodes_to_the_nearest_e2m1(values: list[float]) -> None:
    """The nearer of the two neighbours, the even code between them: chosen here by comparing
    distances."""
    x = torch.tensor(values, dtype=torch.float32)
    codes = run("encode_e2m1", x, torch.uint8)
    table = torch.tensor(reference._E2M1[:8], dtype=torch.float64)
    distance = (x.double().abs().clamp(max=6.0)[:, None] - table).abs()
    nearest = distance == distance.amin(-1, keepdim=True)  # one code, or two neighbours of which one is even
    even = torch.arange(8) % 2 == 0
    expected = torch.where(nearest.sum(-1) == 1, nearest.int().argmax(-1), (nearest & even).int().argmax(-1))
    assert torch.equal((codes & 7).long(), expected)
    assert torch.equal(codes >> 3, x.signbit().to(torch.uint8))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=64))
@pytest.mark.parametrize("number", ["e4m3", "e2m1"])
def test_decoding_what_was_encoded_encodes_to_the_same_code(number: str, values: list[float]) -> None:
    codes = run(f"encode_{number}", torch.tensor(values, dtype=torch.float32), torch.uint8)
    assert torch.equal(run(f"encode_{number}", run(f"decode_{number}", codes, torch.float32), torch.uint8), codes)


@InterpretedFunction
def _store(x, pages, FORMAT: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr):
    t = tl.program_id(0)
    row = tl.load(x + t * D + tl.arange(0, D)[None, :]).to(tl.float32)
    quant.store_row(pages, t, row, D, 64, ROWS, FORMAT)


def store(x: Tensor, row_format: reference.KvFormat | reference.IndexFormat) -> tuple[Tensor, Tensor]:
    """One page with a row per row of x, as the kernels write it: value bytes and scale bytes."""
    rows, dim = x.shape
    values, scales = reference.encode_row(x, row_format, 64)
    page = torch.full((values.numel() + scales.numel(),), 0xFF, dtype=torch.uint8)
    _store[(rows,)](x, page, FORMAT=quant.format_code(row_format), D=dim, ROWS=rows)
    return page[: values.numel()].view(values.shape), page[values.numel() :].view(scales.shape)


PACKED = [(reference.KvFormat.FP8_DS_MLA, 512), (reference.IndexFormat.FP8, 128), (reference.IndexFormat.MXFP4, 128)]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(-120, 100), st.integers(0, 40))
@pytest.mark.parametrize(("row_format", "dim"), PACKED)
def test_rows_of_any_magnitude_are_stored_as_the_reference_stores_them(
    row_format: reference.KvFormat | reference.IndexFormat, dim: int, seed: int, exponent: int, spread: int
) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2, dim)) * 2.0 ** (exponent + rng.integers(-spread, spread + 1, (2, dim)).clip(-25, 25))
    x[rng.random((2, dim)) < 0.1] = 0
    rows = torch.from_numpy(x).to(torch.bfloat16)
    for got, expected in zip(store(rows, row_format), reference.encode_row(rows, row_format, 64), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize(("row_format", "dim"), PACKED)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_nan_or_infinity_stays_visible_in_its_group_and_nowhere_else(
    row_format: reference.KvFormat | reference.IndexFormat, dim: int, bad: float
) -> None:
    x = torch.randn(2, dim).bfloat16()
    x[0, 5] = bad
    values, scales = store(x, row_format)
    group = {512: 64, 128: 128}[dim] if row_format is not reference.IndexFormat.MXFP4 else 32
    decoded = reference.decode_row(values, scales, row_format, 64)
    want = reference.decode_row(*reference.encode_row(x, row_format, 64), row_format, 64)
    assert torch.equal(decoded.isnan(), want.isnan())
    assert decoded[0, :group].isnan().all()
    assert decoded[0, group:].isfinite().all()
    assert torch.equal(
        decoded[1], reference.decode_row(*reference.encode_row(x[1:], row_format, 64), row_format, 64)[0]
    )


# ---- the packed decodes, whose PTX no interpreter runs: what their text says, on every code in
# every lane ---


def _prmt(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """Byte i of the result is byte number (nibble i of selector) of {b, a}."""
    sources = [(half >> (8 * i)) & 0xFF for half in (a, b) for i in range(4)]
    nibbles = [(int(selector[0]) >> (4 * i)) & 7 for i in range(4)]
    return sum((sources[n] << (8 * i) for i, n in enumerate(nibbles)), np.zeros_like(a))


def _halves(word: np.ndarray) -> Tensor:
    """The two bf16 of words, as fp64."""
    both = np.stack([word & 0xFFFF, word >> 16]).astype(np.uint16)
    return torch.from_numpy(both).view(torch.bfloat16).double()


def _fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """fma.rn.bf16x2, for an addend of -0. Products of codes and powers of two are exact in fp64,
    and in fp32 unless they leave its range."""
    assert (c == 0x80008000).all()
    x, y = _halves(a), _halves(b)
    low, high = (x * y).bfloat16().view(torch.uint16).numpy().astype(np.uint64)
    return low | high << 16


PTX = {
    "mov.b32": lambda a: a,
    "prmt.b32": _prmt,
    "shl.b32": lambda a, n: (a << n) & 0xFFFFFFFF,
    "shr.b32": lambda a, n: a >> n,
    "and.b32": lambda a, b: a & b,
    "lop3.b32": lambda a, b, c, table: (a & b) | c if (table == 0xEA).all() else 1 / 0,
    "fma.rn.bf16x2": _fma,
}


def execute(kernel: Any, *registers: np.ndarray) -> list[np.ndarray]:
    """What the inline assembly of a kernel's function leaves in its outputs, given its input
    registers, instruction by instruction."""
    source = inspect.getsource(kernel.fn)
    text = source.split('"""')[1].strip("{}\n ")
    outputs = source.split('"""')[2].count("=r") + source.split('"""')[2].count("=&r")
    values = {f"${outputs + i}": r.astype(np.uint64) for i, r in enumerate(registers)}

    def value(name: str) -> np.ndarray:
        return values[name] if name in values else np.full_like(registers[0], int(name, 0), dtype=np.uint64)

    for line in text.split(";"):
        if line.strip() and not line.strip().startswith(".reg"):
            instruction, operands = line.split(None, 1)
            to, *given = (o.strip() for o in operands.split(","))
            values[to] = PTX[instruction](*map(value, given))
    return [values[f"${i}"] for i in range(outputs)]


def words(lane: int) -> np.ndarray:
    """Four codes to a word, every code in this lane, others beside it."""
    others = [(np.arange(256, dtype=np.uint64) * 7 + 31 * i) % 256 for i in range(4)]
    others[lane] = np.arange(256, dtype=np.uint64)
    return sum(o << (8 * i) for i, o in enumerate(others))


def lanes(*outputs: np.ndarray) -> list[np.ndarray]:
    return [half.astype(np.uint16) for word in outputs for half in (word & 0xFFFF, word >> 16)]


@pytest.mark.parametrize("lane", range(4))
def test_the_packed_decode_of_e4m3_is_exact_for_every_code_in_every_lane(lane: int) -> None:
    halves = lanes(*execute(quant._decode_e4m3_f16_ptx, words(lane)))
    got = torch.from_numpy(halves[lane]).view(torch.float16).double() * 2.0**8
    expected = CODES.view(torch.float8_e4m3fn).double()
    finite = ~expected.isnan()
    assert torch.equal(got[finite], expected[finite])
    assert torch.equal(got.signbit()[finite], expected.signbit()[finite])


def bf16_scales() -> Tensor:
    return reference.ue8m0_value(CODES).bfloat16()


@pytest.mark.parametrize("lane", range(4))
def test_the_packed_dequantisation_of_e4m3_is_exact_for_every_code_and_scale_in_every_lane(lane: int) -> None:
    finite = ~CODES.view(torch.float8_e4m3fn).float().isnan()
    for scale in bf16_scales():
        both = np.full(256, int(scale.view(torch.uint16)) * 0x10001, dtype=np.uint64)
        halves = lanes(*execute(quant._dequantize_e4m3_bf16_ptx, words(lane), both, both))
        got = torch.from_numpy(halves[lane]).view(torch.bfloat16)
        expected = (CODES.view(torch.float8_e4m3fn).float() * scale.float()).bfloat16()
        torch.testing.assert_close(got[finite], expected[finite], rtol=0, atol=0, equal_nan=True)
        assert torch.equal(got.signbit()[finite], expected.signbit()[finite]) or scale.isnan()


@pytest.mark.parametrize("lane", range(4))
def test_the_packed_dequantisation_of_e2m1_is_exact_for_every_byte_and_scale_in_every_lane(lane: int) -> None:
    table = torch.tensor(reference._E2M1)
    for scale in bf16_scales():
        both = np.full(256, int(scale.view(torch.uint16)) * 0x10001, dtype=np.uint64)
        halves = lanes(*execute(quant._dequantize_e2m1_ptx, words(lane), both, both))
        for nibble, codes in ((0, CODES & 15), (1, CODES >> 4)):
            got = torch.from_numpy(halves[4 * nibble + lane]).view(torch.bfloat16)
            expected = (table[codes.int()] * scale.float()).bfloat16()
            torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
            assert torch.equal(got.signbit(), expected.signbit()) or scale.isnan()
