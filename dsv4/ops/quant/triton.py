# SPDX-License-Identifier: Apache-2.0
"""Encode and decode e4m3, e2m1 and ue8m0 inside kernels, as integers: Triton has no e4m3 type below
sm89.

Every function equals its reference in `quant/reference.py` bit for bit. A row or group that holds a
NaN is written with the scale 255, which decodes to NaN; decoding a code may therefore leave NaN
codes unhandled.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dsv4.model.kv_layout import IndexFormat, KvFormat
from dsv4.ops.pages import RowsFormat
from dsv4.ops.quant.reference import E2M1_AMAX_FLOOR, E2M1_MAX, E4M3_AMAX_FLOOR, E4M3_MAX

PLAIN, DS_MLA, INDEX_FP8, INDEX_MXFP4 = 0, 1, 2, 3

# For `ue8m0_ceil`: the smallest amax that counts, and the inverse of the largest code.
E4M3_FLOOR: tl.constexpr = tl.constexpr(E4M3_AMAX_FLOOR)
E4M3_INVERSE_MAX: tl.constexpr = tl.constexpr(1 / E4M3_MAX)
E2M1_FLOOR: tl.constexpr = tl.constexpr(E2M1_AMAX_FLOOR)
E2M1_INVERSE_MAX: tl.constexpr = tl.constexpr(1 / E2M1_MAX)

_FORMATS: dict[RowsFormat, int] = {
    KvFormat.PLAIN: PLAIN,
    IndexFormat.PLAIN: PLAIN,
    KvFormat.FP8_DS_MLA: DS_MLA,
    IndexFormat.FP8: INDEX_FP8,
    IndexFormat.MXFP4: INDEX_MXFP4,
}


def format_code(row_format: RowsFormat) -> int:
    """The constexpr that kernels take for a row format."""
    return _FORMATS[row_format]


# --------------------------------------------------------------------------------------------
# Scales


@triton.jit
def ue8m0_value(code):
    """uint8 -> fp32 2**(code - 127): 0 is the denormal 2**-127, 255 is NaN."""
    u = code.to(tl.uint32)
    bits = tl.where(u == 0, 0x00400000, u << 23)
    return tl.where(u == 255, 0x7FC00000, bits).to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def ue8m0_ceil(amax_bits, FLOOR: tl.constexpr, INVERSE_MAX: tl.constexpr):
    """Biased exponent (int32, at most 255) of the smallest power of two >= max(amax, FLOOR) *
    INVERSE_MAX.

    amax_bits: the fp32 bits of non-negative numbers as int32. Integers order like the numbers, with
    NaN above infinity, so that a NaN survives the maximum, which tl.max over floats would drop.
    """
    floor = tl.full((), FLOOR, tl.float32).to(tl.int32, bitcast=True)
    bits = (tl.maximum(amax_bits, floor).to(tl.float32, bitcast=True) * INVERSE_MAX).to(tl.int32, bitcast=True)
    return tl.minimum((bits >> 23) + tl.where((bits & 0x7FFFFF) != 0, 1, 0), 255)


@triton.jit
def ue8m0_inverse(exponent):
    """1 / 2**(exponent - 127) as fp32 for int32 exponents 1 .. 254; NaN for 255."""
    bits = tl.where(exponent == 254, 0x00400000, (254 - exponent) << 23)
    return tl.where(exponent == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit
def abs_bits(x):
    """The bits of |x|, as int32."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


# --------------------------------------------------------------------------------------------
# Codes


