# SPDX-License-Identifier: Apache-2.0
"""What every Triton kernel needs, and when it is refused."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import torch

from dsv4.machine.decide import OLDEST_CAPABILITY

KERNEL_MODULES = tuple(
    f"dsv4.ops.{family}.triton"
    for family in ("attention", "compressor.paged", "compressor.summary", "indexer", "mhc", "moe", "quant")
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

    Without them ptxas settles on 128 registers or fewer once a kernel spills, although 255 are
    allowed.
    """
    return {"maxnreg": min(255, 65536 // (32 * num_warps))} if packed_decode(device) else {}


@dataclass(frozen=True)
class Argument:
    """One argument of a compiled kernel, or one element of a group of them.

    path: (argument,), or (argument, element, ...) in a group
    name: the argument's, or the element's
    type: Triton's, "constexpr" for a constant, whose value is `value`
    """

    path: tuple[int, ...]
    name: str
    type: str
    value: Any = None

    @property
    def aligned(self) -> bool:
        """Divisible by 16, as PyTorch's pointers and V4's strides are."""
        return self.type.startswith("*") or (self.type != "constexpr" and self.name.endswith("stride"))


@dataclass(frozen=True)
class Shipped:
    """One configuration that serves, for `make kernels`: compiled for every target, with its
    resources bounded.

    types: "*bf16", "i32", ... by argument name, where `_type_of`'s rules do not give it
    constants: values of the constexpr arguments
    spill: bytes of registers a lane may spill by target, 0 for the others; what was measured, not a
    wish vendor: nvidia or amd for a configuration that serves only there

    A kernel that takes a group of values takes a NamedTuple. Its type is the same NamedTuple filled
    with types; what is no string in it is a constant, which a kernel must use in place
    (`keys.rows`): assigned to a variable, it is one no more.

        class Keys(NamedTuple):
            pages: Any
            page_stride: Any
            rows: Any  # constexpr

        kernel[grid](Keys(data, data.stride(0), tl.constexpr(64)), out)
        Shipped("read", kernel, {"keys": Keys("*u8", "i32", 64), "out": "*bf16"}, {}, num_warps=4)
    """

    name: str
    kernel: Any
    types: Mapping[str, Any]
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int = 2
    spill: Mapping[str, int] = field(default_factory=dict)
    vendor: str = ""

    def arguments(self, target: str, ones: bool = False) -> list[Argument]:
        """What it is compiled for. ones: with every integer as 1, which Triton makes a constant."""
        found: list[Argument] = []
        for at, name in enumerate(self.kernel.arg_names):
            constant = name in self.constants
            found += _leaves((at,), name, self.constants[name] if constant else self._type_of(name), constant)
        if ones:
            found = [replace(a, type="constexpr", value=1) if a.type == "i32" and not a.aligned else a for a in found]
        return [replace(a, value=target.startswith("sm")) if a.name == "PTX" else a for a in found]

    def signature(self, arguments: Sequence[Argument]) -> dict[str, Any]:
        """Triton's type of every argument, groups as they are given."""
        types = {a.path: a.type for a in arguments}
        return {name: _regroup((at,), types, self.types.get(name)) for at, name in enumerate(self.kernel.arg_names)}

    def serves(self, target: str) -> bool:
        """Whether it is used on a target (sm90, gfx942, ...)."""
        return self.vendor in ("", "nvidia" if target.startswith("sm") else "amd")

    def _type_of(self, name: str) -> Any:
        if name in self.types:
            return self.types[name]
        return "fp32" if name in ("eps", "rms_eps", "hc_eps", "scale_log2") else "i32"


def _is_group(given: Any) -> bool:
    return isinstance(given, tuple) and hasattr(given, "_fields")


def _leaves(path: tuple[int, ...], name: str, given: Any, constant: bool) -> list[Argument]:
    if _is_group(given) and not constant:
        elements = enumerate(zip(given._fields, given, strict=True))
        return [
            leaf
            for at, (of, element) in elements
            for leaf in _leaves((*path, at), of, element, not isinstance(element, (str, tuple)))
        ]
    return [Argument(path, name, "constexpr", given) if constant else Argument(path, name, given)]


def _regroup(path: tuple[int, ...], types: Mapping[tuple[int, ...], str], like: Any) -> Any:
    if path in types:
        return types[path]
    return type(like)(*(_regroup((*path, at), types, element) for at, element in enumerate(like)))
