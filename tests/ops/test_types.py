# SPDX-License-Identifier: Apache-2.0
"""mypy follows torch and the operators' signatures: exchanged arguments are reported where they
stand."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SNIPPET = """
from torch import Tensor

from dsv4.ops import attention, indexer, mhc
from dsv4.ops.pages import Pages, PageTable, Selection, SlotMapping


def sound(q: Tensor, pages: Pages, slots: Tensor, lens: Tensor, sink: Tensor, table: Tensor) -> Tensor:
    window = Selection(pages, slots, lens)
    return attention.sparse_attention(q, window, None, sink, table)[0]


def unsound(q: Tensor, pages: Pages, slots: Tensor, lens: Tensor, sink: Tensor, table: Tensor, site: mhc.Site) -> None:
    window = Selection(slots, pages, lens)  # exchanged
    attention.sparse_attention(window, q, None, sink, table)  # exchanged
    attention.sparse_attention(q, None, window, sink, table)  # exchanged
    attention.sparse_attention(q, window, sink, window, table)  # exchanged
    attention.norm_rope_store(q, q, sink, table, 1e-6, SlotMapping(pages, slots))  # exchanged
    indexer.topk(q, lens, PageTable(pages, slots), 16, lens)  # exchanged
    mhc.pre(site, q)  # exchanged
"""


def test_exchanged_arguments_are_seen(tmp_path: Path) -> None:
    snippet = tmp_path / "snippet.py"
    snippet.write_text(SNIPPET)
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), str(snippet)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    reported = {int(line) for line in re.findall(r"snippet\.py:(\d+): error:", done.stdout)}
    assert reported == {n for n, line in enumerate(SNIPPET.splitlines(), 1) if line.endswith("# exchanged")}, (
        done.stdout + done.stderr
    )
