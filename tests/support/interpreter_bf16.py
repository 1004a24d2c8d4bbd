# SPDX-License-Identifier: Apache-2.0
"""Make Triton's interpreter compute with bf16 and fp8 as a GPU does.

The interpreter (3.6 to 3.9) keeps bf16 as raw uint16 bits: `tl.dot`, arithmetic and comparisons
work on the bits, casts from fp32 truncate, and fp8 casts let a carry out of the mantissa overwrite
the exponent. All of it is silent. `install()` replaces those operations by numpy's fp32 ones with
one correct rounding; a process that runs kernels with TRITON_INTERPRET=1 must call it before the
first launch. Until Triton's interpreter does this itself; then delete.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_TORCH_OF = {tl.bfloat16: torch.bfloat16, tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}


def _widen(handle: TensorHandle) -> TensorHandle:
    """The same numbers as fp32, if they are stored as bits."""
    kind = handle.dtype.scalar
    if kind not in _TORCH_OF:
        return handle
    bits = torch.from_numpy(np.array(handle.data, order="C", copy=True))
    return TensorHandle(bits.view(_TORCH_OF[kind]).float().numpy(), tl.float32)


def _narrow(values: np.ndarray, kind: tl.dtype) -> TensorHandle:
    """Round fp32 numbers to `kind`, nearest even; fp8 saturates as the GPU's cvt does."""
    x = torch.from_numpy(np.array(values, dtype=np.float32, order="C", copy=True))
    if kind is tl.float8e4nv:
        x = torch.where(x.isnan(), x, x.clamp(-448.0, 448.0))
    stored = torch.uint16 if kind is tl.bfloat16 else torch.uint8
    return TensorHandle(x.to(_TORCH_OF[kind]).view(stored).numpy(), kind)


def _is_bits(handle: object) -> bool:
    return isinstance(handle, TensorHandle) and handle.dtype.scalar in _TORCH_OF


def _compute_wide(original):  # type: ignore[no-untyped-def]
    @functools.wraps(original)
    def run(self, *args):  # type: ignore[no-untyped-def]
        kinds = [a.dtype.scalar for a in args if _is_bits(a)]
        if not kinds or (args[-1] is np.where):
            return original(self, *args)
        out = original(self, *(_widen(a) if _is_bits(a) else a for a in args))
        return out if out.data.dtype == np.bool_ else _narrow(out.data, kinds[0])

    return run


def _dot(original):  # type: ignore[no-untyped-def]
    def run(self, a, b, d, *rest):  # type: ignore[no-untyped-def]
        return original(self, _widen(a), _widen(b), d, *rest)

    return run


def _cast(original):  # type: ignore[no-untyped-def]
    def run(self, src, dst_type, *rest):  # type: ignore[no-untyped-def]
        src = _widen(src)
        kind = dst_type.scalar
        if kind in _TORCH_OF:
            return _narrow(src.data, kind)
        return TensorHandle(src.data.astype(interpreter._get_np_dtype(dst_type)), kind)

    return run


@functools.cache
def install() -> None:
    """Patch the interpreter of this process, once."""
    b = InterpreterBuilder
    for name in ("binary_op", "unary_op", "ternary_op", "create_fma"):
        setattr(b, name, _compute_wide(getattr(b, name)))
    b.create_dot = _dot(b.create_dot)
    b.cast_impl = _cast(b.cast_impl)
    b.create_fp_to_fp = _cast(b.create_fp_to_fp)
