# SPDX-License-Identifier: Apache-2.0
"""Where kernels do not run they say why."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from dsv4.errors import OpUnavailableError
from dsv4.ops import kernels, registry

CPU = torch.device("cpu")


def test_every_operator_with_a_kernel_is_served_by_it_in_the_interpreter() -> None:
    for op, declared in registry.OPERATORS.items():
        offers = declared.offers
        declared.choice(CPU)
        assert offers[0].name == "reference"
        assert registry.report()[op]["impl"] == ("triton" if len(offers) > 1 else "reference")


def test_auto_keeps_the_references_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSV4_OPS", "auto")
    registry.OPERATORS["attention.sparse"].choice(CPU)
    assert registry.report()["attention.sparse"]["impl"] == "reference"
    assert "triton: no accelerator" in registry.report()["attention.sparse"]["reason"]


def test_a_device_without_kernels_gets_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(
        OpUnavailableError, match=r"attention\.sparse.*cpu.*no CPU compiler; TRITON_INTERPRET=1.*DSV4_OPS=triton"
    ):
        registry.OPERATORS["attention.sparse"].choice(CPU)


@pytest.mark.parametrize(
    ("properties", "hip", "expected"),
    [
        (
            {"name": "Tesla T4", "major": 7, "minor": 5},
            None,
            "Tesla T4 has compute capability 7.5, the kernels need 8.0",
        ),
        ({"name": "A100", "major": 8, "minor": 0}, None, None),
        ({"name": "RTX PRO 6000", "major": 12, "minor": 0}, None, None),
        ({"name": "MI300X", "gcnArchName": "gfx942:sramecc+:xnack-"}, "7.0", None),
        (
            {"name": "RX 7900", "gcnArchName": "gfx1100"},
            "7.0",
            "RX 7900 is gfx1100; the kernels are built for gfx942 and gfx950",
        ),
    ],
)
def test_gpus_are_refused_by_what_they_lack(
    monkeypatch: pytest.MonkeyPatch, properties: dict[str, object], hip: str | None, expected: str | None
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(**properties))
    monkeypatch.setattr(torch.version, "hip", hip)
    kernels._refuse_gpu.cache_clear()
    assert kernels.refuse_triton(torch.device("cuda", 0)) == expected
    kernels._refuse_gpu.cache_clear()


def test_no_accelerator_falls_back_to_a_reference_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.setenv("DSV4_OPS", "auto")
    with pytest.raises(
        OpUnavailableError, match=r"mhc\.pre.*on xpu:0.*needs an NVIDIA or AMD GPU, not xpu.*DSV4_OPS=reference asks"
    ):
        registry.OPERATORS["mhc.pre"].choice(torch.device("xpu", 0))


def test_other_devices_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    assert kernels.refuse_triton(torch.device("xpu", 0)) == "needs an NVIDIA or AMD GPU, not xpu"