@triton.jit
def encode_e4m3(x):
    """fp32 -> uint8 e4m3fn: nearest even, saturated at 448, NaN to 0x7F."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    clamped = tl.minimum(magnitude, 0x43E00000)  # 448
    # Normal: drop 20 mantissa bits to nearest even; exponent bias 127 becomes 7.
    normal = (clamped + 0x7FFFF + ((clamped >> 20) & 1) - (120 << 23)) >> 20
    # Below 2**-6: beside 2**14 one ulp of fp32 is 2**-9, e4m3's smallest step, so the addition
    # rounds.
    tiny = (clamped.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(clamped < 0x3C800000, tiny, normal)
    code = tl.where(magnitude > 0x7F800000, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def encode_e2m1(x):
    """fp32 -> uint8 with one e2m1 code in the low nibble: nearest even, saturated at 6."""
    bits = x.to(tl.int32, bitcast=True)
    clamped = tl.minimum(bits & 0x7FFFFFFF, 0x40C00000)  # 6
    normal = (clamped + 0x1FFFFF + ((clamped >> 22) & 1) - (126 << 23)) >> 22
    # Below 1: beside 2**22 one ulp is 0.5, e2m1's smallest step.
    tiny = (clamped.to(tl.float32, bitcast=True) + 4194304.0).to(tl.int32, bitcast=True) - 0x4A800000
    code = tl.where(clamped < 0x3F800000, tiny, normal)
    return (code | ((bits >> 28) & 0x8)).to(tl.uint8)


@triton.jit
def decode_e4m3(code):
    """uint8 e4m3fn -> fp32; the NaN codes give 480. The bits are those of value * 2**-120."""
    u = code.to(tl.uint32)
    bits = ((u & 0x80) << 24) | ((u & 0x7F) << 20)
    return bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2**120


@triton.jit
def _decode_e4m3_f16_ptx(code):
    # Four codes in a register become four halves in two: the bytes go to the tops of the halves,
    # then everything below the sign moves down by one, from e4m3's place to fp16's. Not pure: the
    # compiler would copy it into every layout that reads the values.
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 low, high, low_m, high_m;
        prmt.b32 low, $2, 0, 0x1404;
        prmt.b32 high, $2, 0, 0x3424;
        shr.b32 low_m, low, 1;
        shr.b32 high_m, high, 1;
        and.b32 low_m, low_m, 0x3f803f80;
        and.b32 high_m, high_m, 0x3f803f80;
        lop3.b32 $0, low, 0x80008000, low_m, 0xea;
        lop3.b32 $1, high, 0x80008000, high_m, 0xea;
        }""",
        "=r,=r,r",
        [code],
        dtype=tl.float16,
        is_pure=False,
        pack=4,
    )


@triton.jit
def decode_e4m3_f16(code, PTX: tl.constexpr):
    """uint8 e4m3fn -> fp16 that holds value * 2**-8, exactly; the NaN codes give 480 * 2**-8."""
    if PTX:
        halves = _decode_e4m3_f16_ptx(code)
    else:
        u = code.to(tl.uint16)
        halves = (((u & 0x80) << 8) | ((u & 0x7F) << 7)).to(tl.uint16).to(tl.float16, bitcast=True)
    return halves


