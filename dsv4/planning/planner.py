# SPDX-License-Identifier: Apache-2.0
"""What works on given GPUs, ranked, with the proof; what fails, by how much, and which knob buys
most.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from dsv4.errors import PlanError
from dsv4.machine.compat import ENGINES, Engine
from dsv4.machine.hardware import Gpu
from dsv4.model.config import FP8_BLOCK
from dsv4.model.kv_layout import IndexFormat, StateMapping
from dsv4.planning.deployment import (
    MAX_CONTEXT,
    PLUGIN_DRAFTS,
    Checkpoint,
    Deployment,
    Parallelism,
    Speculation,
    capture_size,
    usual_state,
)
from dsv4.planning.memory.proof import Proof, Verdict, prove, roomier_state
from dsv4.planning.memory.weights import stage_weights
from dsv4.planning.recipe.schema import MAX_GPUS, Recipe, shipped_recipes
from dsv4.planning.rules import violations

DEFAULT_STEP_TOKENS = 4096
STEP_GRAIN = 256
MAX_STEP_TOKENS = 65_536
MAX_REQUESTS = 65_536
Preference = Literal["latency", "throughput"]
SEQS_LEVELS = (16, 64, 256, 1024)  # where the graphs' published sizes step; below the first, room for shorter requests
_DRAFT_TOKENS = {"mtp": 1, "dspark": 5}


@dataclass(frozen=True)
class Knob:
    """One change and the bytes it brings nearer to fitting. fits: whether the change alone is
    enough.
    """

    text: str
    frees_bytes: int
    fits: bool


@dataclass(frozen=True)
class Candidate:
    """One configuration: its proof, or why no proof is needed. step_limit: the largest
    max_num_batched_tokens that still fits, 0 when none does."""

    deployment: Deployment
    proof: Proof
    violations: tuple[str, ...]
    knobs: tuple[Knob, ...]
    step_limit: int
    recipe: str | None

    @property
    def works(self) -> bool:
        return not self.violations and self.proof.verdict is not Verdict.NO


@dataclass(frozen=True, kw_only=True)
class Question:
    """What the user asked; PlanError for what cannot be, with the field at fault.

    context: tokens.
    concurrency: requests of that length at once.
    engine: None for both.
    prefer: what ranks first among what fits, wide tensor parallelism (latency) or requests at once
    (throughput).
    state: how vLLM keeps compressor state, None as whoever serves there does.
    """

    checkpoint: Checkpoint
    gpu: Gpu
    count: int
    nodes: int
    context: int = MAX_CONTEXT
    concurrency: int = 1
    engine: Engine | None = None
    max_num_batched_tokens: int = DEFAULT_STEP_TOKENS
    prefer: Preference = "throughput"
    state: StateMapping | None = None

    def __post_init__(self) -> None:
        count, nodes, gpu = self.count, self.nodes, self.gpu
        if not 1 <= count <= MAX_GPUS:
            raise PlanError(f"{count}: impossible; give 1 to {MAX_GPUS} GPUs", "count")
        if nodes < 1 or count % nodes:
            raise PlanError(
                f"{count}: does not divide over {nodes} nodes; give a multiple, or another number of nodes", "count"
            )
        if count // nodes > gpu.gpus_per_node:
            need = gpu.nodes_for(count)
            raise PlanError(
                f"{nodes}: a {gpu.id} node has at most {gpu.gpus_per_node} GPUs; {count} need {need} nodes", "nodes"
            )
        if not 1 <= self.context <= MAX_CONTEXT:
            raise PlanError(f"{self.context}: DeepSeek-V4 has contexts of 1 to {MAX_CONTEXT:,} tokens", "context")
        if not 1 <= self.concurrency <= MAX_REQUESTS:
            raise PlanError(f"{self.concurrency}: give 1 to {MAX_REQUESTS} requests", "concurrency")
        if not STEP_GRAIN <= self.max_num_batched_tokens <= MAX_STEP_TOKENS:
            raise PlanError(
                f"{self.max_num_batched_tokens}: give {STEP_GRAIN} to {MAX_STEP_TOKENS}", "max_num_batched_tokens"
            )
        if self.state is StateMapping.RING:
            raise PlanError("ring: is how SGLang keeps state, always; ask for paged, summary or nothing", "state")
        if self.state is StateMapping.SUMMARY and self.engine == "sglang":
            raise PlanError("summary: is a mapping of dsv4's vLLM plugin; leave it out for SGLang", "state")

    @property
    def engines(self) -> tuple[Engine, ...]:
        """Engines to plan for."""
        if self.engine is not None:
            return (self.engine,)
        return ("vllm",) if self.state is StateMapping.SUMMARY else ENGINES


def plan(question: Question) -> list[Candidate]:
    """Every configuration worth naming, best first: what fits, then what may, then what does not by
    what is missing.
    """
    recipes = [r for r in shipped_recipes(question.gpu.id) if r.can_work]
    found = [candidate(d, question.concurrency, recipes) for d in deployments(question)]
    return sorted(found, key=lambda c: _rank(c, question.prefer))


def candidate(d: Deployment, concurrency: int, recipes: Sequence[Recipe] = ()) -> Candidate:
    """Prove one deployment and, where it fails, look for knobs."""
    proof = prove(d, concurrency)
    broken = tuple(violations(d))
    fails = not broken and proof.verdict is not Verdict.FITS
    return Candidate(
        deployment=d,
        proof=proof,
        violations=broken,
        knobs=tuple(knobs(proof, concurrency)) if fails else (),
        step_limit=0 if broken else step_limit(d, concurrency),
        recipe=_nearest(recipes, d),
    )


def step_limit(d: Deployment, concurrency: int) -> int:
    """The largest max_num_batched_tokens, in steps of 256, with which `d` fits; 0 when none
    does.
    """
    low, high = 0, MAX_STEP_TOKENS // STEP_GRAIN
    while low < high:
        middle = (low + high + 1) // 2
        fits = prove(replace(d, max_num_batched_tokens=middle * STEP_GRAIN), concurrency).verdict is Verdict.FITS
        low, high = (middle, high) if fits else (low, middle - 1)
    return low * STEP_GRAIN


def knobs(proof: Proof, concurrency: int) -> list[Knob]:
    """Changes that bring `proof`'s deployment nearer to fitting, the one that buys most first."""
    useful = [knob for knob, _ in _useful(proof, proof, concurrency)]
    if any(k.fits for k in useful):
        return useful
    return [*_together(proof, concurrency), *_more_gpus(proof, concurrency), *useful]


