# SPDX-License-Identifier: Apache-2.0
"""A plan in words: the ranking, the proof of the best configurations, and what stops the others."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

from dsv4.machine.hardware import GIB
from dsv4.model.kv_layout import StateMapping
from dsv4.planning.deployment import Deployment, usual_state
from dsv4.planning.launch import deployment_commands
from dsv4.planning.memory.proof import Proof, Verdict
from dsv4.planning.planner import Candidate, Question

WIDTH = 80
Speed = tuple[str, Sequence[tuple[str, ...]], Sequence[str]]  # heading, table, notes
_NOTE = 44  # the column after which notes begin
_HEADER = ("", "engine", "configuration", "at once", "start", "each", "longest", "step")
_LEGEND = (
    "At once: requests of this context that decode together over all replicas while one more is prefilled, with the"
    " high and the low end of the overheads. Start, each: GiB of KV on the fullest rank for one request alone, with"
    " the whole reserve for the tokens in flight, and for each further one. Longest: the context that as many"
    " requests fit. Step: the largest max_num_batched_tokens that still fits."
)


def describe(
    q: Question,
    found: Sequence[Candidate],
    num_proofs: int,
    verbose: bool = False,
    speed: Speed | None = None,
    other: Sequence[str] = (),
) -> str:
    """Plain text of at most WIDTH columns. verbose: with the source of every term. speed: how fast
    what works may be; other: lines on layouts that are planned and not launched.
    """
    works = [c for c in found if c.works]
    fails = [c for c in found if not c.works]
    nodes = f" in {q.nodes} nodes" if q.nodes > 1 else ""
    parts = wrap(f"{q.checkpoint.id} ({q.checkpoint.repo}) on {q.count} x {q.gpu.id}{nodes}")
    parts += [f"{q.context:,} tokens a request, {q.concurrency} at once, steps of {q.max_num_batched_tokens:,}", ""]
    if works:
        parts += [*columns([_HEADER, *(_row(c) for c in works)]), "", *wrap(_LEGEND), ""]
        recipes = dict.fromkeys(f"{name_of(c)}: {c.recipe}" for c in works if c.recipe)
        parts += [*wrap(f"Recipes of these shapes: {'; '.join(recipes)}."), ""] if recipes else []
        for c in works[:num_proofs]:
            parts += [*_proof(c, verbose), ""]
        if speed is not None:
            parts += [*_speed(*speed), ""]
        parts += other
        parts += [line for c in works if c.proof.verdict is Verdict.TIGHT for line in wrap(_tight(c))]
    else:
        parts += [*_nothing_fits(fails), ""]
    if fails:
        by_reason: dict[str, list[str]] = {}
        for c in fails:
            by_reason.setdefault(_why(c), []).append(name_of(c))
        parts += ["What does not work:"]
        parts += [line for reason, names in by_reason.items() for line in wrap(f"{', '.join(names)}: {reason}", "  ")]
        parts += [""]
    if q.gpu.needs_plugin:
        parts += wrap(
            f"{q.gpu.id} has no native V4 in either engine: dsv4's plugin serves there, beside the engine on every node."
        )
    if q.checkpoint.unserved:
        parts += wrap(f"Planned for the engines' native V4 only; dsv4 does not serve it: {q.checkpoint.unserved}")
    return "\n".join(parts).rstrip()


def _speed(heading: str, rows: Sequence[tuple[str, ...]], notes: Sequence[str]) -> list[str]:
    return [*wrap(heading), *columns(rows), *(line for note in notes for line in wrap(note, ""))]


def wrap(text: str, indent: str = "") -> list[str]:
    """`text` in lines of WIDTH columns; those below the first are two columns right of `indent`."""
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=indent,
        subsequent_indent=indent + "  " if indent else "",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _nothing_fits(fails: Sequence[Candidate]) -> list[str]:
    """Leads with what does fit: the changes that are enough, of the nearest configurations."""
    ways = dict.fromkeys(f"{name_of(c)}: {k.text}" for c in fails for k in c.knobs if k.fits)
    if not ways:
        return ["Nothing fits, and no change that dsv4 knows is enough."]
    return ["Nothing fits as asked. What does:", *(line for way in list(ways)[:4] for line in wrap(way, "  "))]


def _row(c: Candidate) -> tuple[str, ...]:
    p = c.proof
    return (
        p.verdict.value,
        c.deployment.engine,
        _shape(c.deployment),
        _span(p.at_once_low, p.at_once_high),
        f"{p.start_bytes / GIB:.2f}",
        f"{p.decoding_bytes / GIB:.2f}",
        f"{p.max_context_low:,}",
        f"{c.step_limit:,}" if c.step_limit else "-",
    )


def columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Cells below each other, one line a row."""
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    gap = "  " if sum(widths) + 2 * (len(widths) - 1) <= WIDTH else " "
    return [gap.join(cell.ljust(w) for cell, w in zip(r, widths, strict=True)).rstrip() for r in rows]


def _shape(d: Deployment) -> str:
    return d.shape if d.speculation.method == "none" else f"{d.shape} {d.speculation.method}"


def name_of(c: Candidate) -> str:
    """As the tables name a configuration."""
    return f"{c.deployment.engine} {_shape(c.deployment)}"


def _span(low: int, high: int) -> str:
    return f"{low:,}" if low == high else f"{low:,}-{high:,}"


