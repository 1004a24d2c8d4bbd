# SPDX-License-Identifier: Apache-2.0
"""GPU facts by id, read from recipes/hardware.yaml, and what this machine holds, asked of NVML
without torch.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from dataclasses import dataclass
from typing import Literal

from dsv4.data import data_folder, read_yaml
from dsv4.errors import HardwareError, nearest
from dsv4.machine.decide import OLDEST_CAPABILITY, Device, detect_devices, runs_native

MIB = 1 << 20
GIB = 1 << 30
_MEMORY_TOLERANCE = 0.04  # one card's boards differ by ECC and firmware reserves, never by 4 %


@dataclass(frozen=True)
class Gpu:
    """One card. visible_mib: as nvidia-smi prints it; tflops: dense; see recipes/hardware.yaml for
    sources.
    """

    id: str
    name: str
    aliases: tuple[str, ...]
    cc: str
    arch: str
    visible_mib: int
    driver_reserve_mib: int
    confidence: str
    gpus_per_node: int
    fabric: str
    mem_bw_tb_s: float
    bf16_tflops: float | None
    fp8_tflops: float | None
    fp4_tflops: float | None
    source: str
    platform: Literal["cuda", "rocm"] = "cuda"

    @property
    def total_bytes(self) -> int:
        """What the CUDA runtime reports as total memory: the base of gpu_memory_utilization."""
        return (self.visible_mib - self.driver_reserve_mib) * MIB

    @property
    def capability(self) -> tuple[int, int]:
        major, minor = self.cc.split(".")
        return int(major), int(minor)

    def nodes_for(self, count: int) -> int:
        """As few nodes as hold `count` of this card."""
        return -(-count // self.gpus_per_node)

    @property
    def needs_plugin(self) -> bool:
        """No native V4 of either engine runs here (sm80, sm86, sm89): dsv4's own kernels serve."""
        return not runs_native(Device(self.platform, self.name, self.capability))


@dataclass(frozen=True)
class Machine:
    """GPUs of this machine: `count` of `gpu`."""

    gpu: Gpu
    count: int


@functools.cache
def all_gpus() -> tuple[Gpu, ...]:
    """Every card in recipes/hardware.yaml, in file order."""
    return tuple(
        Gpu(**{**entry, "aliases": tuple(entry["aliases"])}) for entry in read_yaml(data_folder() / "hardware.yaml")
    )


def find_gpu(name: str) -> Gpu:
    """The card with this id, alias or product name, as NVML, ROCm and people write it ("H200 SXM",
    "NVIDIA A100-SXM4-80GB", "AMD Instinct MI300X"). Raises HardwareError naming the nearest ids.
    """
    names = {n.lower(): gpu for gpu in all_gpus() for n in (gpu.id, *gpu.aliases)}
    wanted = "-".join(name.strip().lower().replace("_", " ").replace("-", " ").split())
    plain = "-".join(_plain_words(name))
    for spelling in (wanted, wanted.removeprefix("nvidia-"), plain):
        if spelling in names:
            return names[spelling]
    near = nearest(wanted, names)
    ids = list(dict.fromkeys(names[n].id for n in near)) or [gpu.id for gpu in all_gpus()]
    raise HardwareError(f"{name}: unknown GPU; nearest: {', '.join(ids)}")


def detect_machine() -> Machine:
    """The NVIDIA GPUs that this process may use. Raises HardwareError when there are none, several
    kinds, or an unknown kind.
    """
    found = Counter((device.name, device.memory_mib) for device in detect_devices() if device.kind == "cuda")
    if not found:
        raise HardwareError("no NVIDIA GPU is visible on this machine")
    if len(found) > 1:
        kinds = ", ".join(f"{n} x {name}" for (name, _), n in found.items())
        raise HardwareError(f"this machine mixes GPUs ({kinds})")
    ((name, mib), count) = next(iter(found.items()))
    return Machine(match_device(name, mib), count)


def match_device(name: str, mib: int) -> Gpu:
    """The card that NVML describes by `name` and total memory. Raises HardwareError."""
    for gpu in all_gpus():
        if _words(gpu) <= set(_plain_words(name)) and abs(mib - gpu.visible_mib) <= _MEMORY_TOLERANCE * gpu.visible_mib:
            return gpu
    known = ", ".join(gpu.id for gpu in all_gpus())
    raise HardwareError(f"this machine's {name} ({mib} MiB) is not in dsv4's table ({known})")


def describe_gpu(memory_gib: float, capability: str, bandwidth_tb_s: float = 0.0, name: str = "") -> Gpu:
    """A card outside the table, by what decides a plan. memory_gib: as nvidia-smi reports it.
    Raises HardwareError.
    """
    match = re.fullmatch(r"([0-9]{1,2})\.([0-9])", capability.strip())
    if match is None:
        raise HardwareError(f"{capability}: is no compute capability; write it as 8.6")
    if (int(match[1]), int(match[2])) < OLDEST_CAPABILITY:
        raise HardwareError(f"{capability}: dsv4 needs 8.0 or newer, and native V4 9.0")
    if not 1 <= memory_gib <= 10_000:
        raise HardwareError(f"{memory_gib:g}: give the card's memory in GiB")
    return Gpu(
        id=name or f"gpu-{memory_gib:g}g",
        name=name or f"a card of {memory_gib:g} GiB",
        aliases=(),
        cc=capability.strip(),
        arch="x86_64",
        visible_mib=round(memory_gib * 1024),
        driver_reserve_mib=620,
        confidence="as given",
        gpus_per_node=8,
        fabric="not known",
        mem_bw_tb_s=bandwidth_tb_s,
        bf16_tflops=None,
        fp8_tflops=None,
        fp4_tflops=None,
        source="the command line",
    )


_VENDORS = ("nvidia", "amd", "instinct", "geforce", "tesla", "blackwell")
_FORMS = ("pcie", "sxm", "sxm4", "sxm5", "sxm6", "ac", "oam", "hbm2e", "hbm3", "hbm3e")
_EDITIONS = ("server", "workstation", "edition", "max", "q")
_NO_IDENTITY = frozenset((*_VENDORS, *_FORMS, *_EDITIONS))


def _plain_words(name: str) -> list[str]:
    """Words of a product name without vendor, form factor and edition; sizes as 80g."""
    words = [w for w in name.lower().replace("-", " ").replace("_", " ").split() if w not in _NO_IDENTITY]
    return [re.sub(r"^([0-9]+)gb$", r"\1g", w) for w in words]


def _words(gpu: Gpu) -> set[str]:
    """Words of the marketing name that identify the card, without memory size."""
    return {w for w in _plain_words(gpu.name) if not re.fullmatch(r"[0-9]+g", w)}