def _useful(origin: Proof, proof: Proof, concurrency: int) -> list[tuple[Knob, Proof]]:
    """Single changes to `proof`, counted from `origin`, the one that buys most first."""
    gained = _knob("", origin, proof).frees_bytes
    found = []
    for text, changed in _changes(proof.deployment, proof, concurrency):
        if not violations(changed):
            after = prove(changed, concurrency)
            knob = _knob(text, origin, after)
            found += [(knob, after)] if knob.frees_bytes > gained else []
    return sorted(found, key=lambda pair: (-pair[0].fits, -pair[0].frees_bytes))


def _together(proof: Proof, concurrency: int) -> list[Knob]:
    """Changes that fit when taken one after the other, each time the one that buys most; at most
    four.
    """
    texts: list[str] = []
    now = proof
    for _ in range(4):
        useful = _useful(proof, now, concurrency)
        if not useful:
            return []
        knob, now = useful[0]
        texts = [t for t in texts if t.split(" to ")[0] != knob.text.split(" to ")[0]] + [
            knob.text
        ]  # a value given later replaces
        if knob.fits:
            return [Knob(" and ".join(texts), knob.frees_bytes, True)]
    return []


def _more_gpus(proof: Proof, concurrency: int) -> list[Knob]:
    """The smallest multiple of the GPUs that fits, as pipeline stages over more nodes or TP inside
    one.
    """
    d = proof.deployment
    if d.replicas > 1:
        return []  # each would have to be larger: that is another shape
    for factor in (2, 3, 4):
        inside = d.count * factor <= d.gpu.gpus_per_node
        nodes = d.nodes if inside else -(-d.count * factor // d.gpu.gpus_per_node)
        bigger = replace(d, count=d.count * factor, nodes=nodes)
        if inside and d.dp == 1:
            bigger = replace(bigger, tp=d.tp * factor)
        elif d.dp > 1:
            bigger = replace(bigger, dp=d.dp * factor)
        else:
            bigger = replace(bigger, pp=d.pp * factor, speculation=Speculation())
        if not violations(bigger) and (after := prove(bigger, concurrency)).verdict is Verdict.FITS:
            return [_knob(f"use {bigger.count} GPUs ({bigger.shape})", proof, after)]
    return []


def _knob(text: str, before: Proof, after: Proof) -> Knob:
    pool = (before.need_bytes - before.pool_low) - (after.need_bytes - after.pool_low)
    headroom = before.headroom_shortfall_bytes - after.headroom_shortfall_bytes
    return Knob(text, pool + headroom, after.verdict is Verdict.FITS)


def _changes(d: Deployment, proof: Proof, concurrency: int) -> Iterator[tuple[str, Deployment]]:
    limit = step_limit(d, concurrency)
    lower = min(limit or 512, d.max_num_batched_tokens)
    if lower < d.max_num_batched_tokens:
        seqs = min(d.max_num_seqs, lower // (1 + d.speculation.num_tokens))
        yield f"lower max_num_batched_tokens to {lower}", replace(d, max_num_batched_tokens=lower, max_num_seqs=seqs)
    if d.engine == "vllm" and d.memory_fraction < 0.97:
        yield "raise gpu_memory_utilization to 0.97", replace(d, memory_fraction=0.97)
    if d.engine == "sglang" and d.memory_fraction < 0.92:
        yield "raise mem_fraction_static to 0.92", replace(d, memory_fraction=0.92)
    if d.async_scheduling and d.engine == "vllm":
        yield "turn async scheduling off", replace(d, async_scheduling=False)
    if d.has_draft:
        yield "turn speculation off", replace(d, speculation=Speculation())
    if d.index is IndexFormat.FP8 and d.gpu.capability[0] == 10:
        yield "store index keys as mxfp4", replace(d, index=IndexFormat.MXFP4)
    if d.dp > 1:
        yield f"use TP{d.tp * d.dp} instead of {d.shape}", replace(d, tp=d.tp * d.dp, dp=1)
    cap = proof.max_context_low // 1024 * 1024
    if d.max_model_len // 4 <= cap < d.max_model_len and cap:  # less would be another service
        yield f"cap the context at {cap:,} tokens", replace(d, max_model_len=cap)


# --------------------------------------------------------------------------------------------
# Configurations worth naming


def deployments(q: Question) -> Iterator[Deployment]:
    """Engines x shapes x draft on or off, with the defaults that dsv4's recipes use."""
    for engine in q.engines:
        for parallel in shapes(q):
            for speculation in _speculations(q, engine, parallel.pp):
                yield deployment(q, engine, parallel, speculation)


def deployment(q: Question, engine: Engine, parallel: Parallelism, speculation: Speculation) -> Deployment:
    """One configuration with defaults: fractions and kernels as published recipes for the card have
    them, state as DSV4_STATE=auto would keep it, and as many requests as the pool holds.
    """
    gpu = q.gpu
    per_replica = -(-q.concurrency // (parallel.dp * parallel.replicas))
    most = max(q.max_num_batched_tokens // (1 + speculation.num_tokens), 1)
    base = Deployment(
        checkpoint=q.checkpoint,
        engine=engine,
        gpu=gpu,
        count=q.count,
        nodes=q.nodes,
        tp=parallel.tp,
        dp=parallel.dp,
        ep=parallel.ep,
        pp=parallel.pp,
        replicas=parallel.replicas,
        max_model_len=q.context,
        max_num_batched_tokens=q.max_num_batched_tokens,
        max_num_seqs=min(max(SEQS_LEVELS[0], per_replica), most),
        memory_fraction=0.95 if engine == "vllm" else 0.9 if gpu.visible_mib > 60_000 else 0.88,
        index=IndexFormat.MXFP4 if gpu.capability[0] == 10 else IndexFormat.FP8,
        swa_full_tokens_ratio=0.1 if engine == "sglang" else None,
        speculation=speculation,
        decode_graphs_only=engine == "vllm"
        and gpu.platform == "cuda"
        and gpu.capability[0] <= 9
        and not gpu.needs_plugin,
        state=q.state if q.state and engine == "vllm" else usual_state(engine, gpu.needs_plugin),
    )
    if q.state is None and engine == "vllm" and gpu.needs_plugin:
        base = replace(base, state=roomier_state(base))
    return _captured(_with_seqs(_captured(base), q.concurrency, most))


def _captured(d: Deployment) -> Deployment:
    """`d` with the graphs that its requests ask for, where dsv4's plugin serves in vLLM."""
    if d.engine != "vllm" or not d.gpu.needs_plugin:
        return d
    return replace(d, max_capture_size=capture_size(d.max_num_seqs, d.speculation.num_tokens))


def _with_seqs(d: Deployment, concurrency: int, most: int) -> Deployment:
    """`d` with the max_num_seqs that the pool fills: requests beyond the first 16 cost memory for
    graphs and SGLang's rings, so more are asked for only where more are then held.
    """
    best, best_proof = d, prove(d, concurrency)
    for level in SEQS_LEVELS[1:]:
        wider = _captured(replace(d, max_num_seqs=min(max(level, d.max_num_seqs), most)))
        proof = prove(wider, concurrency)
        if proof.verdict is best_proof.verdict and proof.at_once_low > best_proof.at_once_low:
            best, best_proof = wider, proof
    held = -(-best_proof.held_high // d.num_pools)
    return replace(best, max_num_seqs=max(min(best.max_num_seqs, held), d.max_num_seqs))


def shapes(q: Question) -> list[Parallelism]:
    """Ways to use every GPU: TP inside a node; DP or PP across nodes, and PP over links too slow
    for wide TP; EP wherever attention is replicated; several engines where one fits fewer GPUs.
    """
    config = q.checkpoint.config
    slow_links = q.gpu.needs_plugin or q.gpu.fabric.startswith("PCIe")
    per_node = q.count // q.nodes
    fabric = q.count if q.gpu.arch == "aarch64" else per_node  # a GB200/GB300 rack is one NVLink domain
    found: list[Parallelism] = []
    for tp in (t for t in (1, 2, 4, 8, 16) if fabric % t == 0 and q.count % t == 0):
        rest = q.count // tp
        if rest == 1:
            found.append(Parallelism(tp=tp, ep=_whole_experts(q, tp)))
            continue
        found.append(Parallelism(tp=tp, dp=rest, ep=True))
        if q.nodes > 1 and rest == q.nodes <= config.num_hidden_layers:
            found.append(Parallelism(tp=tp, pp=rest, ep=True))
        elif slow_links and rest <= config.num_hidden_layers:
            found.append(Parallelism(tp=tp, pp=rest, ep=_whole_experts(q, tp)))
        alone = stage_weights(config, tp=tp, dp=1, ep=False, pp=1, with_draft=False, weights=q.checkpoint.weights)[
            0
        ].total_bytes
        if per_node % tp == 0 and alone < q.gpu.total_bytes:
            found.append(Parallelism(tp=tp, ep=_whole_experts(q, tp), replicas=rest))
    return found


def _whole_experts(q: Question, tp: int) -> bool:
    """Slices of experts keep every rank busy; whole experts only where a slice would break an FP8
    block.
    """
    return bool(q.checkpoint.config.moe_intermediate_size // tp % FP8_BLOCK)


def _speculations(q: Question, engine: Engine, pp: int) -> list[Speculation]:
    draft = q.checkpoint.config.draft
    plugin = q.gpu.needs_plugin or q.state is StateMapping.SUMMARY
    # SGLang's steps with the plugin's drafts are not captured in graphs, which may cost more than
    # drafts give: served where asked for, not proposed.
    if draft == "none" or pp > 1 or (plugin and (engine == "sglang" or draft not in PLUGIN_DRAFTS[engine])):
        return [Speculation()]
    return [Speculation(), Speculation(method=draft, num_tokens=_DRAFT_TOKENS[draft])]


def _nearest(recipes: Sequence[Recipe], d: Deployment) -> str | None:
    """The recipe of this shape whose context is nearest."""
    same = [r for r in recipes if _same_shape(r, d)]
    return min(same, key=lambda r: abs(r.lengths.max_model_len - d.max_model_len)).id if same else None


def _same_shape(r: Recipe, d: Deployment) -> bool:
    return (
        r.engine.name == d.engine
        and r.checkpoint.id == d.checkpoint.id
        and r.hardware.count == d.count
        and (r.parallel.tp, r.parallel.dp, r.parallel.pp, 1) == (d.tp, d.dp, d.pp, d.replicas)
        and (r.speculative.method != "none") == d.has_draft
    )


def _rank(c: Candidate, prefer: Preference) -> tuple[float, ...]:
    order = 3.0 if c.violations else {Verdict.FITS: 0, Verdict.TIGHT: 1, Verdict.NO: 2}[c.proof.verdict]
    # A wider attention TP and a draft shorten every step of a request; replicas and no draft hold
    # more requests.
    latency = (-c.deployment.tp, -c.deployment.has_draft) if prefer == "latency" else (0, 0)
    return (order, *latency, c.proof.shortfall_bytes, -c.proof.at_once_low, -c.proof.max_context_low)
