# SPDX-License-Identifier: Apache-2.0
"""The check ladder: schema, rules across fields, memory by formula, and the real engines where they
are at hand.

The engine rung runs one process per engine version for all recipes: argv through the engine's own
parser, names against its registries, KV through its own planner. Where a version is absent the rung
says so; it never passes silently.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import ValidationError

from dsv4.data import data_folder
from dsv4.errors import RecipeError
from dsv4.machine.compat import TESTED_VERSIONS, Engine
from dsv4.machine.hardware import GIB
from dsv4.planning.deployment import Deployment
from dsv4.planning.launch import commands
from dsv4.planning.memory import sglang, vllm
from dsv4.planning.memory.proof import Proof, Verdict, prove
from dsv4.planning.memory.vllm import stage_with_draft
from dsv4.planning.memory.weights import pipeline_layers
from dsv4.planning.recipe.question import (
    Answer,
    BlockPools,
    Case,
    EngineQuestion,
    KvQuestion,
    TokenPools,
    read_answer,
    to_json,
)
from dsv4.planning.recipe.schema import Recipe, proof_section, read_recipe
from dsv4.planning.rules import violations

TOLERANCE = 0.01
PROBE_TIMEOUT_S = 300
Outcome = Literal["ok", "fail", "skipped"]


@dataclass(frozen=True)
class Rung:
    """One step of the ladder for one recipe."""

    name: str
    outcome: Outcome
    details: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """One recipe's ladder."""

    id: str
    path: Path
    rungs: tuple[Rung, ...]

    @property
    def failed(self) -> bool:
        return any(r.outcome == "fail" for r in self.rungs)


@dataclass(frozen=True)
class InstalledEngine:
    """An engine version at hand. path: folder to put on PYTHONPATH, None for this interpreter's
    own.
    """

    name: Engine
    version: str
    path: Path | None


def find_engines(paths: Iterable[Path] = ()) -> list[InstalledEngine]:
    """Engines of this interpreter, of `paths` (unpacked wheels), and of the checkout's
    `.env/<engine>-<version>`.

    Raises RecipeError for a folder that holds none.
    """
    found = []
    for name in TESTED_VERSIONS:
        try:
            found.append(InstalledEngine(name, metadata.version(name), None))
        except metadata.PackageNotFoundError:
            continue
    checkout = Path(__file__).resolve().parents[3] / ".env"
    usual = (checkout / f"{name}-{version}" for name, versions in TESTED_VERSIONS.items() for version in versions)
    for path in (*paths, *(p for p in usual if p.is_dir())):
        matches = (re.match(r"(vllm|sglang)-(.+)\.dist-info$", p.name) for p in path.iterdir())
        inside = [InstalledEngine(cast("Engine", m[1]), m[2], path) for m in matches if m]
        if not inside:
            raise RecipeError(f"{path}: holds no vllm or sglang (no .dist-info); give a folder with an unpacked wheel")
        found += inside
    return list({(e.name, e.version): e for e in reversed(found)}.values())


def check(paths: Sequence[Path], engines: Sequence[InstalledEngine]) -> list[Report]:
    """Run the ladder over recipe files."""
    recipes: dict[Path, Recipe] = {}
    rungs: dict[Path, list[Rung]] = {path: [] for path in paths}
    for path in paths:
        try:
            recipes[path] = recipe = read_recipe(path)
        except RecipeError as e:
            rungs[path].append(Rung("schema", "fail", (str(e),)))
            continue
        rungs[path] += _static_rungs(recipe, path)
    for name, versions in TESTED_VERSIONS.items():
        for version in versions:
            cases = {p: r for p, r in recipes.items() if r.engine.name == name and version in r.versions and r.can_work}
            engine = next((e for e in engines if (e.name, e.version) == (name, version)), None)
            for path, rung in _engine_rungs(name, version, engine, cases).items():
                rungs[path].append(rung)
    return [Report(recipes[p].id if p in recipes else p.stem, p, tuple(r)) for p, r in rungs.items()]


