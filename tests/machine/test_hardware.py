# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from dsv4.errors import HardwareError
from dsv4.machine import hardware
from dsv4.machine.decide import Device
from dsv4.machine.hardware import all_gpus, describe_gpu, detect_machine, find_gpu, match_device


def test_ids_and_aliases_are_unique():
    names = [n.lower() for gpu in all_gpus() for n in (gpu.id, *gpu.aliases)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", ["H200", "h200-141g", "NVIDIA H200", " h200 ", "nvidia_h200"])
def test_a_card_is_found_whatever_the_spelling(name):
    assert find_gpu(name).id == "h200"


@pytest.mark.parametrize(("name", "nearest"), [("h201", "h200"), ("4090-24", "rtx-4090"), ("b20", "b200")])
def test_an_unknown_card_names_the_nearest(name, nearest):
    with pytest.raises(HardwareError, match=f"unknown GPU; nearest: .*{nearest}") as e:
        find_gpu(name)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("name", "gpu"),
    [
        ("H200 SXM", "h200"),
        ("H100 SXM5 80GB", "h100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100-80g"),
        ("A100 80GB PCIe", "a100-80g"),
        ("NVIDIA A100-SXM4-40GB", "a100-40g"),
        ("NVIDIA A800-SXM4-80GB", "a800-80g"),
        ("a800", "a800-80g"),
        ("NVIDIA RTX A6000", "rtx-a6000"),
        ("A6000", "rtx-a6000"),
        ("NVIDIA A40", "a40"),
        ("NVIDIA L40", "l40"),
        ("NVIDIA GeForce RTX 5090", "rtx-5090"),
        ("RTX PRO 5000 Blackwell", "rtx-pro-5000"),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", "rtx-pro-6000"),
        ("AMD Instinct MI300X OAM", "mi300x"),
        ("MI325X", "mi325x"),
        ("amd_instinct_mi355x", "mi355x"),
        ("NVIDIA GB10", "gb10"),
        ("DGX Spark", "gb10"),
        ("NVIDIA GH200 480GB", "gh200"),
        ("H20-141G", "h20-141g"),
    ],
)
def test_a_card_is_found_as_tools_and_people_write_it(name, gpu):
    assert find_gpu(name).id == gpu


def test_a_card_of_other_memory_is_not_taken_for_the_one_it_resembles():
    for name in ("H100 NVL", "A100 64GB", "RTX 4090 96GB", "H100 94GB"):
        with pytest.raises(HardwareError, match="unknown GPU"):
            find_gpu(name)


def test_any_other_card_is_described_by_memory_and_capability():
    gpu = describe_gpu(24, "8.6", 0.5)
    assert (gpu.visible_mib, gpu.capability, gpu.needs_plugin) == (24 * 1024, (8, 6), True)
    assert not describe_gpu(96, "12.0").needs_plugin


@pytest.mark.parametrize(
    ("memory", "capability", "message"), [(24, "7.5", "needs 8.0"), (24, "sm86", "as 8.6"), (0, "8.6", "in GiB")]
)
def test_a_described_card_that_cannot_be_is_one_line(memory, capability, message):
    with pytest.raises(HardwareError, match=message):
        describe_gpu(memory, capability)


@pytest.mark.parametrize("name", ["", "zzzzzz", "\x00", "🙂", "a" * 10_000])
def test_nonsense_lists_the_known_cards(name):
    with pytest.raises(HardwareError, match="unknown GPU"):
        find_gpu(name)


@pytest.mark.parametrize(
    ("name", "mib", "gpu"),
    [
        ("NVIDIA H200", 143_771, "h200"),
        ("NVIDIA H100 80GB HBM3", 81_559, "h100"),
        ("NVIDIA A100-SXM4-80GB", 81_920, "a100-80g"),
        ("NVIDIA GeForce RTX 4090", 24_564, "rtx-4090"),
        ("NVIDIA GeForce RTX 4090", 49_140, "rtx-4090-48g"),
        ("NVIDIA L40S", 46_068, "l40s"),
        ("NVIDIA L20", 46_068, "l20"),
        ("NVIDIA L40", 46_068, "l40"),
        ("NVIDIA A40", 46_068, "a40"),
        ("NVIDIA RTX A6000", 49_140, "rtx-a6000"),
        ("NVIDIA A100-SXM4-40GB", 40_960, "a100-40g"),
        ("NVIDIA A800-SXM4-80GB", 81_920, "a800-80g"),
        ("NVIDIA GH200 480GB", 97_871, "gh200"),
        ("NVIDIA H20-3e", 143_771, "h20-141g"),
        ("NVIDIA H20", 143_771, "h20-141g"),
        ("NVIDIA RTX PRO 5000 Blackwell", 48_935, "rtx-pro-5000"),
        ("NVIDIA H20", 97_871, "h20"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 97_887, "rtx-pro-6000"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 97_887, "rtx-pro-6000"),
        ("NVIDIA GB200", 189_471, "gb200"),
        ("NVIDIA B300 SXM6 AC", 275_040, "b300"),
    ],
)
def test_nvml_names_and_sizes_identify_the_card(name, mib, gpu):
    assert match_device(name, mib).id == gpu


@pytest.mark.parametrize(
    ("name", "mib"), [("NVIDIA A100-SXM4-64GB", 61_440), ("Tesla T4", 15_360), ("NVIDIA H100 NVL", 95_830)]
)
def test_a_card_outside_the_table_says_so(name, mib):
    with pytest.raises(HardwareError, match="is not in dsv4's table"):
        match_device(name, mib)


def test_several_equal_gpus_make_one_machine(monkeypatch):
    monkeypatch.setattr(hardware, "detect_devices", lambda: (Device("cuda", "NVIDIA H200", (9, 0), 143_771),) * 8)
    machine = detect_machine()
    assert (machine.gpu.id, machine.count) == ("h200", 8)


@pytest.mark.parametrize(
    ("devices", "message"),
    [
        ((Device("cpu", "CPU"),), "no NVIDIA GPU"),
        ((Device("rocm", "AMD GPU"),), "no NVIDIA GPU"),
        ((Device("cuda", "NVIDIA H200", (9, 0), 143_771), Device("cuda", "NVIDIA L20", (8, 9), 46_068)), "mixes GPUs"),
    ],
)
def test_no_gpu_and_mixed_gpus_ask_for_the_option(monkeypatch, devices, message):
    monkeypatch.setattr(hardware, "detect_devices", lambda: devices)
    with pytest.raises(HardwareError, match=message):
        detect_machine()


def test_cuda_sees_what_pytorch_reports():
    assert find_gpu("h100").total_bytes / hardware.GIB == pytest.approx(79.18, abs=0.02)
    assert find_gpu("rtx-3090").total_bytes / hardware.GIB == pytest.approx(23.56, abs=0.01)


def test_exactly_the_cards_below_hopper_need_the_plugin():
    assert {g.id for g in all_gpus() if g.needs_plugin} == {
        "a100-80g",
        "a100-40g",
        "a800-80g",
        "a40",
        "rtx-a6000",
        "l40",
        "l40s",
        "l20",
        "rtx-4090-48g",
        "rtx-4090",
        "rtx-3090",
    }
