# SPDX-License-Identifier: Apache-2.0
"""Who serves DeepSeek-V4 on this machine, decided without torch and without touching CUDA.

Installing the plugin never makes anybody slower: dsv4 serves where the engine's native V4 cannot
run. Elsewhere native stays until a committed benchmark record shows dsv4 at least as fast (there is
none yet), unless DSV4_MODE says otherwise.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dsv4.errors import UnsupportedDeviceError

DeviceKind = Literal["cpu", "cuda", "rocm"]

# Families whose attention kernels (FlashMLA, DeepGEMM or FlashInfer) native V4 has: sm90, sm100 and
# sm103, sm120 and sm121.
NATIVE_CUDA_MAJORS = (9, 10, 12)
OLDEST_CAPABILITY = (8, 0)  # bf16 matrix instructions and asynchronous copies, which our kernels need


@dataclass(frozen=True)
class Device:
    """One device that could serve. capability: CUDA compute capability, None for a CPU or an AMD
    GPU.
    """

    kind: DeviceKind
    name: str = ""
    capability: tuple[int, int] | None = None
    memory_mib: int = 0

    @property
    def arch(self) -> str:
        """Short name: cpu, rocm, sm80."""
        return f"sm{self.capability[0]}{self.capability[1]}" if self.capability else self.kind


@dataclass(frozen=True)
class Decision:
    """Whether dsv4 serves V4, and why, in one sentence for the log."""

    serve: bool
    reason: str


def decide(mode: str, device: Device) -> Decision:
    """Who serves V4 on `device`.

    mode: DSV4_MODE, one of auto, on, off. Raises UnsupportedDeviceError, unless mode is off, for a
    device that serves no V4 at all.
    """
    if mode == "off":
        return Decision(False, "DSV4_MODE=off: the engine's native V4 is left in place")
    if device.capability is not None and device.capability < OLDEST_CAPABILITY:
        raise UnsupportedDeviceError(
            f"{device.name} is {device.arch}; dsv4's kernels need sm80 or newer and native V4 sm90: use an A100, L20, L40S, RTX 4090 or"
            " a newer GPU, or hide this one from the process with CUDA_VISIBLE_DEVICES"
        )
    if mode == "on":
        return Decision(True, f"DSV4_MODE=on: dsv4 serves on {device.arch}")
    if not runs_native(device):
        return Decision(True, f"native V4 does not run on {device.arch}: dsv4 serves")
    return Decision(
        False,
        f"native V4 runs on {device.arch} and no benchmark record shows dsv4 as fast: native is left in place; DSV4_MODE=on overrides",
    )


def runs_native(device: Device) -> bool:
    """Whether the engines' own V4 runs on `device`."""
    if device.kind == "cuda":
        return device.capability is not None and device.capability[0] in NATIVE_CUDA_MAJORS
    return device.kind == "rocm"


def detect_devices(environ: Mapping[str, str] | None = None) -> tuple[Device, ...]:
    """Accelerators that this process may use, asked of NVML; one CPU device when there is none.

    CUDA_VISIBLE_DEVICES is honoured, so that what is decided here is what the engine will see.
    """
    environ = os.environ if environ is None else environ
    gpus = _visible(_nvml_gpus(), environ.get("CUDA_VISIBLE_DEVICES"))
    if gpus:
        return gpus
    if Path("/dev/kfd").exists() and environ.get("HIP_VISIBLE_DEVICES", "all") not in ("", "-1"):
        return (Device("rocm", "AMD GPU"),)
    return (Device("cpu", "CPU"),)


def has_accelerator_node() -> bool:
    """Whether an accelerator's device node exists: NVIDIA, AMD compute, Intel or TPU; asks no
    driver.
    """
    nodes = [p for p in Path("/dev").glob("nvidia[0-9]*") if p.name.removeprefix("nvidia").isdigit()]
    return bool(nodes) or any(Path(p).exists() for p in ("/dev/kfd", "/dev/dxg", "/dev/accel0", "/dev/vfio/0"))


def weakest(devices: Sequence[Device]) -> Device:
    """The device that decides on a machine with several kinds: the one with the lowest
    capability.
    """
    return min(devices, key=lambda device: device.capability or (0, 0))


def _visible(gpus: Sequence[tuple[str, Device]], visible: str | None) -> tuple[Device, ...]:
    if visible is None:
        return tuple(device for _, device in gpus)
    chosen = []
    for entry in (part.strip() for part in visible.split(",")):
        if entry.isdigit() and int(entry) < len(gpus):
            chosen.append(gpus[int(entry)][1])
            continue
        match = [device for uuid, device in gpus if entry and not entry.isdigit() and uuid.startswith(entry)]
        if not match:
            break  # as CUDA does: everything from the first invalid entry on is hidden
        chosen.append(match[0])
    return tuple(chosen)


def _nvml_gpus() -> list[tuple[str, Device]]:
    """(UUID, device) of every NVIDIA GPU; empty without a driver."""
    try:
        import pynvml
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        found = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
            try:
                mib = int(pynvml.nvmlDeviceGetMemoryInfo(handle).total) >> 20
            except pynvml.NVMLError:
                mib = 0  # unified memory: the driver does not say
            found.append(
                (
                    str(pynvml.nvmlDeviceGetUUID(handle)),
                    Device("cuda", str(pynvml.nvmlDeviceGetName(handle)), (major, minor), mib),
                )
            )
        return found
    finally:
        pynvml.nvmlShutdown()