def _proof(c: Candidate, verbose: bool) -> Iterable[str]:
    p, d = c.proof, c.deployment
    flag = "gpu_memory_utilization" if d.engine == "vllm" else "mem_fraction_static"
    yield f"Proof of {name_of(c)}, in GiB on the fullest rank:"
    card = f"CUDA total of {d.gpu.name} ({d.gpu.confidence}); {flag} {d.memory_fraction}"
    yield from _term("card", f"{d.gpu.total_bytes / GIB:.2f}", card)
    yield from _term("budget", f"{p.budget_bytes / GIB:.2f}", "what the engine may use")
    for t in p.terms:
        yield from _term(t.name, _range(t.low, t.high), "")
        yield from wrap(t.source, "    ") if verbose else ()
    yield from _term("KV pool", _range(p.pool_low, p.pool_high), "what is left")
    yield from _term("to start", f"{p.start_bytes / GIB:.2f}", _start(p))
    yield from _term(
        "each more", f"{p.decoding_bytes / GIB:.2f}", f"a request of {d.max_model_len:,} tokens that decodes"
    )
    held = f"requests by KV, at most {d.max_num_seqs * d.num_pools:,} by max_num_seqs"
    yield from _term("at once", _span(p.held_low, p.held_high), held)
    if p.printed_low is not None and p.printed_high is not None:
        log = 'vLLM\'s own "Maximum concurrency" line, which charges the reserve to every request'
        yield from _term("(log)", f"{p.printed_low:.2f}-{p.printed_high:.2f}x", log + _per_replica(d))
    if c.step_limit:
        yield from wrap(
            f"stops fitting above max_num_batched_tokens {c.step_limit:,}; longest context {p.max_context_low:,}", "  "
        )
    if d.replicas > 1:
        yield from wrap(
            f"{d.replicas} engines behind a router, each on {d.count // d.replicas} GPUs of its own"
            " (CUDA_VISIBLE_DEVICES) and at a port of its own:", "  "
        )  # fmt: skip
    for command in deployment_commands(d):
        role = f" {command.role}" if d.one_engine.nodes > 1 else ""
        yield from _command(f"start{role}: {_settings(d)}", command.shell())


def _per_replica(d: Deployment) -> str:
    return " and is of one replica" if d.num_pools > 1 else ""


def _term(name: str, figures: str, note: str) -> list[str]:
    """One line of the proof; the note goes on below itself."""
    head = f"  {name:<22} {figures:>16}  "
    if name and len(head) > _NOTE:  # a long name stands alone
        return [f"  {name}", *_term("", figures, note)]
    if len(head) > _NOTE:
        return [head.rstrip(), *wrap(note, "    ")]
    lines = textwrap.wrap(note, WIDTH - len(head), break_long_words=False, break_on_hyphens=False) or [""]
    return [f"{head}{lines[0]}".rstrip(), *(" " * len(head) + line for line in lines[1:])]


def _command(lead: str, shell: str) -> list[str]:
    """A command to copy: broken before options, each line but the last ended by a backslash."""
    words = shell.replace(" --", "\n--").split("\n")
    lines = [f"  {lead}{words[0]}"]
    for word in words[1:]:
        if len(lines[-1]) + len(word) + 3 <= WIDTH:
            lines[-1] += f" {word}"
        else:
            lines.append(f"    {word}")
    return [line + " \\" for line in lines[:-1]] + [lines[-1]]


def dsv4_settings(d: Deployment) -> dict[str, str]:
    """The variables without which something else would be started than what was proved."""
    plugin = d.gpu.needs_plugin or d.state is StateMapping.SUMMARY
    mode = {"DSV4_MODE": "on"} if plugin and not d.gpu.needs_plugin else {}
    state = {} if d.state is usual_state(d.engine, plugin) else {"DSV4_STATE": d.state.value}
    return mode | state


def _settings(d: Deployment) -> str:
    return "".join(f"{k}={v} " for k, v in dsv4_settings(d).items())


def _start(p: Proof) -> str:
    d = p.deployment
    reserve = f"{p.reserve_bytes / GIB:.2f}"
    if d.engine == "sglang":
        return f"one request of {d.max_model_len:,} tokens and {reserve} for rings and windows of all"
    if d.pp > 1:
        flight = f"{d.pp + d.async_scheduling} steps in flight"
    else:
        flight = "two steps in flight, async scheduling" if d.async_scheduling else "one step in flight"
    return f"one request of {d.max_model_len:,} tokens, of it {reserve} window and state ({flight})"


def _range(low: int, high: int) -> str:
    a, b = sorted((low / GIB, high / GIB))
    return f"{a:.2f}" if abs(b - a) < 0.005 else f"{a:.2f} to {b:.2f}"


def _tight(c: Candidate) -> str:
    short = c.proof.shortfall_bytes / GIB
    return f"{name_of(c)} fits only if overheads stay low: {short:.2f} GiB short otherwise{_knob(c)}"


def _why(c: Candidate) -> str:
    if c.violations:
        return c.violations[0]
    p = c.proof
    if p.headroom_shortfall_bytes and p.headroom_shortfall_bytes >= p.need_bytes - p.pool_low:
        return f"activations and graphs need {p.headroom_shortfall_bytes / GIB:.2f} GiB more than mem_fraction_static leaves{_knob(c)}"
    starts = f", though one starts and {p.at_once_low} are held" if p.starts is Verdict.FITS else ""
    return f"{p.shortfall_bytes / GIB:.2f} GiB short{starts}{_knob(c)}"


def _knob(c: Candidate) -> str:
    if not c.knobs:
        return "; no knob helps"
    k = c.knobs[0]
    return f"; {k.text}: frees {k.frees_bytes / GIB:.1f} GiB{' and fits' if k.fits else ', not enough alone'}"