def _static_rungs(recipe: Recipe, path: Path) -> list[Rung]:
    d = recipe.deployment()
    proof = prove(d, recipe.lengths.concurrency)
    broken = violations(d, recipe.env)
    named = [f"file is {path.name}, id is {recipe.id}"] if path.stem != recipe.id else []
    shipped = path.parent.parent == data_folder()
    placed = [f"lies in {path.parent.name}/, its GPU is {d.gpu.id}"] if shipped and path.parent.name != d.gpu.id else []
    rungs = [_rung("schema", [*named, *placed, *_record(recipe)])]
    if not recipe.can_work:
        stands = (
            []
            if broken or proof.verdict is not Verdict.FITS
            else ["marked cannot_work, yet no rule and no memory bound stands against it"]
        )
        return [*rungs, _rung("refusal", stands), _rung("memory", _proof_differs(recipe, proof))]
    plugin = recipe.engine.serves_with == "plugin"
    if d.gpu.needs_plugin and not plugin:
        broken = [*broken, f"{d.gpu.id} has no native V4; engine.serves_with must be plugin"]
    return [*rungs, _rung("rules", broken), _rung("memory", [*_proof_differs(recipe, proof), *_does_not_fit(proof)])]


def _rung(name: str, problems: Iterable[str]) -> Rung:
    details = tuple(problems)
    return Rung(name, "fail" if details else "ok", details)


def _record(recipe: Recipe) -> list[str]:
    if recipe.record is None:
        return []
    exists = (Path(__file__).resolve().parents[3] / recipe.record).is_file()
    return [] if exists else [f"record {recipe.record} is not committed"]


def _does_not_fit(proof: Proof) -> list[str]:
    if proof.verdict is not Verdict.NO:
        return []
    return [f"does not fit: {proof.shortfall_bytes / GIB:.2f} GiB short on the fullest rank"]


def _proof_differs(recipe: Recipe, proof: Proof) -> list[str]:
    """The committed proof against the recomputed one."""
    want, got = proof_section(proof), recipe.memory.proof.model_dump()
    return [
        f"proof.{key} is {got[key]}, recomputed {want[key]}; run dsv4 recipes check --write-proofs"
        for key in want
        if not _close(want[key], got[key])
    ]


