# SPDX-License-Identifier: Apache-2.0
"""The accounting against the engines' own KV planners, on a CPU, over the settings that change it;
and their parsers."""

from __future__ import annotations

import functools
from dataclasses import replace
from itertools import product

import pytest

from dsv4.machine.compat import TESTED_VERSIONS
from dsv4.machine.hardware import find_gpu
from dsv4.model.kv_layout import IndexFormat, KvFormat, StateMapping
from dsv4.planning.deployment import Deployment, Speculation, find_checkpoint
from dsv4.planning.launch import deployment_commands
from dsv4.planning.memory import sglang, vllm
from dsv4.planning.memory.proof import prove
from dsv4.planning.memory.vllm import in_flight_tokens
from dsv4.planning.planner import Question, plan
from dsv4.planning.recipe import check as recipe_check
from dsv4.planning.recipe.question import Case
from dsv4.planning.recipe.schema import shipped_recipes

ENGINES = {(e.name, e.version): e for e in recipe_check.find_engines()}
BASE = Deployment(
    checkpoint=find_checkpoint("pro"), engine="vllm", gpu=find_gpu("h200"), count=8, nodes=1, tp=8, dp=1, ep=True, pp=1,
    max_model_len=819_200, max_num_batched_tokens=4096, max_num_seqs=16, memory_fraction=0.95, state=StateMapping.PAGED,
)  # fmt: skip

POOL_BYTES = 300 << 30


def _versions(engine: str) -> list:
    return [pytest.param(engine, v, id=f"{engine}-{v}") for v in TESTED_VERSIONS[engine]]


@functools.cache
def _all_answers(engine: str, version: str) -> dict:
    """Every question of this file at once: importing an engine takes longer than answering."""
    cases = _vllm_cases() if engine == "vllm" else _sglang_cases()
    recipes = [recipe_check.case_of(r, id=f"recipe/{r.id}") for r in _recipes(engine, version)]
    return recipe_check.ask_engine(ENGINES[engine, version], [*cases, *recipes, *_planned_cases(engine)])


def _planned_cases(engine: str) -> list[Case]:
    """The commands that plans print."""
    cases = []
    for model, gpu, count in (
        ("pro", "h200", 8),
        ("pro", "h100", 16),
        ("flash-0731", "b200", 4),
        ("flash", "a100", 8),
        ("pro", "gb200", 8),
        ("pro", "gb300", 72),
    ):
        card = find_gpu(gpu)
        question = Question(
            checkpoint=find_checkpoint(model),
            gpu=card,
            count=count,
            nodes=card.nodes_for(count),
            context=131_072,
            engine=engine,
        )
        for c in plan(question):
            argvs = (
                tuple(command.argv(rank, "10.0.0.1")[2:])
                for rank, command in enumerate(deployment_commands(c.deployment))
            )
            cases.append(Case(id=f"plan/{len(cases)}", argvs=tuple(argvs)))
    return cases


def _answers(engine: str, version: str, prefix: str) -> dict:
    if (engine, version) not in ENGINES:
        pytest.skip(f"{engine} {version} is not at hand (dsv4 recipes check --engine-path)")
    return {k.removeprefix(prefix): v for k, v in _all_answers(engine, version).items() if k.startswith(prefix)}


def _recipes(engine: str, version: str) -> list:
    return [r for r in shipped_recipes() if r.engine.name == engine and version in r.versions and r.can_work]


def _kv_case(name: str, d: Deployment, pool_bytes: int) -> Case:
    return Case(id=name, kv=replace(recipe_check.kv_question(d, prove(d)), pool_bytes=(pool_bytes,) * d.pp))


def _argv_case(name: str, args: list[str], env: tuple[str, ...] = ()) -> Case:
    return Case(id=f"argv/{name}", argvs=(tuple(args),), env=env)


