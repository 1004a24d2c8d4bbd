# SPDX-License-Identifier: Apache-2.0
"""The planner's formula for what captured graphs hold, against what the real model allocates
(`benchmarks/graph_memory.py`)."""

from __future__ import annotations

import json

import pytest

from dsv4.planning.deployment import MAX_CONTEXT, find_checkpoint
from dsv4.planning.memory.overheads import plugin_graphs
from tests.support.comparison import ROOT

RECORD = json.loads((ROOT / "benchmarks" / "results" / "graph_memory.json").read_text())


@pytest.mark.parametrize("model", ["flash", "pro"])
def test_the_formula_covers_what_the_largest_capture_holds(model: str) -> None:
    """Never less, and at most 5 % more."""
    decode, mixed = RECORD[model]["bytes"].values()
    config = find_checkpoint(model).config
    assert 1 <= plugin_graphs(config, 1, MAX_CONTEXT, 256, 0).low / decode < 1.05
    # Mixed steps hold more than one decode.
    assert 1 <= plugin_graphs(config, 1, MAX_CONTEXT, 1, 512).low / mixed < 1.05


def test_short_contexts_score_less() -> None:
    config = find_checkpoint("flash").config
    long, short = (plugin_graphs(config, 8, context, 16, 0).low for context in (MAX_CONTEXT, 4096))
    assert long - short == 16 * (MAX_CONTEXT - 4096)  # four bytes for every four tokens
