# SPDX-License-Identifier: Apache-2.0
"""What every Triton kernel needs, and when it is refused."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Sequence
from types import ModuleType

import torch

KERNEL_MODULES = tuple(f"dsv4.ops.{family}.triton" for family in ("attention", "compressor", "quant"))

MIN_CAPABILITY = (8, 0)  # bf16 matrix instructions; bf16 converts are emulated below
AMD_ARCHS = ("gfx942", "gfx950")  # the ones the kernels are compiled for in CI


def interpreting() -> bool:
    """Whether Triton's interpreter stands in for the compiler."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def import_kernels(names: Sequence[str]) -> list[ModuleType]:
    """Import kernel modules by name."""
    return [importlib.import_module(name) for name in names]


def refuse_triton(device: torch.device) -> str | None:
    """Why dsv4's Triton kernels cannot run on `device`, or None when they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.type == "cpu":
        return None if interpreting() else "Triton has no CPU compiler; TRITON_INTERPRET=1 interprets its kernels, slowly"
    if interpreting():
        return "TRITON_INTERPRET=1 is for tests on a CPU; unset it"
    if device.type != "cuda":
        return f"needs an NVIDIA or AMD GPU, not {device.type}"
    return _refuse_gpu(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def _refuse_gpu(index: int) -> str | None:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        arch = properties.gcnArchName.partition(":")[0]
        return None if arch in AMD_ARCHS else f"{properties.name} is {arch}; the kernels are built for {' and '.join(AMD_ARCHS)}"
    capability = (properties.major, properties.minor)
    if capability >= MIN_CAPABILITY:
        return None
    have, need = ".".join(map(str, capability)), ".".join(map(str, MIN_CAPABILITY))
    return f"{properties.name} has compute capability {have}, the kernels need {need}"


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 4 for the interpreter, so that work is split there too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@functools.cache
def packed_decode(device: torch.device) -> bool:
    """Whether the kernels may use inline PTX."""
    return device.type == "cuda" and torch.version.hip is None
