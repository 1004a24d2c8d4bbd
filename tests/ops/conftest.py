# SPDX-License-Identifier: Apache-2.0
"""Kernels run in Triton's interpreter here, whatever the machine.

Triton reads TRITON_INTERPRET when a kernel is defined, its own library's functions included. So
everything is imported here, under the variable, which is then taken away again: engines that other
tests start must not inherit it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
import triton.language
from triton.runtime.interpreter import InterpretedFunction

from dsv4.ops import registry
from dsv4.ops.kernels import KERNEL_MODULES, import_kernels
from tests.support import interpreter_bf16

import_kernels(KERNEL_MODULES)
del os.environ["TRITON_INTERPRET"]

if not isinstance(triton.language.standard.sum, InterpretedFunction):
    raise pytest.UsageError("triton was imported before tests/ops; run tests/ops in a process of its own")
interpreter_bf16.install()


@pytest.fixture(autouse=True)
def _kernels_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every operator is served by its kernel, on one thread, from the same random numbers;
    torch.empty holds NaN."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("DSV4_OPS", "triton")
    registry.forget_choices()
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)  # which fills what torch.empty returns
    yield
    torch.use_deterministic_algorithms(False)
    registry.forget_choices()