@triton.jit
def _dequantize_e4m3_bf16_ptx(code, scale):
    # As for fp16, by four places: bf16 bits of value * 2**-120, then times 2**120, then times the
    # scale. sm80 multiplies bf16 by fma only; an addend of -0.0 keeps the sign of zeros. Not pure
    # either.
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 low, high, low_m, high_m, up, nil;
        prmt.b32 low, $2, 0, 0x1404;
        prmt.b32 high, $2, 0, 0x3424;
        shr.b32 low_m, low, 4;
        shr.b32 high_m, high, 4;
        and.b32 low_m, low_m, 0x07f007f0;
        and.b32 high_m, high_m, 0x07f007f0;
        lop3.b32 low, low, 0x80008000, low_m, 0xea;
        lop3.b32 high, high, 0x80008000, high_m, 0xea;
        mov.b32 up, 0x7b807b80;
        mov.b32 nil, 0x80008000;
        fma.rn.bf16x2 low, low, up, nil;
        fma.rn.bf16x2 high, high, up, nil;
        fma.rn.bf16x2 $0, low, $3, nil;
        fma.rn.bf16x2 $1, high, $4, nil;
        }""",
        "=&r,=&r,r,r,r",
        [code, scale],
        dtype=tl.bfloat16,
        is_pure=False,
        pack=4,
    )


@triton.jit
def dequantize_e4m3(code, scale, OUT: tl.constexpr, PTX: tl.constexpr):
    """code * scale in OUT, exactly: codes uint8, scale fp32 powers of two that broadcast to
    them."""
    if PTX and tl.bfloat16 == OUT:
        return _dequantize_e4m3_bf16_ptx(code, scale.to(tl.bfloat16))
    return (decode_e4m3(code) * scale).to(OUT)


@triton.jit
def decode_e2m1(code):
    """The low nibble of any integers -> fp32, exactly. The bits are those of value * 2**-126."""
    u = code.to(tl.uint32)
    bits = ((u & 0x8) << 28) | ((u & 0x7) << 22)
    return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2**126


@triton.jit
def _dequantize_e2m1_ptx(packed, scale):
    # Four bytes become eight bf16: with a byte at the top of a half, the sign of its high nibble is
    # in place, and the other three bits belong six places lower; those of the low nibble two. That
    # is value * 2**-126, which the first product lifts; the second has the scale.
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 x, y, bits, up, nil;
        mov.b32 up, 0x7e807e80;
        mov.b32 nil, 0x80008000;
        prmt.b32 x, $4, 0, 0x1404;
        shl.b32 y, x, 4;
        shr.b32 bits, x, 2;
        and.b32 bits, bits, 0x01c001c0;
        lop3.b32 bits, y, 0x80008000, bits, 0xea;
        fma.rn.bf16x2 bits, bits, up, nil;
        fma.rn.bf16x2 $0, bits, $5, nil;
        shr.b32 bits, x, 6;
        and.b32 bits, bits, 0x01c001c0;
        lop3.b32 bits, x, 0x80008000, bits, 0xea;
        fma.rn.bf16x2 bits, bits, up, nil;
        fma.rn.bf16x2 $2, bits, $5, nil;
        prmt.b32 x, $4, 0, 0x3424;
        shl.b32 y, x, 4;
        shr.b32 bits, x, 2;
        and.b32 bits, bits, 0x01c001c0;
        lop3.b32 bits, y, 0x80008000, bits, 0xea;
        fma.rn.bf16x2 bits, bits, up, nil;
        fma.rn.bf16x2 $1, bits, $6, nil;
        shr.b32 bits, x, 6;
        and.b32 bits, bits, 0x01c001c0;
        lop3.b32 bits, x, 0x80008000, bits, 0xea;
        fma.rn.bf16x2 bits, bits, up, nil;
        fma.rn.bf16x2 $3, bits, $6, nil;
        }""",
        "=&r,=&r,=&r,=&r,r,r,r",
        [packed, scale],
        dtype=(tl.bfloat16, tl.bfloat16),
        is_pure=False,
        pack=4,
    )


@triton.jit
def dequantize_e2m1(packed, scale, PTX: tl.constexpr):
    """The low and the high nibbles of bytes, times scale, in bf16, exactly; scale fp32 powers of
    two that broadcast to the bytes."""
    if PTX:
        low, high = _dequantize_e2m1_ptx(packed, scale.to(tl.bfloat16))
    else:
        low = (decode_e2m1(packed & 15) * scale).to(tl.bfloat16)
        high = (decode_e2m1(packed >> 4) * scale).to(tl.bfloat16)
    return low, high


# --------------------------------------------------------------------------------------------
# Rows