def _close(a: Any, b: Any) -> bool:
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(_close(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, str) or a is None or b is None:
        return bool(a == b)
    return bool(abs(a - b) <= max(TOLERANCE * max(abs(a), abs(b)), 0.011))


# --------------------------------------------------------------------------------------------
# Engines


def _engine_rungs(
    name: Engine, version: str, engine: InstalledEngine | None, cases: Mapping[Path, Recipe]
) -> dict[Path, Rung]:
    label = f"{name}-{version}"
    if engine is None or not cases:
        return {p: Rung(label, "skipped", (f"{name} {version} is not installed here",)) for p in cases}
    questions = [case_of(recipe, id=str(path)) for path, recipe in cases.items()]
    try:
        answers = ask_engine(engine, questions)
    except RecipeError as e:
        return {p: Rung(label, "fail", (str(e),)) for p in cases}
    return {p: _rung(label, compare(cases[p], answers[str(p)])) for p in cases}


def ask_engine(engine: InstalledEngine, cases: Sequence[Case]) -> dict[str, Answer]:
    """Answers by case id from one process with `engine` importable. Raises RecipeError when it
    cannot be asked.
    """
    package = str(Path(__file__).resolve().parents[3])
    search = [str(engine.path)] if engine.path else []
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*search, package, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "CUDA_VISIBLE_DEVICES": "",
    }
    try:
        run = subprocess.run(
            [sys.executable, "-m", "dsv4.probe"],
            input=to_json(EngineQuestion(engine=engine.name, cases=tuple(cases))),
            env=env, capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as e:
        raise RecipeError(
            f"{engine.name} {engine.version} did not answer within {PROBE_TIMEOUT_S} s; try again on a quieter machine"
        ) from e
    if run.returncode:
        last = run.stderr.strip().splitlines()[-1:] or ["no output"]
        raise RecipeError(f"{engine.name} {engine.version} cannot be imported to check with: {last[0][:300]}")
    try:
        answer = read_answer(run.stdout.strip().splitlines()[-1])
    except (ValidationError, IndexError) as e:
        raise RecipeError(
            f"{engine.name} {engine.version} answered what cannot be read: {' '.join(str(e).split())[:300]}"
        ) from e
    if answer.version != engine.version:
        raise RecipeError(f"{engine.name} {engine.version} was asked, {answer.version} answered; check PYTHONPATH")
    return answer.cases


def case_of(recipe: Recipe, id: str) -> Case:  # noqa: A002 - the field's name
    """What to ask the engine about `recipe`: every role's argv, its variables and its KV
    geometry.
    """
    d = recipe.deployment()
    argvs = (
        tuple(command.argv(node_rank=rank, head_addr="10.0.0.1")[2:]) for rank, command in enumerate(commands(recipe))
    )
    return Case(
        id=id,
        argvs=tuple(argvs),
        env=tuple(sorted(recipe.env)),
        kv=kv_question(d, prove(d, recipe.lengths.concurrency)),
    )


def kv_question(d: Deployment, proof: Proof) -> KvQuestion:
    """The geometry and scheduling that decide an engine's KV pool."""
    c = d.config
    stages = (stage_with_draft(s, c, d.num_draft_layers) for s in pipeline_layers(c.num_hidden_layers, d.pp))
    return KvQuestion(
        checkpoint=d.checkpoint.id,
        state=d.state,
        compress_ratios=tuple(layer.compress_ratio for layer in c.layers),
        num_draft_layers=d.num_draft_layers,
        speculative=d.speculation.method,
        draft_tokens=d.speculation.num_tokens + 1 if d.has_draft else 0,
        stages=tuple((s.start, s.stop) for s in stages),
        kv_dtype=d.kv,
        index_dtype=d.index,
        head_dim=c.head_dim,
        rope_dim=c.qk_rope_head_dim,
        index_head_dim=c.index_head_dim,
        sliding_window=c.sliding_window,
        max_model_len=d.max_model_len,
        max_num_batched_tokens=d.max_num_batched_tokens,
        max_num_seqs=d.max_num_seqs,
        async_scheduling=d.async_scheduling,
        dp=d.dp,
        swa_full_tokens_ratio=d.swa_full_tokens_ratio,
        # Room for at least one request, so that the engine computes instead of refusing a tight
        # plan.
        pool_bytes=(max(proof.pool_low, 2 * proof.need_bytes),) * d.pp,
    )


def compare(recipe: Recipe, answer: Answer) -> list[str]:
    """Problems in the engine's answer: its own complaints, and KV that differs from the formula by
    more than 1 %.
    """
    problems = list(answer.errors)
    if answer.kv_error:
        return [*problems, f"the engine's KV planner failed: {answer.kv_error}"]
    d = recipe.deployment()
    pool_bytes = kv_question(d, prove(d, recipe.lengths.concurrency)).pool_bytes
    if isinstance(answer.kv, BlockPools):
        return [*problems, *_block_pools_differ(d, answer.kv, pool_bytes)]
    assert isinstance(answer.kv, TokenPools)
    return [*problems, *_token_pools_differ(d, answer.kv, pool_bytes)]


def _block_pools_differ(d: Deployment, kv: BlockPools, pool_bytes: Sequence[int]) -> list[str]:
    flight = vllm.in_flight(d).tokens
    rows: list[tuple[str, float, float]] = [("in-flight tokens", flight, kv.in_flight_tokens)]
    blocks = []
    for stage, theirs in enumerate(kv.stages):
        pool = vllm.stage_pool(d, stage)
        rows.append((f"stage {stage} bytes per block", pool.block_bytes, theirs.block_bytes))
        rows.append(
            (f"stage {stage} bytes per request", pool.request_bytes(d.max_model_len, flight), theirs.request_bytes)
        )
        blocks.append(pool.num_blocks(pool_bytes[stage]))
    per_request = vllm.stage_pool(d, 0).request_blocks(d.max_model_len, flight)
    rows += [
        ("blocks", min(blocks), kv.num_blocks),
        ("start-up concurrency", min(blocks) / per_request, kv.concurrency),
    ]
    return _differences("vLLM", rows)


def _token_pools_differ(d: Deployment, kv: TokenPools, pool_bytes: Sequence[int]) -> list[str]:
    rows: list[tuple[str, float, float]] = []
    for stage, theirs in enumerate(kv.stages):
        pool = sglang.stage_pool(d, stage)
        rows.append((f"stage {stage} bytes per full token", pool.bytes_per_full_token, theirs.bytes_per_full_token))
        rows.append((f"stage {stage} request-scoped bytes", pool.fixed_bytes, theirs.fixed_bytes))
        rows.append((f"stage {stage} pool tokens", pool.full_tokens(pool_bytes[stage]), theirs.full_tokens))
    return _differences("SGLang", rows)


def _differences(engine: str, rows: Iterable[tuple[str, float, float]]) -> list[str]:
    return [
        f"{name}: formula {ours:,.2f}, {engine} {theirs:,.2f}"
        for name, ours, theirs in rows
        if abs(ours - theirs) > TOLERANCE * max(abs(theirs), 1)
    ]
