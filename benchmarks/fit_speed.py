# SPDX-License-Identifier: Apache-2.0
"""Fits the planner's speed coefficients to recipes/speed_points.csv and writes recipes/speed.yaml.

Least absolute relative error (iteratively reweighted least squares) with a lower bound per
coefficient: nothing is faster than its own peak. Errors are of points whose card was left out of
the fit.

python benchmarks/fit_speed.py [--check]
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from dsv4.planning.speed.estimate import level
from dsv4.planning.speed.points import Point, all_points
from dsv4.planning.speed.work import DECODE, PREFILL, Features, decode_work, is_native, prefill_work

FILE = Path(__file__).parents[1] / "recipes" / "speed.yaml"
# Below these a unit would have run faster than its peak, or an all-reduce over PCIe have cost less
# than the 44 us by which one fork's A800 PCIe and A100 differ for each of 86.
LOWEST_DECODE = {"memory": 1.25, "compute": 1.5, "drafts": 1e-4, "prefill_compute": 1.5, "prefill_rank": 1.0,
                 "reduces_pcie": 4.4e-5}  # fmt: skip
LOWEST_PREFILL = {"compute": 1.5, "index": 1.0, "attention": 1.5, "streams": 1.0}
ROUNDS = 60
FLOOR = 0.08  # relative error below which a point pulls no less


class Side:
    """One fitted sum: which points it has, their work and what was measured."""

    def __init__(
        self,
        names: Sequence[str],
        lowest: dict[str, float],
        work: Callable[[Point], Features],
        measured: Callable[[Point], float | None],
    ) -> None:
        self.points = [p for p in all_points() if measured(p) is not None]
        self.names = names
        self.lowest = np.array([lowest.get(name, 0.0) for name in names])
        self.work = np.array([[work(p)[name] for name in names] for p in self.points])
        self.measured = np.array([measured(p) for p in self.points], dtype=float)
        self.cards = np.array([p.deployment.gpu.id for p in self.points])

    def fit(self, rows: np.ndarray) -> np.ndarray:
        """Coefficients [len(names)] from the rows that are True."""
        relative = self.work[rows] / self.measured[rows, None]
        weight = np.ones(len(relative))
        x = self.lowest
        for _ in range(ROUNDS):
            x = bounded_least_squares(relative * weight[:, None], weight, self.lowest)
            weight = 1 / np.sqrt(np.maximum(np.abs(np.log(np.maximum(relative @ x, 1e-9))), FLOOR))
        return x

    @functools.cache  # noqa: B019
    def unseen(self) -> np.ndarray:
        """Logarithm of estimate over measurement, each card's by a fit without it."""
        found = np.zeros(len(self.points))
        for card in np.unique(self.cards):
            rows = self.cards == card
            found[rows] = np.log(self.work[rows] @ self.fit(~rows) / self.measured[rows])
        return found


def bounded_least_squares(a: np.ndarray, y: np.ndarray, lowest: np.ndarray) -> np.ndarray:
    """argmin |a x - y| with x >= lowest. Source: Lawson and Hanson, Solving Least Squares Problems
    (1974), algorithm NNLS.
    """
    rest = y - a @ lowest
    x = np.zeros(a.shape[1])
    free: list[int] = []
    for _ in range(10 * a.shape[1]):
        gradient = a.T @ (rest - a @ x)
        gradient[free] = -math.inf
        if gradient.max() <= 1e-10:
            break
        free.append(int(gradient.argmax()))
        while True:
            z = np.zeros_like(x)
            z[free] = np.linalg.lstsq(a[:, free], rest, rcond=None)[0]
            if all(z[i] > 0 for i in free):
                x = z
                break
            step = min(x[i] / (x[i] - z[i]) for i in free if z[i] <= 0)
            x = x + step * (z - x)
            free = [i for i in free if x[i] > 1e-12]
            x[[i for i in range(len(x)) if i not in free]] = 0
    return x + lowest


def sides() -> tuple[Side, Side]:
    """What TPOT and TTFT are fitted by."""
    decode = Side(DECODE, LOWEST_DECODE, lambda p: decode_work(p.deployment, p.traffic, p.batch), lambda p: p.tpot_s)
    prefill = Side(PREFILL, LOWEST_PREFILL, lambda p: prefill_work(p.deployment, p.traffic), lambda p: p.ttft_s)
    return decode, prefill


def spread(errors: Iterable[float], q: float) -> float:
    """The factor within which a share `q` of the points lies."""
    return float(np.exp(np.quantile(np.abs(list(errors)), q)))


def _errors(side: Side, wanted: Callable[[Point], bool]) -> list[float]:
    return [e for p, e in zip(side.points, side.unseen(), strict=True) if wanted(p)]


def _factors(name: str, errors: Sequence[float]) -> str:
    half, most = spread(errors, 0.5), spread(errors, 0.9)
    return f"{name}: {most:.2f}, {name}_half: {half:.2f}, {name}_points: {len(errors)}"


def page(decode: Side, prefill: Side) -> str:
    """The text of recipes/speed.yaml."""
    lines = [
        "# Written by benchmarks/fit_speed.py from speed_points.csv; `--check` compares.",
        "# decode, prefill: seconds per unit of dsv4/planning/speed/work.py. A count has its own seconds; a time at the",
        "# card's peak has a factor.",
    ]
    for name, side in (("decode", decode), ("prefill", prefill)):
        lines.append(f"{name}:")
        every = np.ones(len(side.points), dtype=bool)
        lines += [f"  {n}: {v:.4g}" for n, v in zip(side.names, side.fit(every), strict=True)]
    lines += ["# Factors within which 90 % of the points of unseen cards lie, and half of them.", "errors:"]
    for kind, wanted in (("native", True), ("other", False)):
        first = _errors(prefill, lambda p, wanted=wanted: is_native(p.deployment.gpu) is wanted)
        lines.append(f"  {kind}:")
        for name in ("single", "batch", "saturated"):
            # Forks on other cards have too few points to tell loads apart.
            each = _errors(
                decode,
                lambda p, wanted=wanted, name=name: (
                    is_native(p.deployment.gpu) is wanted and (not wanted or level(p.traffic.concurrency) == name)
                ),
            )
            lines.append(f"    {name}: {{{_factors('tpot', each)}, {_factors('ttft', first)}}}")
    return "\n".join(lines) + "\n"


def main() -> int:
    decode, prefill = sides()
    text = page(decode, prefill)
    if "--verbose" in sys.argv:
        for side in (decode, prefill):
            for p, e in zip(side.points, side.unseen(), strict=True):
                d = p.deployment
                print(f"{d.checkpoint.id:11} {d.gpu.id:13} {d.shape:12} {p.traffic.concurrency:5g} {math.exp(e):6.2f}")
    if "--check" in sys.argv:
        return 0 if FILE.read_text() == text else 1
    FILE.write_text(text)
    print(text, end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
