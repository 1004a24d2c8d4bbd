# SPDX-License-Identifier: Apache-2.0
"""What every Triton kernel needs, and when it is refused."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch

from dsv4.machine.decide import OLDEST_CAPABILITY

KERNEL_MODULES = tuple(
    f"dsv4.ops.{family}.triton"
    for family in ("attention", "compressor.paged", "compressor.summary", "indexer", "mhc", "moe", "plan", "quant")
)

AMD_ARCHS = ("gfx942", "gfx950")  # the ones the kernels are compiled for in CI
PRETENDED_PROCESSORS = 108  # of a GPU that is not here

_pretended: list[str] = []


@contextmanager
def pretending(target: str) -> Iterator[None]:
    """Let launches be those of a GPU (sm90, gfx942, ...) that is not here. They do not run: see
    `dsv4.ops.launches`."""
    _pretended.append(target)
    try:
        yield
    finally:
        _pretended.pop()


def interpreting() -> bool:
    """Whether Triton's interpreter stands in for the compiler."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def import_kernels(names: Sequence[str]) -> list[ModuleType]:
    """Import kernel modules by name."""
    return [importlib.import_module(name) for name in names]


def launched_kernels(names: Sequence[str]) -> list[Any]:
    """Every kernel that modules define, or import from the files beside them: a jitted function
    whose name ends in `_kernel`."""
    files = {file for module in import_kernels(names) for file in (module, *_beside(module))}
    found = {name: value for file in files for name, value in vars(file).items() if name.endswith("_kernel")}
    return [found[name] for name in sorted(found)]


def _beside(module: ModuleType) -> list[ModuleType]:
    folder = module.__name__.rpartition(".")[0]
    imported = {str(getattr(value, "__module__", None) or "") for value in vars(module).values()}
    imported |= {value.__name__ for value in vars(module).values() if isinstance(value, ModuleType)}
    return [sys.modules[name] for name in imported if name.startswith(f"{folder}.") and name in sys.modules]


def refuse_triton(device: torch.device) -> str | None:
    """Why dsv4's Triton kernels cannot run on `device`, or None when they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if _pretended:
        return None
    if device.type == "cpu":
        return (
            None if interpreting() else "Triton has no CPU compiler; TRITON_INTERPRET=1 interprets its kernels, slowly"
        )
    if interpreting():
        return "TRITON_INTERPRET=1 is for tests on a CPU; unset it"
    if device.type != "cuda":
        return f"needs an NVIDIA or AMD GPU, not {device.type}"
    return _refuse_gpu(device.index if device.index is not None else torch.cuda.current_device())


def refuse_mxfp4_experts(device: torch.device) -> str | None:
    """Why the mxfp4 experts do not run on `device`; on NVIDIA targets they would spill kilobytes of
    registers."""
    if device.type == "cuda" and not on_amd():
        return "the engines serve mxfp4 experts on NVIDIA GPUs by Marlin"
    return refuse_triton(device)


@functools.cache
def _refuse_gpu(index: int) -> str | None:
    properties = torch.cuda.get_device_properties(index)
    if on_amd():
        arch = properties.gcnArchName.partition(":")[0]
        return (
            None
            if arch in AMD_ARCHS
            else f"{properties.name} is {arch}; the kernels are built for {' and '.join(AMD_ARCHS)}"
        )
    capability = (properties.major, properties.minor)
    if capability >= OLDEST_CAPABILITY:
        return None
    have, need = ".".join(map(str, capability)), ".".join(map(str, OLDEST_CAPABILITY))
    return f"{properties.name} has compute capability {have}, the kernels need {need}"


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 4 for the interpreter, so that work is split there too."""
    return PRETENDED_PROCESSORS if _pretended else _processors(device)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def on_amd() -> bool:
    """Whether torch drives AMD GPUs."""
    return _pretended[-1].startswith("gfx") if _pretended else torch.version.hip is not None


def packed_decode(device: torch.device) -> bool:
    """Whether the kernels may use inline PTX."""
    return (device.type == "cuda" or bool(_pretended)) and not on_amd()


def register_limit(device: torch.device, num_warps: int) -> dict[str, int]:
    """Launch options that give every thread all the registers there are.

    Without them ptxas settles on 128 registers or fewer once a kernel spills, although 255 are
    allowed.
    """
    return {"maxnreg": min(255, 65536 // (32 * num_warps))} if packed_decode(device) else {}
