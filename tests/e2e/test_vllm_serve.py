# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` in its own process, as users run it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from served import VLLM, Server

from tests.support.serve_checks import ServeChecks, serve_until_sigterm
from tests.support.vllm_engine import MODEL_CLASS, environment


@pytest.fixture(scope="module")
def server(tiny_flash: Path) -> Iterator[Server]:
    yield from serve_until_sigterm(VLLM.command(tiny_flash), environment())


class TestVllmServe(ServeChecks):
    engine = VLLM
    model_class = MODEL_CLASS
    attention_backends = ("DSV4_ENTRY", "DSV4_SUMMARY", "DSV4_WINDOW")
    quant_method = "dsv4_vllm.quant.V4QuantConfig"
    running_requests = "vllm:num_requests_running"