def _vllm_grid() -> list[Deployment]:
    grid = []
    for name, index, step, asynchronous, pp, draft in product(
        ("flash", "pro", "flash-0731"), IndexFormat, (512, 16_384), (False, True), (1, 3), (False, True)
    ):
        checkpoint = find_checkpoint(name)
        speculation = Speculation(method=checkpoint.config.draft, num_tokens=3) if draft else Speculation()
        kv = KvFormat.PLAIN if index is IndexFormat.PLAIN else KvFormat.FP8_DS_MLA
        length = 1_048_576 if step == 512 else 30_001
        grid.append(
            replace(
                BASE,
                checkpoint=checkpoint,
                index=index,
                kv=kv,
                max_num_batched_tokens=step,
                async_scheduling=asynchronous,
                pp=pp,
                speculation=speculation,
                max_model_len=length,
            )
        )
    return grid


def _vllm_cases() -> list[Case]:
    need = prove(BASE).need_bytes
    names = [
        "deepseek-ai/DeepSeek-V4-Flash",
        "--tokenizer-mode",
        "bogus",
        "--tool-call-parser",
        "zzz",
        "--reasoning-parser",
        "zzz",
        "--speculative-config",
        '{"method": "zzz", "num_speculative_tokens": 1}',
        "--kv-cache-dtype",
        "fp8_ds_mla",
    ]
    return [
        *(_kv_case(f"grid/{i}", d, POOL_BYTES) for i, d in enumerate(_vllm_grid())),
        *(_kv_case(f"start/{n}", BASE, need - n) for n in (0, 1)),
        _argv_case("names", names, ("VLLM_USE_B12X_MOE", "NCCL_DEBUG")),
        _argv_case(
            "dead",
            ["model", "--attention-config.use_fp4_indexer_cache", "true", "--moe-backend", "deep_gemm_amxf4_mega_moe"],
        ),
        _argv_case("unknown", ["model", "--no-such-flag"]),
        _argv_case("good", ["model", "--max-model-len", "800k"], ("VLLM_USE_BREAKABLE_CUDAGRAPH",)),
    ]


@pytest.mark.parametrize(("engine", "version"), _versions("vllm"))
def test_groups_blocks_and_requests_equal_vllm_exactly(engine, version):
    answers = _answers(engine, version, "grid/")
    for i, d in enumerate(_vllm_grid()):
        theirs = answers[str(i)].kv
        assert answers[str(i)].kv_error is None
        flight = in_flight_tokens(d.max_num_batched_tokens, d.async_scheduling, d.pp)
        pools = [vllm.stage_pool(d, stage) for stage in range(d.pp)]
        assert theirs.in_flight_tokens == flight
        assert [s.block_bytes for s in theirs.stages] == [p.block_bytes for p in pools]
        assert [s.request_bytes for s in theirs.stages] == [p.request_bytes(d.max_model_len, flight) for p in pools]
        assert theirs.num_blocks == min(p.num_blocks(POOL_BYTES) for p in pools)
        assert theirs.concurrency == pytest.approx(theirs.num_blocks / pools[0].request_blocks(d.max_model_len, flight))


@pytest.mark.parametrize(("engine", "version"), _versions("vllm"))
def test_vllm_starts_with_exactly_the_memory_that_the_formula_asks_for(engine, version):
    answers = _answers(engine, version, "start/")
    assert answers["0"].kv_error is None
    assert "KV cache is needed" in answers["1"].kv_error


def _sglang_grid() -> list[Deployment]:
    grid = []
    for name, ratio, seqs, dp, pp, draft, overlap in product(
        ("flash", "pro", "flash-0731"), (None, 0.1, 0.075), (8, 256), (1, 4), (1, 2), (False, True), (False, True)
    ):
        checkpoint = find_checkpoint(name)
        if draft and not overlap:
            continue  # speculation always overlaps
        speculation = Speculation(method=checkpoint.config.draft, num_tokens=3) if draft else Speculation()
        grid.append(
            replace(
                BASE,
                engine="sglang",
                state=StateMapping.RING,
                checkpoint=checkpoint,
                swa_full_tokens_ratio=ratio,
                max_num_seqs=seqs,
                dp=dp,
                pp=pp,
                speculation=speculation,
                async_scheduling=overlap,
            )
        )
    return grid


