# SPDX-License-Identifier: Apache-2.0
"""Requests at once, as the planner computes them, against the engines' own block managers on a CPU:
chunked prefill, then decode to full length."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from benchmarks import vllm_capacity
from dsv4.planning.deployment import find_checkpoint
from dsv4.planning.memory.sglang import SglangPool, SglangRequest, sglang_pool
from dsv4.planning.memory.vllm import InFlight, VllmPool, vllm_pool
from tests.support import sglang_capacity

ROOT = Path(__file__).parents[2]
GIB = 1 << 30
WITHIN = 0.02  # of the computed number, before it is cut to whole requests
MAPPINGS = (("paged", 0), ("paged", 2), ("summary", 0), ("summary", 2), ("summary", 5))


def _ask(driver: Any, cases: list, engine: Path | None = None) -> list[dict[str, Any]]:
    """The driver's answers, in a process of its own that sees the engine in folder `engine`."""
    path = os.pathsep.join(str(p) for p in (engine, ROOT) if p is not None)
    done = subprocess.run(
        [sys.executable, driver.__file__],
        input=json.dumps([case.to_json() for case in cases]),
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def _vllm(case: vllm_capacity.Case) -> VllmPool:
    q = case.question
    config = find_checkpoint(case.model).config
    return vllm_pool(config, vllm_capacity.FORMATS, q.num_draft_layers, mapping=q.state, drafted=case.drafts)


def _flight(case: vllm_capacity.Case) -> InFlight:
    return InFlight(case.batches * case.step, (1 + case.drafts) * case.batches + case.drafts)


def _computed(case: vllm_capacity.Case, context: int) -> float:
    """`requests_at_once` before it is cut to whole requests."""
    pool, flight = _vllm(case), _flight(case)
    left = pool.num_blocks(case.pool_bytes) - 1 - pool.request_blocks(context, flight.tokens)
    computed = left / pool.decoding_blocks(context, flight.unsettled_tokens) + 1
    assert pool.requests_at_once(case.pool_bytes, context, flight) == int(computed)
    return computed


def _by_manager() -> list[vllm_capacity.Case]:
    points = ((8192, 2048, 4), (32_768, 8192, 12), (65_536, 8192, 14), (131_072, 4096, 16), (86_016, 16_384, 20))
    points += ((262_144, 8192, 20), (1_048_576, 4096, 20))
    return [
        vllm_capacity.Case(
            model=model,
            state=state,
            context=context,
            step=step,
            asynchronous=asynchronous,
            drafts=drafts,
            pool_bytes=gib * GIB,
            by="manager",
        )
        for model, (context, step, gib), asynchronous, (state, drafts) in product(
            ("flash", "pro"), points, (True, False), MAPPINGS
        )
    ]


def _by_scheduler() -> list[vllm_capacity.Case]:
    found = []
    for model, asynchronous, (state, drafts) in product(("flash", "pro"), (True, False), MAPPINGS):
        case = vllm_capacity.Case(
            model=model,
            state=state,
            context=131_072,
            step=16_384,
            asynchronous=asynchronous,
            drafts=drafts,
            pool_bytes=(24 if model == "flash" else 32) * GIB,
            by="scheduler",
        )
        found.append(replace(case, queued=int(1.1 * _computed(case, case.context)) + 2))
    return found


# held: what vLLM's block manager was seen to hold; printed: its own start-up line there.
NAMED = [
    (("flash", "paged", 65_536, 8192, 47.43), 154, 7.32),
    (("pro", "paged", 86_016, 16_384, 22), 8, 1.20),
    (("pro", "summary", 86_016, 16_384, 22), 38, 10.30),
    (("flash", "paged", 131_072, 4096, 47.43), 88, 13.14),
    (("flash", "paged", 86_016, 16_384, 100), 261, 7.83),
    (("flash", "summary", 86_016, 16_384, 100), 265, 67.04),
]


@pytest.mark.parametrize(("setting", "held", "printed"), NAMED)
def test_the_named_deployments_hold_what_vllm_was_seen_to_hold(setting, held, printed):
    model, state, context, step, gib = setting
    case = vllm_capacity.Case(
        model=model, state=state, context=context, step=step, asynchronous=True, drafts=0,
        pool_bytes=int(gib * GIB), by="manager",
    )  # fmt: skip
    pool, flight = _vllm(case), _flight(case)
    assert abs(pool.requests_at_once(case.pool_bytes, context, flight) - held) <= WITHIN * held
    assert pool.printed_concurrency(case.pool_bytes, context, flight.tokens) == pytest.approx(printed, abs=0.005)


def _off(cases: list[vllm_capacity.Case], answers: list[dict[str, Any]]) -> dict[str, tuple[float, int]]:
    """Cases whose answer is not the computed one within 2 %."""
    wrong = {}
    for case, answer in zip(cases, answers, strict=True):
        assert answer["blocks"] == _vllm(case).num_blocks(case.pool_bytes)
        most = _computed(case, case.context - case.output if case.queued else case.context)
        least = _computed(case, case.context)
        if not int(least * (1 - WITHIN)) <= answer["held"] <= int(most * (1 + WITHIN)):
            wrong[str(case)] = (least, answer["held"])
    return wrong


@pytest.mark.long
def test_vllms_block_manager_holds_as_many_requests_as_computed():
    cases = _by_manager()
    assert len(cases) >= 60
    assert _off(cases, _ask(vllm_capacity, cases)) == {}


@pytest.mark.long
def test_vllms_scheduler_runs_as_many_requests_as_computed_without_preemption():
    cases = _by_scheduler()
    assert all(case.output < 0.02 * case.context for case in cases)  # the last one admitted is as long within 2 %
    answers = _ask(vllm_capacity, cases)
    assert _off(cases, answers) == {}
    assert all(answer["held"] < case.queued for case, answer in zip(cases, answers, strict=True))


def test_each_tested_vllm_holds_as_many_requests_as_computed():
    folder = ROOT / ".env" / "vllm-0.33.0"
    cases = [case for case in _by_manager() if case.model == "flash" and case.context == 32_768]
    for engine in (None, folder if folder.is_dir() else None):
        assert _off(cases, _ask(vllm_capacity, cases, engine)) == {}


def test_a_summary_holds_more_where_the_pool_is_of_the_order_of_the_reserve_and_less_where_contexts_are_long():
    def held(state: str, model: str, context: int, step: int, gib: int) -> int:
        case = vllm_capacity.Case(
            model=model, state=state, context=context, step=step, asynchronous=True, drafts=0,
            pool_bytes=gib * GIB, by="manager",
        )  # fmt: skip
        return _vllm(case).requests_at_once(case.pool_bytes, context, _flight(case))

    assert held("summary", "pro", 86_016, 16_384, 22) > 4 * held("paged", "pro", 86_016, 16_384, 22)
    assert held("summary", "flash", 262_144, 2048, 100) < held("paged", "flash", 262_144, 2048, 100)


# SGLang
# ----------------------------------------------------------------------------------------------


def _by_allocator() -> list[sglang_capacity.Case]:
    return [
        sglang_capacity.Case(
            full_tokens=tokens, ratio=ratio, context=context, chunk=chunk, overlap=overlap, drafts=drafts
        )
        for (context, tokens), chunk, ratio, overlap, drafts in product(
            ((4096, 200_000), (16_384, 400_000), (65_536, 1_000_000)), (2048, 8192), (0.03, 0.1), (True, False), (0, 2)
        )
        if overlap or not drafts
    ]


def _sglang(case: sglang_capacity.Case) -> SglangPool:
    request = SglangRequest(
        max_running_requests=256,
        chunked_prefill_tokens=case.chunk,
        swa_full_tokens_ratio=case.ratio,
        draft_tokens=case.drafts + 1 if case.drafts else 0,
        overlap_schedule=case.overlap,
    )
    return sglang_pool(find_checkpoint("flash").config, vllm_capacity.FORMATS, request)


@pytest.mark.parametrize(
    "cases",
    [pytest.param(_by_allocator(), marks=pytest.mark.long, id="all"), pytest.param(_by_allocator()[3::12], id="some")],
)
def test_sglangs_allocator_holds_as_many_requests_as_computed(cases):
    wrong = {}
    for case, held in zip(cases, _ask(sglang_capacity, cases), strict=True):
        computed = _sglang(case).requests_at_once(case.full_tokens, case.context)
        if abs(held - computed) > max(WITHIN * held, 1):  # whole pages of one request, where few are held
            wrong[str(case)] = (computed, held)
    assert wrong == {}


def test_sglangs_bytes_for_requests_are_those_its_pool_holds_them_in():
    for case in _by_allocator():
        pool = _sglang(case)
        for requests in (1, 2, 7, 40):
            tokens = pool.full_tokens(pool.need_bytes(requests, case.context))
            assert pool.requests_at_once(tokens, case.context) >= requests
            assert pool.requests_at_once(tokens - 512, case.context) <= requests
