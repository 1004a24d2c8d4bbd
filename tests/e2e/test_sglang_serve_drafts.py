# SPDX-License-Identifier: Apache-2.0
"""`sglang serve` with MTP drafts: all that a server without them does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from served import SGLANG, Server

from dsv4.proof.status import ServerStatus
from tests.e2e import test_sglang_serve as without_drafts
from tests.support.serve_checks import CHAT, serve_until_sigterm
from tests.support.sglang_engine import environment

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def server(tiny_flash: Path) -> Iterator[Server]:
    drafts = ("--speculative-algorithm", "NEXTN", "--speculative-num-steps", "2")
    yield from serve_until_sigterm(SGLANG.command(tiny_flash, "--enable-metrics", *drafts), environment())


class TestSglangServeDrafts(without_drafts.TestSglangServe):
    """The same checks, and one more."""

    def test_status_says_who_drafts_and_how_long_steps_are(self, server: Server) -> None:
        server.post("/v1/chat/completions", CHAT)
        status = ServerStatus.from_json(server.get("/dsv4/status"))
        worker = status.workers[0]
        assert worker.draft_class is not None
        assert worker.draft_class.startswith("dsv4_sglang.")
        assert worker.drafted == 2
        assert status.acceptance is not None
        assert 1 <= status.acceptance.tokens_per_step <= 3