@triton.jit
def rotate_pairs(x, cos_sin, FIRST: tl.constexpr, ROPE: tl.constexpr, D: tl.constexpr, SIGN: tl.constexpr = 1.0):
    """RoPE on channels FIRST .. FIRST + ROPE of x [N, D] fp32, in interleaved pairs; other channels
    pass unchanged.

    cos_sin: pointer to one table row, cosines then sines. SIGN -1 rotates back.
    """
    pair = tl.arange(0, D // 2)
    rotated = (pair >= FIRST // 2) & (pair < (FIRST + ROPE) // 2)
    at = pair - FIRST // 2
    cos = tl.load(cos_sin + at, mask=rotated, other=1.0)[None, :]
    sin = tl.load(cos_sin + ROPE // 2 + at, mask=rotated, other=0.0)[None, :] * SIGN
    a, b = tl.split(tl.reshape(x, [x.shape[0], D // 2, 2]))
    # Not a * 1 - b * 0 for the others: b may be infinite.
    even = tl.where(rotated[None, :], a * cos - b * sin, a)
    odd = tl.where(rotated[None, :], a * sin + b * cos, b)
    return tl.reshape(tl.join(even, odd), [x.shape[0], D])


@triton.jit
def hadamard_sign(D: tl.constexpr):
    """Sylvester's matrix without its norm: +1 or -1, fp32 [D, D]; the sign is the parity of row &
    column."""
    both = tl.arange(0, D)[:, None] & tl.arange(0, D)[None, :]
    both = both ^ (both >> 4)
    both = both ^ (both >> 2)
    both = both ^ (both >> 1)
    if D > 128:
        tl.static_assert(D <= 256, "the folded parity covers 8 bits")
    return (1 - 2 * (both & 1)).to(tl.float32)


@triton.jit
def hadamard_row(x, D: tl.constexpr):
    """Sylvester's matrix times x [D] fp32, with its norm of D**-0.5. D is a power of two, at most
    2**8.

    Each step turns neighbours into their sum and difference and deals these to the two halves: bit
    by bit of the index, back in order after as many steps as it has bits.
    """
    for bit in tl.static_range(8):
        if (1 << bit) < D:
            a, b = tl.split(tl.reshape(x, [D // 2, 2]))
            x = tl.reshape(tl.trans(tl.join(a + b, a - b)), [D])
    return x * (D**-0.5)


@triton.jit
def store_row(
    page,
    row,
    x,
    D: tl.constexpr,
    ROPE: tl.constexpr,
    ROWS: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """Write one row, x [1, D] fp32, as row `row` of the page at the pointer `page`; packed rows are
    rounded to bf16 first.

    Index formats expect rows that the Hadamard matrix has already rotated.
    """
    if FORMAT == 0:  # PLAIN
        d = tl.arange(0, D)[None, :]
        tl.store(page + row * D + d, x.to(page.dtype.element_ty))
    elif FORMAT == 1:  # DS_MLA
        GROUPS: tl.constexpr = D // 64
        NOPE: tl.constexpr = D - ROPE
        tl.static_assert(ROPE == 64 and GROUPS == 8, "a 584-byte row is 7 groups of 64 and 64 rotated channels")
        values = tl.reshape(x, [GROUPS, 64]).to(tl.bfloat16)
        wide = values.to(tl.float32)
        g, d = tl.arange(0, GROUPS), tl.arange(0, 64)
        exponent = ue8m0_ceil(tl.max(abs_bits(wide), 1), E4M3_FLOOR, E4M3_INVERSE_MAX)  # [GROUPS]
        codes = encode_e4m3(wide * ue8m0_inverse(exponent)[:, None])
        at = page + row * (NOPE + 2 * ROPE)
        tl.store(at + g[:, None] * 64 + d[None, :], codes, mask=(g < GROUPS - 1)[:, None] & (d >= 0)[None, :])
        tl.store(page + ROWS * (NOPE + 2 * ROPE) + row * GROUPS + g, tl.where(g < GROUPS - 1, exponent, 0).to(tl.uint8))
        rope = (at + NOPE).to(tl.pointer_type(tl.bfloat16))
        tl.store(rope + (g * 0)[:, None] + d[None, :], values, mask=(g == GROUPS - 1)[:, None] & (d >= 0)[None, :])
    elif FORMAT == 2:  # INDEX_FP8
        wide = x.to(tl.bfloat16).to(tl.float32)
        exponent = ue8m0_ceil(tl.max(abs_bits(wide), 1), E4M3_FLOOR, E4M3_INVERSE_MAX)  # [1]
        codes = encode_e4m3(wide * ue8m0_inverse(exponent)[:, None])
        tl.store(page + row * D + tl.arange(0, D)[None, :], codes)
        scale = (page + ROWS * D + row * 4).to(tl.pointer_type(tl.float32))
        tl.store(scale + tl.arange(0, 1), ue8m0_value(exponent))
    else:  # INDEX_MXFP4
        GROUPS_4: tl.constexpr = D // 32
        wide = tl.reshape(x, [GROUPS_4, 32]).to(tl.bfloat16).to(tl.float32)
        exponent = ue8m0_ceil(tl.max(abs_bits(wide), 1), E2M1_FLOOR, E2M1_INVERSE_MAX)
        codes = encode_e2m1(wide * ue8m0_inverse(exponent)[:, None])
        even, odd = tl.split(tl.reshape(codes, [D // 2, 2]))
        tl.store(page + row * (D // 2) + tl.arange(0, D // 2), even | (odd << 4))
        tl.store(page + ROWS * (D // 2) + row * GROUPS_4 + tl.arange(0, GROUPS_4), exponent.to(tl.uint8))
