# SPDX-License-Identifier: Apache-2.0
"""The summary mapping by vLLM's own KV planner: what it promises, and that our accounting says the
same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dsv4.model.kv_layout import CacheFormats, IndexFormat, KvFormat, StateMapping
from dsv4.planning.deployment import find_checkpoint
from dsv4.planning.memory.vllm import vllm_pool

ROOT = Path(__file__).parents[2]
MOST_RESERVE_MIB = {"flash": 64, "pro": 96}
FORMATS = CacheFormats(KvFormat.FP8_DS_MLA, IndexFormat.FP8)


def _record(extra_path: Path | None) -> dict[str, Any]:
    path = os.pathsep.join(str(p) for p in (extra_path, ROOT) if p is not None)
    script = str(ROOT / "benchmarks" / "bench_kv_mapping.py")
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module", params=["installed", "0.33.0"])
def record(request: pytest.FixtureRequest) -> dict[str, Any]:
    folder = ROOT / ".env" / "vllm-0.33.0"
    if request.param == "installed":
        return _record(None)
    if not (folder / ".unpacked").exists():
        pytest.skip(f"{folder} is missing; `make env` unpacks it")
    return _record(folder)


@pytest.mark.parametrize("model", ["flash", "pro"])
def test_every_point_admits_more_and_the_first_at_least_four_times(record: dict[str, Any], model: str) -> None:
    rows = record["points"][model]
    assert len(rows) == 10
    assert all(row["times_the_requests"] >= 1 for row in rows)
    first = [row["times_the_requests"] for row in rows if row["max_model_len"] == 86_016]
    assert min(first) >= 4


@pytest.mark.parametrize("model", ["flash", "pro"])
def test_reserve_beyond_context_and_window_is_small(record: dict[str, Any], model: str) -> None:
    assert max(row["reserve_mib"]["summary"] for row in record["points"][model]) <= MOST_RESERVE_MIB[model]


@pytest.mark.parametrize("model", ["flash", "pro"])
def test_a_context_token_costs_at_most_a_fifth_more(record: dict[str, Any], model: str) -> None:
    row = record["points"][model][0]
    assert row["summary"]["block_bytes"] <= 1.20 * row["native"]["block_bytes"]


@pytest.mark.parametrize("model", ["flash", "pro"])
@pytest.mark.parametrize(("name", "mapping"), [("native", StateMapping.PAGED), ("summary", StateMapping.SUMMARY)])
def test_our_accounting_equals_vllms(record: dict[str, Any], model: str, name: str, mapping: StateMapping) -> None:
    pool = vllm_pool(find_checkpoint(model).config, FORMATS, mapping=mapping)
    for row in record["points"][model] + record["curves"][model]:
        in_flight = row["max_num_batched_tokens"] * (2 if row["async_scheduling"] else 1)
        assert row[name]["block_bytes"] == pool.block_bytes
        assert row[name]["request_gib"] == round(pool.request_bytes(row["max_model_len"], in_flight) / 2**30, 3)


def test_the_committed_record_is_what_the_planner_says_today(record: dict[str, Any]) -> None:
    committed = json.loads((ROOT / "benchmarks" / "results" / "kv_mapping.json").read_text())
    assert committed["points"] == record["points"]
