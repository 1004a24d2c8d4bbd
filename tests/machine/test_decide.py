# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import sys
import types

import pytest

from dsv4.errors import UnsupportedDeviceError
from dsv4.machine import decide
from dsv4.machine.decide import Device, detect_devices, weakest


def cuda(major: int, minor: int) -> Device:
    return Device("cuda", f"GPU {major}{minor}", (major, minor))


CPU = Device("cpu", "CPU")
ROCM = Device("rocm", "AMD GPU")


@pytest.mark.parametrize("device", [CPU, cuda(8, 0), cuda(8, 6), cuda(8, 9), cuda(11, 0)])
def test_auto_serves_where_native_cannot_run(device):
    decision = decide.decide("auto", device)
    assert decision.serve
    assert device.arch in decision.reason


@pytest.mark.parametrize("device", [cuda(9, 0), cuda(10, 0), cuda(10, 3), cuda(12, 0), cuda(12, 1), ROCM])
def test_auto_leaves_native_where_it_runs_and_nothing_shows_us_as_fast(device):
    decision = decide.decide("auto", device)
    assert not decision.serve
    assert "DSV4_MODE=on overrides" in decision.reason


@pytest.mark.parametrize("mode", ["auto", "on"])
@pytest.mark.parametrize("device", [cuda(7, 0), cuda(7, 5)])
def test_a_gpu_older_than_ampere_is_refused_with_its_name_the_need_and_a_way_out(device, mode):
    with pytest.raises(
        UnsupportedDeviceError, match=rf"{device.name} is {device.arch}; .* need sm80 .*: use an A100, .*CUDA_VIS"
    ):
        decide.decide(mode, device)
    assert not decide.decide("off", device).serve


@pytest.mark.parametrize("device", [CPU, cuda(8, 0), cuda(9, 0), ROCM])
def test_on_and_off_are_obeyed_everywhere(device):
    assert decide.decide("on", device).serve
    assert not decide.decide("off", device).serve


def test_the_weakest_device_decides_on_a_mixed_machine():
    assert weakest([cuda(9, 0), cuda(8, 9)]) == cuda(8, 9)


# --------------------------------------------------------------------------------------------
# Detection


class FakeNvml(types.ModuleType):
    class NVMLError(Exception):
        pass

    def __init__(self, gpus):
        super().__init__("pynvml")
        self.gpus = gpus
        self.open = 0

    def nvmlInit(self):
        if not self.gpus:
            raise self.NVMLError("Driver Not Loaded")
        self.open += 1

    def nvmlShutdown(self):
        self.open -= 1

    def nvmlDeviceGetCount(self):
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetCudaComputeCapability(self, index):
        return self.gpus[index][1]

    def nvmlDeviceGetName(self, index):
        return self.gpus[index][0]

    def nvmlDeviceGetUUID(self, index):
        return f"GPU-{index}000-aaaa"

    def nvmlDeviceGetMemoryInfo(self, index):
        if self.gpus[index][0] == "GB10":
            raise self.NVMLError("Not Supported")
        return types.SimpleNamespace(total=40 << 30)


@pytest.fixture
def nvml(monkeypatch):
    def install(*gpus):
        fake = FakeNvml(gpus)
        monkeypatch.setitem(sys.modules, "pynvml", fake)
        return fake

    return install


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        (None, ["A100", "L20"]),
        ("1,0", ["L20", "A100"]),
        ("1", ["L20"]),
        ("GPU-1000", ["L20"]),
        ("1,7,0", ["L20"]),  # CUDA hides everything from the first invalid entry on
        ("", ["CPU"]),
        ("-1", ["CPU"]),
    ],
)
def test_cuda_visible_devices_is_honoured(nvml, monkeypatch, visible, names):
    fake = nvml(("A100", (8, 0)), ("L20", (8, 9)))
    monkeypatch.setattr(decide.Path, "exists", lambda _: False)
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert [device.name for device in detect_devices(environ)] == names
    assert fake.open == 0  # NVML was closed again


def test_no_driver_means_cpu(nvml, monkeypatch):
    nvml()
    monkeypatch.setattr(decide.Path, "exists", lambda _: False)
    assert detect_devices({}) == (CPU,)


def test_unified_memory_has_no_size_but_is_found(nvml):
    nvml(("GB10", (12, 1)))
    assert detect_devices({}) == (Device("cuda", "GB10", (12, 1), 0),)


def test_amd_driver_means_rocm(nvml, monkeypatch):
    nvml()
    monkeypatch.setattr(decide.Path, "exists", lambda _: True)
    assert detect_devices({}) == (ROCM,)
    assert detect_devices({"HIP_VISIBLE_DEVICES": ""}) == (CPU,)
