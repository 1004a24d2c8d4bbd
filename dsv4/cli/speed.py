# SPDX-License-Identifier: Apache-2.0
"""What `dsv4 plan` says of speed: its options, its table, its JSON and its plot."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click

from dsv4.cli.output import named
from dsv4.errors import PlanError
from dsv4.machine.hardware import find_gpu
from dsv4.planning.deployment import parse_context
from dsv4.planning.planner import Candidate, Question, plan
from dsv4.planning.speed.estimate import Range, can_estimate, estimate
from dsv4.planning.speed.objective import Keeps, Objective, load_kept, parse_objective, parse_prices
from dsv4.planning.speed.text import Row, heading, notes, table
from dsv4.planning.speed.work import Traffic

INPUT, OUTPUT = 8192, 1024  # what published figures are of
SHOWN, COMPARED = 8, 3  # configurations in the table, of the asked machine and of the compared one
_RANK = {Keeps.YES: 0, Keeps.MAYBE: 1, Keeps.NO: 2, None: 0}


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The options, parsed."""

    traffic: Traffic
    objective: Objective | None = None
    prices: Mapping[str, float] = field(default_factory=dict)
    compare: tuple[int, str] | None = None


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Rows of the asked machine in order of rank, then the best of the compared one."""

    asked: Asked
    rows: tuple[Row, ...]

    @property
    def misses(self) -> bool:
        """Whether an objective was asked that nothing keeps."""
        return self.asked.objective is not None and all(r.kept is Keeps.NO for r in self.rows)


def speed_options(f: Callable[..., None]) -> Callable[..., None]:
    """Options of `dsv4 plan` that ask how fast."""
    for option in (
        click.option("--compare", help="Another machine for the same question, as 8xb200."),
        click.option("--price", help="Dollars per GPU and hour: 2.5, or h200=2.5,b200=4."),
        click.option("--slo", help="Objective to keep: ttft=2s,tpot=30ms, or tps=50 tokens/s a user."),
        click.option(
            "--cached", type=float, default=0.0, help="Part of the input that the prefix cache holds, 0 to 1."
        ),
        click.option("--output", "output_tokens", help=f"Tokens out per request for speed; {OUTPUT} when left out."),
        click.option("--input", "input_tokens", help=f"Tokens in per request for speed; {INPUT} when left out."),
    ):
        f = option(f)
    return f


def parse(question: Question, given: Mapping[str, Any]) -> Asked:
    """The options as asked of `question`. Raises PlanError or HardwareError that names the
    option.
    """
    output = _tokens("--output", given["output_tokens"]) or min(OUTPUT, max(question.context // 8, 1))
    source = _tokens("--input", given["input_tokens"]) or min(INPUT, max(question.context - output, 1))
    if source + output > question.context:
        raise PlanError(
            f"--input {source:,} and --output {output:,}: exceed the context of {question.context:,} tokens; raise --context"
        )
    with named("--cached"):
        traffic = Traffic(
            input_tokens=source, output_tokens=output, cached=given["cached"], concurrency=question.concurrency
        )
    with named("--slo"):
        objective = parse_objective(given["slo"]) if given["slo"] else None
    with named("--price"):
        prices = parse_prices(given["price"], question.gpu.id) if given["price"] else {}
    with named("--compare"):
        compare = _machine(given["compare"]) if given["compare"] else None
    return Asked(traffic=traffic, objective=objective, prices=prices, compare=compare)


def answer(question: Question, found: Sequence[Candidate], asked: Asked) -> Speed | None:
    """Estimates of what works; None where the card's peaks are not known."""
    if not can_estimate(question.gpu):
        return None
    rows = _rows(found, asked, "")
    if asked.compare is not None:
        count, name = asked.compare
        card = find_gpu(name)
        try:
            other = replace(question, gpu=card, count=count, nodes=card.nodes_for(count))
        except PlanError as e:
            raise PlanError(f"--compare {count}x{name}: {e.reason}") from e
        if can_estimate(card):
            rows += _rows(plan(other), asked, f"{count}x {card.id} ")[:COMPARED]
    return Speed(asked=asked, rows=tuple(rows)) if rows else None


