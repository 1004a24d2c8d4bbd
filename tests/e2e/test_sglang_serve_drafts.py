# SPDX-License-Identifier: Apache-2.0
"""`sglang serve` with MTP drafts: all that a server without them does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from served import SGLANG, Server

from tests.e2e import test_sglang_serve as without_drafts
from tests.support.serve_checks import serve_until_sigterm
from tests.support.sglang_engine import environment

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def server(tiny_flash: Path) -> Iterator[Server]:
    drafts = ("--speculative-algorithm", "NEXTN", "--speculative-num-steps", "2")
    yield from serve_until_sigterm(SGLANG.command(tiny_flash, "--enable-metrics", *drafts), environment())


class TestSglangServeDrafts(without_drafts.TestSglangServe):
    """The same checks."""
