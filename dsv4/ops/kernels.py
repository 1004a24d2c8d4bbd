# SPDX-License-Identifier: Apache-2.0
"""What every Triton kernel needs, and when it is refused."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch

from dsv4.machine.decide import OLDEST_CAPABILITY

KERNEL_MODULES = tuple(
    f"dsv4.ops.{family}.triton" for family in ("attention", "compressor.paged", "compressor.summary", "indexer", "mhc", "moe", "quant")
)

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


def refuse_mxfp4_experts(device: torch.device) -> str | None:
    """Why the mxfp4 experts do not run on `device`; on NVIDIA targets they would spill kilobytes of registers."""
    if device.type == "cuda" and not on_amd():
        return "the engines serve mxfp4 experts on NVIDIA GPUs by Marlin"
    return refuse_triton(device)


@functools.cache
def _refuse_gpu(index: int) -> str | None:
    properties = torch.cuda.get_device_properties(index)
    if on_amd():
        arch = properties.gcnArchName.partition(":")[0]
        return None if arch in AMD_ARCHS else f"{properties.name} is {arch}; the kernels are built for {' and '.join(AMD_ARCHS)}"
    capability = (properties.major, properties.minor)
    if capability >= OLDEST_CAPABILITY:
        return None
    have, need = ".".join(map(str, capability)), ".".join(map(str, OLDEST_CAPABILITY))
    return f"{properties.name} has compute capability {have}, the kernels need {need}"


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 4 for the interpreter, so that work is split there too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def on_amd() -> bool:
    """Whether torch drives AMD GPUs."""
    return torch.version.hip is not None


@functools.cache
def packed_decode(device: torch.device) -> bool:
    """Whether the kernels may use inline PTX."""
    return device.type == "cuda" and not on_amd()


def register_limit(device: torch.device, num_warps: int) -> dict[str, int]:
    """Launch options that give every thread all the registers there are.

    Without them ptxas settles on 128 registers or fewer once a kernel spills, although 255 are allowed.
    """
    return {"maxnreg": min(255, 65536 // (32 * num_warps))} if packed_decode(device) else {}


@dataclass(frozen=True)
class Shipped:
    """One configuration that serves, for `make kernels`: compiled for every target, with its resources bounded.

    types: "*bf16", "i32", ... by argument name, where `_type_of`'s rules do not give it. spill: bytes of registers a lane
    may spill by target, 0 for the others; a budget is what was measured when it was written, not a wish.
    vendor: nvidia or amd for a configuration that serves only there.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int = 2
    spill: Mapping[str, int] = field(default_factory=dict)
    vendor: str = ""

    def signature(self) -> dict[str, str]:
        """Triton's type of every argument; constexprs are named as such."""
        return {name: "constexpr" if name in self.constants else self._type_of(name) for name in self.kernel.arg_names}

    def serves(self, target: str) -> bool:
        """Whether it is used on a target (sm90, gfx942, ...)."""
        return self.vendor in ("", "nvidia" if target.startswith("sm") else "amd")

    def _type_of(self, name: str) -> str:
        if name in self.types:
            return self.types[name]
        return "fp32" if name in ("eps", "rms_eps", "hc_eps", "scale_log2") else "i32"

    def aligned(self) -> list[str]:
        """Arguments divisible by 16, as PyTorch's pointers and V4's strides are."""
        return [n for n, t in self.signature().items() if t.startswith("*") or n.endswith("_stride")]
