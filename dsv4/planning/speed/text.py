# SPDX-License-Identifier: Apache-2.0
"""Estimates of speed in words: one table, its legend, and what it rests on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dsv4.machine.hardware import Gpu
from dsv4.planning.deployment import Deployment
from dsv4.planning.speed.estimate import ACCEPTED, Estimate, Range, errors, level
from dsv4.planning.speed.objective import Keeps, Objective
from dsv4.planning.speed.work import Traffic, is_native

COLUMNS = ("configuration", "TTFT", "TPOT", "tok/s user", "tok/s GPU")
_USER = COLUMNS.index("tok/s user")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One configuration. compared: of the other machine; kept: whether the objective is kept at the
    asked load; load: the most requests that surely and that maybe keep it.
    """

    name: str
    compared: bool = False
    deployment: Deployment
    estimate: Estimate
    kept: Keeps | None = None
    load: tuple[int, int] | None = None


def table(rows: Sequence[Row], prices: Mapping[str, float]) -> list[tuple[str, ...]]:
    """Header and one line per row, as cells."""
    priced = any(r.deployment.gpu.id in prices for r in rows)
    judged = any(r.kept is not None for r in rows)
    head = COLUMNS + (("$/M out",) if priced else ()) + (("kept", "up to") if judged else ())
    cells = [head, *(_cells(r, prices, priced) for r in rows)]
    if judged:  # 80 columns do not hold what is TPOT turned over as well
        cells = [row[:_USER] + row[_USER + 1 :] for row in cells]
    return cells


def _cells(r: Row, prices: Mapping[str, float], priced: bool) -> tuple[str, ...]:
    e = r.estimate
    mark = "*" if e.extrapolated else ""
    cells: tuple[str, ...] = (
        r.name + mark,
        time_span(e.ttft_s),
        time_span(e.tpot_s),
        span(e.user_tok_s),
        span(e.gpu_tok_s),
    )
    if priced:
        price = prices.get(r.deployment.gpu.id)
        cells += ("-" if price is None else span(e.dollars_per_million(r.deployment.count, price)),)
    if r.kept is not None and r.load is not None:
        cells += (r.kept.value, f"{r.load[0]}-{r.load[1]}")
    return cells


def heading(traffic: Traffic) -> str:
    """What was asked."""
    cached = f", {traffic.cached:.0%} of it cached" if traffic.cached else ""
    return (
        f"How fast, estimated: {traffic.concurrency:,.0f} in flight, {traffic.input_tokens:,} tokens in"
        f"{cached}, {traffic.output_tokens:,} out"
    )


def notes(rows: Sequence[Row], objective: Objective | None) -> list[str]:
    """What the figures mean and what they rest on."""
    found = [
        "TTFT: of a request that finds a place at once. TPOT: time per output token. tok/s GPU: input and output."
        " Nothing of it is dsv4's own measurement: it is arithmetic fitted to published figures, and a range holds"
        " 90 % of the points of cards that the fit had not seen."
    ]
    for gpu, loads in _cards(rows).items():
        found.append(f"{gpu.id}: {_basis(gpu, loads)}")
    if any(r.estimate.extrapolated for r in rows):
        reasons = dict.fromkeys(r.estimate.extrapolated for r in rows if r.estimate.extrapolated)
        found.append(f"* extrapolated: {'; '.join(reasons)}.")
    waiting = [r for r in rows if r.estimate.waits]
    if waiting:
        places = "; ".join(f"{r.name} runs {r.estimate.running:,.0f}" for r in waiting)
        found.append(f"More requests than run at once: the others wait, and TTFT is the queue's ({places}).")
    if any(r.deployment.has_draft for r in rows):
        (mtp_low, mtp_high), (dspark_low, dspark_high) = ACCEPTED["mtp"], ACCEPTED["dspark"]
        found.append(
            f"Drafts: {mtp_low} to {mtp_high} tokens a step with MTP and {dspark_low} to {dspark_high} with DSpark; random"
            " text gives more."
        )
    if objective is not None:
        found.append(
            "Kept: whether the slow end of the ranges keeps the objective (yes), only the fast end (maybe), or"
        )
        found[-1] += " neither (no). Up to: requests at once that surely and that maybe keep it."
    return found


def _cards(rows: Sequence[Row]) -> dict[Gpu, float]:
    return {r.deployment.gpu: r.estimate.traffic.concurrency for r in rows}


def _basis(gpu: Gpu, concurrency: float) -> str:
    e = errors(gpu)[level(concurrency)]
    text = (
        f"TPOT within x{e['tpot']:.1f} (half within x{e['tpot_half']:.2f}, {e['tpot_points']:.0f} points), TTFT within"
        f" x{e['ttft']:.1f}"
    )
    return text if is_native(gpu) else text + "; figures of forks and patches, as dsv4's kernels have not been timed"


def time_span(r: Range) -> str:
    """Seconds as s or ms."""
    unit, scale = ("s", 1.0) if r.high >= 1 else ("ms", 1000.0)
    return f"{_number(r.low * scale)}-{_number(r.high * scale)}{unit}"


def span(r: Range) -> str:
    """Both ends."""
    return f"{_number(r.low)}-{_number(r.high)}"


def _number(x: float) -> str:
    """Two significant digits: more would promise what the ranges do not hold."""
    return f"{float(f'{x:.2g}'):,.6g}"
