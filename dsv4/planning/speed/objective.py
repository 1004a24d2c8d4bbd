# SPDX-License-Identifier: Apache-2.0
"""What a user asks of speed: a service-level objective, and at which load a deployment keeps it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum

from dsv4.errors import PlanError
from dsv4.machine.hardware import find_gpu
from dsv4.planning.deployment import Deployment
from dsv4.planning.speed.estimate import Estimate, Range, estimate, places
from dsv4.planning.speed.work import Traffic

MOST_REQUESTS = 4096
_GOAL = re.compile(r"(ttft|tpot)=([0-9]*\.?[0-9]+)(ms|s)|(tps)=([0-9]*\.?[0-9]+)")
_PRICE = re.compile(r"(?:([\w.-]+)=)?([0-9]*\.?[0-9]+)")


class Keeps(str, Enum):
    """YES where the slow end of every range keeps the objective, NO where a fast end misses it."""

    YES = "yes"
    MAYBE = "maybe"
    NO = "no"


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Upper bounds in seconds; None where not asked."""

    ttft_s: float | None = None
    tpot_s: float | None = None

    def kept_by(self, e: Estimate) -> Keeps:
        """A request that waits for a place begins when the queue lets it: no TTFT is kept then."""
        if e.waits and self.ttft_s is not None:
            return Keeps.NO
        asked = [(r, most) for r, most in ((e.ttft_s, self.ttft_s), (e.tpot_s, self.tpot_s)) if most is not None]
        if any(r.low > most for r, most in asked):
            return Keeps.NO
        return Keeps.YES if all(r.high <= most for r, most in asked) else Keeps.MAYBE


def parse_objective(text: str) -> Objective:
    """`ttft=2s,tpot=30ms`, or `tps=50` for tokens per second and user. Raises PlanError."""
    found: dict[str, float] = {}
    for part in text.replace(" ", "").lower().split(","):
        match = _GOAL.fullmatch(part)
        if match is None or float(match[2] or match[5]) <= 0:
            raise PlanError(f"{part or text}: is no objective; write ttft=2s,tpot=30ms, or tps=50 for tokens/s a user")
        if match[4]:
            found["tpot_s"] = 1 / float(match[5])
        else:
            found[f"{match[1]}_s"] = float(match[2]) * (0.001 if match[3] == "ms" else 1)
    return Objective(**found)


def parse_prices(text: str, card: str) -> Mapping[str, float]:
    """Dollars per GPU and hour by card id: `2.5` for the card that is planned, `h200=2.5,b200=4`
    for several. Raises PlanError or HardwareError.
    """
    prices = {}
    for part in text.replace(" ", "").split(","):
        match = _PRICE.fullmatch(part)
        if match is None:
            raise PlanError(f"{part or text}: is no price; write 2.5, or h200=2.5,b200=4, in dollars per GPU and hour")
        prices[find_gpu(match[1]).id if match[1] else card] = float(match[2])
    return prices


def load_kept(d: Deployment, traffic: Traffic, objective: Objective) -> tuple[int, int]:
    """The most requests that run at once and surely, or maybe, keep `objective`; 0 for none."""
    limit = min(places(d, traffic), MOST_REQUESTS)

    def most(wanted: tuple[Keeps, ...]) -> int:
        def keeps(n: int) -> bool:
            return objective.kept_by(estimate(d, replace(traffic, concurrency=n), limit)) in wanted

        low, high = 0, limit + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if keeps(middle) else (low, middle)
        return low

    return most((Keeps.YES,)), most((Keeps.YES, Keeps.MAYBE))


def frontier(d: Deployment, traffic: Traffic) -> list[tuple[int, Range, Range]]:
    """(requests in flight, tokens/s of one user, of one GPU), until requests would wait."""
    found, n, limit = [], 1, places(d, traffic)
    while n <= min(limit, MOST_REQUESTS):
        e = estimate(d, replace(traffic, concurrency=n), limit)
        found.append((n, e.user_tok_s, e.gpu_tok_s))
        n *= 2
    return found
