# SPDX-License-Identifier: Apache-2.0
"""A plan in words: the ranking, the proof of the best configurations, and what stops the others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dsv4.machine.hardware import GIB
from dsv4.model.kv_layout import StateMapping
from dsv4.planning.deployment import Deployment, usual_state
from dsv4.planning.launch import deployment_commands
from dsv4.planning.memory.proof import Proof, Verdict
from dsv4.planning.planner import Candidate, Question

_HEADER = (
    "",
    "engine",
    "configuration",
    "draft",
    "weights",
    "KV pool",
    "KV/request",
    "reserve",
    "at once",
    "longest",
    "step limit",
    "recipe",
)


def describe(q: Question, found: Sequence[Candidate], num_proofs: int) -> str:
    """Plain text, at most 150 columns."""
    works = [c for c in found if c.works]
    fails = [c for c in found if not c.works]
    title = (
        f"{q.checkpoint.id} ({q.checkpoint.repo}) on {q.count} x {q.gpu.id}"
        f"{f' in {q.nodes} nodes' if q.nodes > 1 else ''}: {q.context:,} tokens, {q.concurrency} at once, steps of {q.max_num_batched_tokens:,}"
    )
    parts = [title, ""]
    if works:
        parts += [*_table([_HEADER, *(_row(c) for c in works)]), "", *_LEGEND, ""]
        for c in works[:num_proofs]:
            parts += [*_proof(c), ""]
        parts += [line for c in works if c.proof.verdict is Verdict.TIGHT for line in _tight(c)]
    else:
        parts += ["Nothing fits.", ""]
    if fails:
        by_reason: dict[str, list[str]] = {}
        for c in fails:
            by_reason.setdefault(_why(c), []).append(_name(c))
        parts += [
            "What does not work:",
            *(f"  {', '.join(names)}: {reason}" for reason, names in by_reason.items()),
            "",
        ]
    if q.gpu.needs_plugin:
        parts.append(
            f"{q.gpu.id} has no native V4 in either engine: this is served by dsv4's plugin (pip install dsv4 beside the engine)."
        )
    return "\n".join(parts).rstrip()


_LEGEND = [
    "GiB per GPU on the fullest rank. KV pool: with the high and with the low end of the overheads. reserve: the part of KV/request that",
    "does not grow with the context; vLLM counts it for every request, as its own start-up line does, SGLang once. at once: requests of",
    "this context over all replicas. step limit: max_num_batched_tokens that still fits.",
]


def _row(c: Candidate) -> tuple[str, ...]:
    p, d = c.proof, c.deployment
    return (
        p.verdict.value,
        d.engine,
        d.shape,
        d.speculation.method,
        f"{p.weights_bytes / GIB:.1f}",
        f"{p.pool_low / GIB:.1f}-{p.pool_high / GIB:.1f}",
        f"{p.request_bytes / GIB:.2f}",
        f"{p.reserve_bytes / GIB:.2f}",
        f"{p.concurrency_low:.1f}-{p.concurrency_high:.1f}",
        f"{p.max_context_low:,}",
        f"{c.step_limit:,}" if c.step_limit else "-",
        c.recipe or "-",
    )


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(r, widths, strict=True)).rstrip() for r in rows]


def _name(c: Candidate) -> str:
    d = c.deployment
    return f"{d.engine} {d.shape}{'' if d.speculation.method == 'none' else ' ' + d.speculation.method}"


def _proof(c: Candidate) -> Iterable[str]:
    p, d = c.proof, c.deployment
    flag = "gpu_memory_utilization" if d.engine == "vllm" else "mem_fraction_static"
    yield f"Proof of {_name(c)}:"
    total = d.gpu.total_bytes / GIB
    yield from _table(
        [
            ("  card", f"{total:9.2f}", f"CUDA total of {d.gpu.name} ({d.gpu.confidence}); {flag} {d.memory_fraction}"),
            ("  budget", f"{p.budget_bytes / GIB:9.2f}", "what the engine may use"),
            *((f"  {t.name}", _range(t.low, t.high), t.source) for t in p.terms),
            ("  KV pool", _range(p.pool_low, p.pool_high), "what is left"),
            ("  KV needed", f"{p.need_bytes / GIB:9.2f}", _need(p)),
        ]
    )
    if c.step_limit:
        yield f"  stops fitting above max_num_batched_tokens {c.step_limit:,}; longest context {p.max_context_low:,}"
    yield from (
        f"  start{' ' + command.role if d.nodes > 1 else ''}: {_settings(d)}{command.shell()}"
        for command in deployment_commands(d)
    )


def _settings(d: Deployment) -> str:
    """The variables without which something else would be started than what was proved."""
    plugin = d.gpu.needs_plugin or d.state is StateMapping.SUMMARY
    mode = "DSV4_MODE=on " if plugin and not d.gpu.needs_plugin else ""
    return mode + ("" if d.state is usual_state(d.engine, plugin) else f"DSV4_STATE={d.state.value} ")


def _need(p: Proof) -> str:
    d = p.deployment
    if d.engine == "vllm":
        flight = (
            "async scheduling keeps two steps in flight"
            if d.async_scheduling and d.pp == 1
            else f"{d.pp} stages in flight"
        )
        return f"{p.request_bytes / GIB:.2f} per request of {d.max_model_len:,} tokens, of it {p.reserve_bytes / GIB:.2f} window and state ({flight})"
    return f"{p.request_bytes / GIB:.2f} per request of {d.max_model_len:,} tokens, and {p.reserve_bytes / GIB:.2f} request-scoped"


def _range(low: int, high: int) -> str:
    a, b = sorted((low / GIB, high / GIB))
    return f"{a:9.2f}" if abs(b - a) < 0.005 else f"{a:9.2f} to {b:.2f}"


def _tight(c: Candidate) -> Iterable[str]:
    yield f"  {_name(c)} fits only if overheads stay low: {c.proof.shortfall_bytes / GIB:.2f} GiB short otherwise{_knob(c)}"


def _why(c: Candidate) -> str:
    if c.violations:
        return c.violations[0]
    p = c.proof
    if p.headroom_shortfall_bytes and p.headroom_shortfall_bytes >= p.need_bytes - p.pool_low:
        return f"activations and graphs need {p.headroom_shortfall_bytes / GIB:.2f} GiB more than mem_fraction_static leaves{_knob(c)}"
    return f"{p.shortfall_bytes / GIB:.2f} GiB short{_knob(c)}"


def _knob(c: Candidate) -> str:
    if not c.knobs:
        return "; no knob helps"
    k = c.knobs[0]
    return f"; {k.text}: frees {k.frees_bytes / GIB:.1f} GiB{' and fits' if k.fits else ', not enough alone'}"
