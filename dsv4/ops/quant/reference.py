# SPDX-License-Identifier: Apache-2.0
"""Quantise, pack and unpack e4m3, e2m1 and ue8m0, bit for bit. Source: docs/model.md, 2.2 and
4.1."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from dsv4.model.config import FP4_BLOCK, FP8_BLOCK
from dsv4.model.kv_layout import INDEX_MXFP4_GROUP, KV_QUANT_GROUP, IndexFormat, KvFormat

E4M3_MAX = 448.0
E4M3_AMAX_FLOOR = 1e-4
E2M1_MAX = 6.0
E2M1_AMAX_FLOOR = 6.0 * 2.0**-126
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def ue8m0_ceil(x: Tensor) -> Tensor:
    """Biased exponent of the smallest power of two that is at least `x`: uint8, from the exponent
    bits of fp32.

    NaN gives 255, itself NaN as a scale; without the bound its exponent would wrap to 0 and hide
    it.
    """
    bits = x.float().view(torch.int32)
    return ((bits >> 23) + (bits & 0x7FFFFF != 0)).clamp(max=255).to(torch.uint8)


def ue8m0_value(codes: Tensor) -> Tensor:
    """2**(code - 127) as fp32; 0 is the denormal 2**-127, 255 is NaN."""
    bits = codes.to(torch.int32) << 23
    bits = torch.where(codes == 0, 0x00400000, bits)
    return torch.where(codes == 255, 0x7FC00000, bits).to(torch.int32).view(torch.float32)


def quantize_e4m3(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Quantise the last axis in groups with a power-of-two scale.

    x: [..., D], read as fp32. Returns codes uint8 [..., D] and ue8m0 scales uint8 [..., D / group]:
    scale = 2**ceil(log2(max(amax, E4M3_AMAX_FLOOR) / E4M3_MAX)); values are clamped, then rounded
    to nearest even.
    """
    groups = x.float().unflatten(-1, (-1, group))
    scale = ue8m0_ceil(groups.abs().amax(-1).clamp(min=E4M3_AMAX_FLOOR) * (1 / E4M3_MAX))
    scaled = (groups / ue8m0_value(scale)[..., None]).clamp(-E4M3_MAX, E4M3_MAX)
    return scaled.to(torch.float8_e4m3fn).view(torch.uint8).flatten(-2), scale


def dequantize_e4m3(codes: Tensor, scale: Tensor) -> Tensor:
    """Inverse of `quantize_e4m3`: fp32 [..., D]."""
    values = codes.view(torch.float8_e4m3fn).float().unflatten(-1, (scale.shape[-1], -1))
    return (values * ue8m0_value(scale)[..., None]).flatten(-2)


def quantize_e2m1(x: Tensor, group: int = INDEX_MXFP4_GROUP) -> tuple[Tensor, Tensor]:
    """Quantise the last axis to packed e2m1 with a power-of-two scale per group.

    x: [..., D], read as fp32. Returns bytes uint8 [..., D / 2], even element in the low nibble, and
    ue8m0 scales uint8 [..., D / group]. Ties go to the even code.
    """
    groups = x.float().unflatten(-1, (-1, group))
    scale = ue8m0_ceil(groups.abs().amax(-1).clamp(min=E2M1_AMAX_FLOOR) * (1 / E2M1_MAX))
    scaled = (groups / ue8m0_value(scale)[..., None]).clamp(-E2M1_MAX, E2M1_MAX)
    magnitude = scaled.abs()
    # Between codes c and c+1 the midpoint goes to the even one: strict for even c, inclusive for
    # odd c.
    code = torch.zeros_like(magnitude, dtype=torch.uint8)
    for c in range(7):
        midpoint = (_E2M1[c] + _E2M1[c + 1]) / 2
        code += (magnitude > midpoint if c % 2 == 0 else magnitude >= midpoint).to(torch.uint8)
    code = (code | (torch.signbit(scaled).to(torch.uint8) << 3)).flatten(-2)
    return code[..., 0::2] | (code[..., 1::2] << 4), scale


def dequantize_e2m1(packed: Tensor, scale: Tensor) -> Tensor:
    """Inverse of `quantize_e2m1`: packed uint8 or int8 [..., D / 2], ue8m0 bytes [..., D / group];
    fp32 [..., D]."""
    packed = packed.view(torch.uint8)
    table = torch.tensor(_E2M1, device=packed.device)
    values = torch.stack([table[(packed & 15).int()], table[(packed >> 4).int()]], -1).flatten(-2)
    return (values.unflatten(-1, (scale.shape[-1], -1)) * ue8m0_value(scale.view(torch.uint8))[..., None]).flatten(-2)


