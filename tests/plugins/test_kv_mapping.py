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
from dsv4.planning.memory.vllm import InFlight, vllm_pool

ROOT = Path(__file__).parents[2]
MOST_RESERVE_MIB = {"flash": 64, "pro": 96}
FORMATS = CacheFormats(KvFormat.FP8_DS_MLA, IndexFormat.FP8)


def _record(extra_path: Path | None) -> dict[str, Any]:
    path = os.pathsep.join(str(p) for p in (extra_path, ROOT) if p is not None)
    script = str(ROOT / "benchmarks" / "bench_kv_mapping.py")
    done = subprocess.run(
        [sys.executable, script, "--no-held"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
        timeout=300,
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
def test_one_request_starts_with_less_at_every_point(record: dict[str, Any], model: str) -> None:
    rows = record["points"][model]
    assert len(rows) == 10
    assert all(row["summary"]["request_gib"] < row["native"]["request_gib"] for row in rows)


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
    for row in record["points"][model]:
        in_flight = row["max_num_batched_tokens"] * (2 if row["async_scheduling"] else 1)
        assert row[name]["block_bytes"] == pool.block_bytes
        assert row[name]["request_gib"] == round(pool.request_bytes(row["max_model_len"], in_flight) / 2**30, 3)


def test_the_committed_record_is_what_the_planner_says_today(record: dict[str, Any]) -> None:
    committed = _committed()
    assert committed["points"] == record["points"]
    assert committed["curves"] == record["curves"]


def test_the_recorded_requests_at_once_are_the_computed_ones_within_2_percent() -> None:
    held = _committed()["held"]
    assert len(held) == 12
    for row in held:
        for name, mapping in (("native", StateMapping.PAGED), ("summary", StateMapping.SUMMARY)):
            pool = vllm_pool(find_checkpoint(row["model"]).config, FORMATS, mapping=mapping)
            flight = InFlight(2 * row["max_num_batched_tokens"], 2)
            computed = pool.requests_at_once(int(row["pool_gib"] * 2**30), row["max_model_len"], flight)
            assert computed == pytest.approx(row[name], rel=0.02), row
    assert min(row["times"] for row in held) < 1 < max(row["times"] for row in held)


def test_documents_say_what_the_record_holds() -> None:
    def row(model: str, gib: float, context: int) -> dict[str, Any]:
        (one,) = (
            r for r in _committed()["held"] if (r["model"], r["pool_gib"], r["max_model_len"]) == (model, gib, context)
        )
        return one

    readme, page = ((ROOT / name).read_text() for name in ("README.md", "docs/kv-mapping.md"))
    for one in _committed()["held"]:
        shape = f"| V4-{one['model'].capitalize()}, {one['pool_gib']:g} GiB"
        figures = f"{one['native']:,} | {one['summary']:,} | {one['times']:.2f} |"
        line = f"{shape} | {one['max_model_len']:,} | {one['max_num_batched_tokens']:,} | {figures}"
        assert line in page, line
    large, same, less = row("pro", 22, 86_016), row("flash", 100, 86_016), row("flash", 100, 1_048_576)
    for one in (large, same, less):
        assert f"{one['native']} -> {one['summary']}" in " ".join(readme.split())


def _committed() -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks" / "results" / "kv_mapping.json").read_text())
