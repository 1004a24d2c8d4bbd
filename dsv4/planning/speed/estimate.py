# SPDX-License-Identifier: Apache-2.0
"""How fast a deployment may serve given traffic, as ranges: `work` times what each unit took in the
public points of recipes/speed_points.csv.

Coefficients and errors are in recipes/speed.yaml, which benchmarks/fit_speed.py writes. A range is
wide by the 90th percentile of the error on cards that the fit had not seen.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from dsv4.data import data_folder, read_yaml
from dsv4.machine.hardware import Gpu
from dsv4.model.config import DraftKind
from dsv4.planning.deployment import Deployment
from dsv4.planning.memory.proof import prove
from dsv4.planning.speed.points import Point, all_points
from dsv4.planning.speed.work import Features, Traffic, decode_work, is_native, peaks, prefill_work

Level = Literal["single", "batch", "saturated"]
# Tokens that a step yields with a draft on text that people write, low and high. Random text, which
# most published figures use, flatters a draft. Source: acceptance in recipes/speed_points.csv.
ACCEPTED: Mapping[DraftKind, tuple[float, float]] = {"none": (1.0, 1.0), "mtp": (1.4, 1.8), "dspark": (2.2, 3.6)}
_ROUNDS = 12  # each halves the distance at least


@dataclass(frozen=True)
class Range:
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Seconds, and tokens per second.

    running: requests that run at once over all replicas; the rest of the traffic's wait.
    ttft_s: of a request that need not wait for a place.
    gpu_tok_s: input and output tokens per GPU. output_tok_s: output alone, all GPUs.
    extrapolated: "" or why no published point is near.
    """

    traffic: Traffic
    running: float
    ttft_s: Range
    tpot_s: Range
    gpu_tok_s: Range
    output_tok_s: Range
    extrapolated: str

    @property
    def user_tok_s(self) -> Range:
        """Output tokens per second that one user sees once the first has come."""
        return Range(1 / self.tpot_s.high, 1 / self.tpot_s.low)

    @property
    def waits(self) -> bool:
        """Whether requests wait for a place: the queue then decides when they begin."""
        return self.traffic.concurrency > self.running

    def dollars_per_million(self, gpus: int, dollars_per_gpu_hour: float) -> Range:
        """Of output tokens."""
        per_second = gpus * dollars_per_gpu_hour / 3600
        return Range(per_second / self.output_tok_s.high * 1e6, per_second / self.output_tok_s.low * 1e6)


def can_estimate(gpu: Gpu) -> bool:
    """Whether the card's bandwidth and FLOP/s are known."""
    return peaks(gpu) is not None


def places(d: Deployment, traffic: Traffic) -> int:
    """Requests of the traffic's size that run at once: as many as the KV pools hold, at most
    max_num_seqs each."""
    held = prove(replace(d, max_model_len=traffic.size)).held_low
    return min(max(held, 1), d.max_num_seqs * d.num_pools)


def estimate(d: Deployment, traffic: Traffic, most: int | None = None) -> Estimate:
    """`traffic` on `d`. most: its `places`, where they are known. Raises PlanError where the card's
    peaks are not known.
    """
    running = min(traffic.concurrency, places(d, traffic) if most is None else most)
    error = errors(d.gpu)[level(traffic.concurrency)]
    ttft = prefill_seconds(d, traffic)
    few, many = (replace(traffic, accepted=n, concurrency=running) for n in ACCEPTED[d.speculation.method])
    first = Range(ttft / error["ttft"], ttft * error["ttft"])
    each = Range(_settled(d, many, first.low) / error["tpot"], _settled(d, few, first.high) * error["tpot"])
    rates = [
        running / (start + traffic.output_tokens * token)
        for start, token in ((first.high, each.high), (first.low, each.low))
    ]
    return Estimate(
        traffic=traffic,
        running=running,
        ttft_s=first,
        tpot_s=each,
        gpu_tok_s=Range(*(rate * traffic.size / d.count for rate in rates)),
        output_tok_s=Range(*(rate * traffic.output_tokens for rate in rates)),
        extrapolated=_far(d, traffic.concurrency),
    )


def level(concurrency: float) -> Level:
    """Where published points behave alike: one request, few, and queues."""
    return "single" if concurrency < 2 else "batch" if concurrency <= 64 else "saturated"


def prefill_seconds(d: Deployment, traffic: Traffic) -> float:
    """From a request's arrival at an idle engine to its first token, pipeline stages in turn."""
    one = prefill_work(d, traffic)
    return _weigh(one, coefficients()["prefill"])


def token_seconds(d: Deployment, traffic: Traffic, batch: float) -> float:
    """TPOT while `batch` requests decode in one engine and as many more arrive as leave."""
    return _weigh(decode_work(d, traffic, batch), coefficients()["decode"])


def prefill_rate(d: Deployment, traffic: Traffic) -> float:
    """Requests per second that an engine prefills when there are always more: what a prefill takes
    of a busy engine, where launches are shared by several prompts, and its index scan.
    """
    work = decode_work(d, replace(traffic, prefilled_elsewhere=False, accepted=1.0), 2.0)
    beside = {name: work[name] * traffic.output_tokens for name in ("prefill_compute", "prefill_rank")}
    scan = prefill_work(d, traffic)["index"] / d.dp * coefficients()["prefill"]["index"]
    return d.replicas / (_weigh(beside, coefficients()["decode"]) + scan)


def _settled(d: Deployment, traffic: Traffic, ttft: float) -> float:
    """TPOT once as many requests decode as its own length lets: the others are being prefilled."""
    flight = max(traffic.concurrency / d.replicas, 1.0)
    batch = flight
    for _ in range(_ROUNDS):
        decoding = traffic.output_tokens * token_seconds(d, traffic, batch)
        batch = (batch + max(flight * decoding / (decoding + ttft), 1.0)) / 2
    return token_seconds(d, traffic, batch)


@functools.cache
def coefficients() -> Mapping[str, Mapping[str, float]]:
    """Seconds per unit of `decode` and of `prefill` work."""
    return {part: _fitted()[part] for part in ("decode", "prefill")}


def errors(gpu: Gpu) -> Mapping[Level, Mapping[str, float]]:
    """Factors by level for `tpot` and `ttft`: native V4, or cards that only forks have served."""
    found: Mapping[Level, Mapping[str, float]] = _fitted()["errors"]["native" if is_native(gpu) else "other"]
    return found


def near(d: Deployment, concurrency: float) -> list[Point]:
    """Published points of the same card, model family and level."""
    return [
        p
        for p in all_points()
        if (p.deployment.gpu.id, p.deployment.checkpoint.family) == (d.gpu.id, d.checkpoint.family)
        and level(p.traffic.concurrency) == level(concurrency)
    ]


def _far(d: Deployment, concurrency: float) -> str:
    if d.pp > 1:
        return "pipelines have almost no published points"
    if near(d, concurrency):
        return ""
    return f"no published point of {d.checkpoint.family} on {d.gpu.id} at this load"


def _weigh(work: Features, seconds: Mapping[str, float]) -> float:
    return sum(seconds[name] * value for name, value in work.items())


@functools.cache
def _fitted() -> Any:
    return read_yaml(data_folder() / "speed.yaml")