def scale_value(scale: Tensor) -> Tensor:
    """A weight scale as fp32: e8m0 is decoded from its byte, fp32 passes through."""
    return scale.float() if scale.dtype is torch.float32 else ue8m0_value(scale.view(torch.uint8))


def dequantize_fp8_block(weight: Tensor, scale: Tensor) -> Tensor:
    """An FP8 linear's weight as fp32: weight e4m3 [out, in], scale [ceil(out / 128), ceil(in /
    128)] e8m0 or fp32."""
    out_features, in_features = weight.shape
    blocks = (
        scale_value(scale)
        .repeat_interleave(FP8_BLOCK, 0)[:out_features]
        .repeat_interleave(FP8_BLOCK, 1)[:, :in_features]
    )
    return weight.view(torch.float8_e4m3fn).float() * blocks


def dequantize_expert(weight: Tensor, scale: Tensor) -> Tensor:
    """A routed expert's weight as fp32, FP4 or FP8 by its dtype: [..., out, in] (FP4: [..., out, in
    / 2] bytes)."""
    if weight.dtype in (torch.int8, torch.uint8):
        assert scale.shape[-1] * FP4_BLOCK == weight.shape[-1] * 2
        return dequantize_e2m1(weight, scale)
    flat = (
        [dequantize_fp8_block(w, s) for w, s in zip(weight.flatten(0, -3), scale.flatten(0, -3), strict=True)]
        if weight.dim() > 2
        else []
    )
    return torch.stack(flat).view(weight.shape) if flat else dequantize_fp8_block(weight, scale)


@functools.lru_cache(maxsize=4)
def hadamard_matrix(dim: int, device: torch.device) -> Tensor:
    """Sylvester's Hadamard matrix, normalised by dim**-0.5: [dim, dim] fp32, symmetric and its own
    inverse."""
    matrix = torch.ones(1, 1, device=device)
    while matrix.shape[0] < dim:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix * dim**-0.5


def hadamard(x: Tensor) -> Tensor:
    """Rotate the last axis (a power of two) by the normalised Hadamard matrix; fp32 out. Source:
    docs/model.md, 3.5."""
    return x.float() @ hadamard_matrix(x.shape[-1], x.device)


def encode_row(rows: Tensor, row_format: KvFormat | IndexFormat, rope_dim: int) -> tuple[Tensor, Tensor]:
    """The value bytes and scale bytes of packed rows: uint8 [T, value_bytes] and uint8 [T,
    scale_bytes].

    rows: [T, D]; they are rounded to bf16 before quantising, as the official kernels do
    (docs/model.md, 4.3). Index formats expect rows that the Hadamard matrix has already rotated.
    """
    rows = rows.bfloat16()
    if row_format is KvFormat.FP8_DS_MLA:
        nope = rows.shape[-1] - rope_dim
        codes, scale = quantize_e4m3(rows[:, :nope], KV_QUANT_GROUP)
        rope = rows[:, nope:].contiguous().view(torch.uint8)
        return torch.cat([codes, rope], -1), torch.nn.functional.pad(scale, (0, 1))
    if row_format is IndexFormat.FP8:
        codes, scale = quantize_e4m3(rows, rows.shape[-1])
        return codes, ue8m0_value(scale).view(torch.uint8)
    if row_format is IndexFormat.MXFP4:
        return quantize_e2m1(rows)
    raise ValueError(f"{row_format} rows are not packed")


def decode_row(values: Tensor, scales: Tensor, row_format: KvFormat | IndexFormat, rope_dim: int) -> Tensor:
    """Inverse of `encode_row`: fp32 [T, D]."""
    if row_format is KvFormat.FP8_DS_MLA:
        nope = values.shape[-1] - 2 * rope_dim
        rope = values[:, nope:].contiguous().view(torch.bfloat16).float()
        return torch.cat([dequantize_e4m3(values[:, :nope], scales[:, : nope // KV_QUANT_GROUP]), rope], -1)
    if row_format is IndexFormat.FP8:
        return values.view(torch.float8_e4m3fn).float() * scales.contiguous().view(torch.float32)
    if row_format is IndexFormat.MXFP4:
        return dequantize_e2m1(values, scales)
    raise ValueError(f"{row_format} rows are not packed")
