# SPDX-License-Identifier: Apache-2.0
"""Draws context against concurrency, one line per configuration that works, with the spread of the
overheads.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dsv4.errors import PlanError
from dsv4.planning.deployment import MAX_CONTEXT, Deployment
from dsv4.planning.memory.proof import Proof, prove
from dsv4.planning.planner import Candidate, Question
from dsv4.planning.speed.objective import frontier
from dsv4.planning.speed.work import Traffic

CONTEXTS = tuple(4096 * 2**i for i in range(9))  # 4K to 1M
MAX_LINES = 8


def refuse(path: Path) -> None:
    """Raises PlanError for what would stop `draw` whatever the plan: the name, or no matplotlib."""
    if path.suffix not in (".svg", ".png"):
        raise PlanError(f"{path}: give a name that ends in .svg or .png")
    if importlib.util.find_spec("matplotlib") is None:
        raise PlanError(f"{path}: needs matplotlib to be drawn, which is not installed; pip install 'dsv4[plan]'")


def draw(question: Question, found: Sequence[Candidate], path: Path) -> None:
    """Write `path` (.svg or .png). Raises PlanError as `refuse` does and when nothing works."""
    refuse(path)
    works = [c for c in found if c.works][:MAX_LINES]
    if not works:
        raise PlanError(f"{path}: nothing fits, so there is nothing to draw")
    figure, axes = _figure()
    for c in works:
        _line(axes, c)
    axes.set(xscale="log", yscale="log", xlabel="context (tokens)", ylabel="requests decoding at once, all replicas")
    axes.set_title(
        f"{question.checkpoint.id} on {question.count} x {question.gpu.id}, steps of {question.max_num_batched_tokens:,} tokens"
    )
    axes.set_xticks(CONTEXTS, [f"{n // 1024}K" if n < MAX_CONTEXT else "1M" for n in CONTEXTS])
    axes.minorticks_off()
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(fontsize="small")
    _save(figure, path)


def draw_frontier(question: Question, named: Sequence[tuple[str, Deployment]], traffic: Traffic, path: Path) -> None:
    """Write `path`: tokens per second of one user against those of one GPU as requests are added,
    with the spread of the estimate. Raises PlanError as `refuse` does.
    """
    refuse(path)
    figure, axes = _figure()
    for name, deployment in named[:MAX_LINES]:
        _frontier(axes, name, deployment, traffic)
    axes.set(xscale="log", yscale="log", xlabel="output tokens/s of one user")
    axes.set_ylabel("tokens/s of one GPU, input and output")
    axes.set_title(
        f"{question.checkpoint.id}, {traffic.input_tokens:,} tokens in, {traffic.output_tokens:,} out: estimates"
    )
    axes.grid(True, which="both", alpha=0.2)
    axes.legend(fontsize="small")
    _save(figure, path)


def _frontier(axes: Any, name: str, d: Deployment, traffic: Traffic) -> None:
    found = frontier(d, traffic)
    if not found:
        return
    middle = [(math.sqrt(user.low * user.high), math.sqrt(gpu.low * gpu.high)) for _, user, gpu in found]
    (line,) = axes.plot(*zip(*middle, strict=True), marker="o", markersize=3, label=name)
    edge = [(u.low, g.low) for _, u, g in found] + [(u.high, g.high) for _, u, g in reversed(found)]
    axes.fill(*zip(*edge, strict=True), alpha=0.12, color=line.get_color())
    axes.annotate(f"{found[-1][0]} at once", middle[-1], fontsize="x-small")


def _figure() -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "dsv4"  # the same plan gives the same file
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    figure.tight_layout()
    try:
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    except OSError as e:
        raise PlanError(f"{path}: cannot be written ({e.strerror})") from e
    finally:
        pyplot.close(figure)


def points(c: Candidate) -> list[Proof]:
    """The candidate proved at each of CONTEXTS."""
    return [prove(replace(c.deployment, max_model_len=n)) for n in CONTEXTS]


def _line(axes: Any, c: Candidate) -> None:
    d = c.deployment
    proofs = points(c)
    label = f"{d.engine} {d.shape}{'' if d.speculation.method == 'none' else ' ' + d.speculation.method}"
    # By memory, not by the max_num_seqs of the plan; zero has no place on a logarithmic axis.
    low = [p.held_low or math.nan for p in proofs]
    high = [p.held_high or math.nan for p in proofs]
    axes.plot(CONTEXTS, low, marker="o", markersize=3, label=label)
    axes.fill_between(CONTEXTS, low, high, alpha=0.15)
