# SPDX-License-Identifier: Apache-2.0
"""Bytes that captured graphs hold at real widths: see `benchmarks/graph_memory.py`."""

from __future__ import annotations

import json
import sys

import pytest

from tests.support.comparison import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import graph_memory

RECORD = json.loads((ROOT / "benchmarks" / "results" / "graph_memory.json").read_text())
GIB = 1 << 30


@pytest.mark.parametrize("model", ["flash", pytest.param("pro", marks=pytest.mark.long)])
def test_the_record_is_what_the_model_allocates(model: str) -> None:
    assert graph_memory.measured(model) == RECORD[model]


def test_graphs_of_flash_hold_a_fifth_of_a_gib_at_most() -> None:
    """At the engine's own sizes and the longest context."""
    found = RECORD["flash"]
    assert (found["max_num_seqs"], found["max_model_len"], found["capture_sizes"]) == (256, 1_048_576, [51, 512])
    assert max(found["bytes"].values()) <= 0.2 * GIB


def test_the_document_has_the_records_figures() -> None:
    text = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    kinds = list(RECORD["flash"]["bytes"])
    assert kinds == list(RECORD["pro"]["bytes"])
    for kind in kinds:
        cells = [kind, *(f"{RECORD[model]['bytes'][kind] / graph_memory.MIB:.0f} MiB" for model in ("flash", "pro"))]
        assert f"| {' | '.join(cells)} |" in text