def _sglang_cases() -> list[Case]:
    argv = {
        "abbreviation": ["--tp", "8"],
        "ambiguous": ["--cuda-graph-max-bs", "8"],
        "deprecated": ["--dp-size", "8", "--enable-dp-attention"],
        "algorithm": ["--speculative-algorithm", "NGRAM"],
        "parsers": ["--reasoning-parser", "deepseek-v4", "--tool-call-parser", "zzz"],
        "good": ["--tp-size", "8", "--attn-dp-size", "8"],
    }
    return [
        *(_kv_case(f"grid/{i}", d, POOL_BYTES) for i, d in enumerate(_sglang_grid())),
        *(_argv_case(name, ["--model-path", "m", *args]) for name, args in argv.items()),
        _argv_case("env", ["--model-path", "m"], ("SGLANG_ENABLE_SPEC_V2", "SGLANG_SHARED_EXPERT_TP1")),
    ]


@pytest.mark.parametrize(("engine", "version"), _versions("sglang"))
def test_pool_sizes_equal_sglang_exactly(engine, version):
    answers = _answers(engine, version, "grid/")
    for i, d in enumerate(_sglang_grid()):
        assert answers[str(i)].kv_error is None
        for stage, theirs in enumerate(answers[str(i)].kv.stages):
            pool = sglang.stage_pool(d, stage)
            assert pool.bytes_per_full_token == pytest.approx(theirs.bytes_per_full_token, rel=1e-12)
            assert pool.fixed_bytes == pytest.approx(theirs.fixed_bytes, rel=1e-9)
            assert abs(pool.full_tokens(POOL_BYTES) - theirs.full_tokens) <= 256


@pytest.mark.parametrize(("engine", "version"), _versions("vllm"))
def test_vllm_probe_refuses_what_the_parser_accepts(engine, version):
    answers = _answers(engine, version, "argv/")
    complaints = " | ".join(answers["names"].errors)
    for name in (
        "--tokenizer-mode bogus",
        "--tool-call-parser zzz",
        "--reasoning-parser zzz",
        "method zzz",
        "VLLM_USE_B12X_MOE",
    ):
        assert name in complaints
    assert "NCCL_DEBUG" not in complaints
    assert answers["dead"].errors
    assert answers["unknown"].errors
    assert answers["good"].errors == ()


@pytest.mark.parametrize(("engine", "version"), _versions("sglang"))
def test_sglang_probe_refuses_abbreviations_and_removed_names(engine, version):
    answers = _answers(engine, version, "argv/")
    for name in ("abbreviation", "ambiguous", "deprecated", "algorithm", "parsers"):
        assert answers[name].errors, name
    assert [e.split(":")[0] for e in answers["env"].errors] == ["environment variable SGLANG_ENABLE_SPEC_V2"]
    assert answers["good"].errors == ()


@pytest.mark.parametrize(("engine", "version"), [p for e in TESTED_VERSIONS for p in _versions(e)])
def test_every_recipe_passes_the_engine_rung(engine, version):
    answers = _answers(engine, version, "recipe/")
    recipes = _recipes(engine, version)
    assert len(recipes) > 20
    problems = {r.id: found for r in recipes if (found := recipe_check.compare(r, answers[r.id]))}
    assert problems == {}


def _scaled(value: float, factor: float) -> float:
    return type(value)(value * factor)


@pytest.mark.parametrize(("engine", "version"), [p for e in TESTED_VERSIONS for p in _versions(e)])
def test_disagreement_above_1_percent_is_a_failure(engine, version):
    recipe = _recipes(engine, version)[0]
    answer = _answers(engine, version, "recipe/")[recipe.id]
    field = "block_bytes" if engine == "vllm" else "bytes_per_full_token"
    for factor, fails in ((1.005, False), (1.02, True), (0.98, True)):
        stages = tuple(replace(stage, **{field: _scaled(getattr(stage, field), factor)}) for stage in answer.kv.stages)
        problems = recipe_check.compare(recipe, replace(answer, kv=replace(answer.kv, stages=stages)))
        assert bool(problems) is fails
    broken = replace(answer, kv=None, kv_error="ValueError: no memory")
    assert recipe_check.compare(recipe, broken) == ["the engine's KV planner failed: ValueError: no memory"]


@pytest.mark.parametrize(("engine", "version"), [p for e in TESTED_VERSIONS for p in _versions(e)])
def test_every_planned_command_parses(engine, version):
    answers = _answers(engine, version, "plan/")
    assert len(answers) > 20
    assert {k: v.errors for k, v in answers.items() if v.errors} == {}