def lines(speed: Speed, verbose: bool) -> tuple[str, list[tuple[str, ...]], list[str]]:
    """Heading, table and notes. verbose: every configuration, not only the first."""
    own = [r for r in speed.rows if not r.compared]
    shown = own if verbose else own[:SHOWN]
    rows = [*shown, *(r for r in speed.rows if r.compared)]
    said = notes(rows, speed.asked.objective)
    if len(own) > len(shown):
        said.append(f"{len(own) - len(shown)} more configurations with --verbose.")
    return heading(speed.asked.traffic), table(rows, speed.asked.prices), said


def as_json(speed: Speed | None) -> dict[str, Any] | None:
    """The estimates by configuration, in ms and tokens per second."""
    if speed is None:
        return None
    traffic = speed.asked.traffic
    return {
        "input_tokens": traffic.input_tokens,
        "output_tokens": traffic.output_tokens,
        "cached": traffic.cached,
        "concurrency": traffic.concurrency,
        "configurations": [_row_json(r, speed.asked.prices) for r in speed.rows],
    }


def _row_json(r: Row, prices: Mapping[str, float]) -> dict[str, Any]:
    e, d = r.estimate, r.deployment
    found: dict[str, Any] = {
        "gpu": d.gpu.id,
        "count": d.count,
        "engine": d.engine,
        "shape": d.shape,
        "speculative": d.speculation.method,
        "running": e.running,
        "ttft_ms": both_ends(e.ttft_s, 1000),
        "tpot_ms": both_ends(e.tpot_s, 1000),
        "user_tok_s": both_ends(e.user_tok_s),
        "gpu_tok_s": both_ends(e.gpu_tok_s),
        "output_tok_s": both_ends(e.output_tok_s),
        "extrapolated": e.extrapolated,
    }
    if d.gpu.id in prices:
        found["dollars_per_million_output_tokens"] = both_ends(e.dollars_per_million(d.count, prices[d.gpu.id]))
    if r.kept is not None:
        found["objective"] = {"kept": r.kept.value, "requests": list(r.load or (0, 0))}
    return found


def both_ends(r: Range, scale: float = 1.0) -> list[float]:
    """For JSON, to three digits."""
    return [float(f"{x * scale:.3g}") for x in (r.low, r.high)]


def _rows(found: Sequence[Candidate], asked: Asked, prefix: str) -> list[Row]:
    rows = [_row(c, asked, prefix) for c in found if c.works]
    if asked.objective is None and not asked.prices:
        return rows
    return sorted(rows, key=lambda r: (_RANK[r.kept], -r.estimate.gpu_tok_s.low))


def _row(c: Candidate, asked: Asked, prefix: str) -> Row:
    d = c.deployment
    draft = "" if d.speculation.method == "none" else f" {d.speculation.method}"
    e = estimate(d, asked.traffic)
    goal = asked.objective
    return Row(
        name=f"{prefix}{d.engine} {d.shape}{draft}",
        compared=bool(prefix),
        deployment=d,
        estimate=e,
        kept=goal.kept_by(e) if goal else None,
        load=load_kept(d, asked.traffic, goal) if goal else None,
    )


def _machine(text: str) -> tuple[int, str]:
    count, _, name = text.strip().lower().partition("x")
    if not count.strip().isdigit() or not name.strip():
        raise PlanError(f"{text}: is no machine; write the GPUs and the card, as 8xb200")
    return int(count), find_gpu(name.strip()).id


def _tokens(option: str, text: str | None) -> int:
    with named(option):
        return parse_context(text) if text else 0


def draw(question: Question, speed: Speed, path: Path) -> None:
    """The frontier of tokens per second of a user and of a GPU, into `path`."""
    from dsv4.planning.plot import draw_frontier

    with named("--plot"):
        draw_frontier(question, [(r.name, r.deployment) for r in speed.rows], speed.asked.traffic, path)
