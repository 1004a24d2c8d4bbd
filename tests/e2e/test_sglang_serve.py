# SPDX-License-Identifier: Apache-2.0
"""`sglang serve` in its own process, as users run it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from served import SGLANG, Server

from tests.support.serve_checks import ServeChecks, serve_until_sigterm
from tests.support.sglang_engine import MODEL_CLASS, environment


@pytest.fixture(scope="module")
def server(tiny_flash: Path) -> Iterator[Server]:
    yield from serve_until_sigterm(SGLANG.command(tiny_flash, "--enable-metrics"), environment())


class TestSglangServe(ServeChecks):
    engine = SGLANG
    model_class = MODEL_CLASS
    attention_backends = ("dsv4_sglang.metadata.V4AttentionBackend",)
    quant_method = "dsv4_sglang.quant.V4QuantConfig"
    running_requests = "sglang:num_running_reqs"
