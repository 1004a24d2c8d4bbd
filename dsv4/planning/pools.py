# SPDX-License-Identifier: Apache-2.0
"""Prefill and decode as two pools of engines, each engine on as many GPUs as the question names.

An engine that prefills holds a request's KV until it is sent; one that decodes takes small steps,
so its reserve is small, and no prefill slows its tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dsv4.errors import PlanError
from dsv4.machine.hardware import GIB
from dsv4.planning.planner import Candidate, Question, plan
from dsv4.planning.recipe.schema import MAX_GPUS
from dsv4.planning.speed.estimate import Estimate, Range, can_estimate, errors, estimate, level, prefill_rate
from dsv4.planning.speed.text import span, time_span
from dsv4.planning.speed.work import Traffic
from dsv4.planning.text import columns, name_of, wrap

SHOWN = 6
DECODE_STEP_TOKENS = 1024  # a step of tokens, one per request and its drafts, and no prompt


@dataclass(frozen=True, kw_only=True)
class Pools:
    """How many engines of each kind."""

    prefill: int
    decode: int

    @property
    def engines(self) -> int:
        return self.prefill + self.decode


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The same engine and shape in both pools. decode.proof: of its share of the requests."""

    pools: Pools
    prefill: Candidate
    decode: Candidate

    @property
    def works(self) -> bool:
        return self.prefill.works and self.decode.works

    @property
    def sent_bytes(self) -> int:
        """KV that one request of full length moves, rank to rank, of the fullest rank."""
        return self.prefill.proof.decoding_bytes


@dataclass(frozen=True, kw_only=True)
class PairSpeed:
    """tok/s of input and output per GPU of both pools, by the slower pool, and which that is."""

    one: Estimate
    gpu_tok_s: Range
    limited_by: str


def parse_pools(text: str) -> Pools:
    """`1P3D`: one engine that prefills and three that decode. Raises PlanError."""
    match = re.fullmatch(r"([1-9][0-9]*)p([1-9][0-9]*)d", text.strip().lower())
    if match is None:
        raise PlanError(f"{text}: is no pair of pools; write 1P3D for one engine that prefills and three that decode")
    return Pools(prefill=int(match[1]), decode=int(match[2]))


def plan_pools(q: Question, pools: Pools) -> list[Pair]:
    """Pairs worth naming, what works first: per engine, the best that decodes with the shape that
    prefills soonest. Raises PlanError where the GPUs are more than a plan may have.
    """
    if q.count * pools.engines > MAX_GPUS:
        raise PlanError(
            f"{pools.prefill}P{pools.decode}D: {q.count * pools.engines} GPUs; a plan has at most {MAX_GPUS}"
        )
    senders = plan(replace(q, concurrency=1, prefer="latency"))
    takers = plan(
        replace(
            q,
            concurrency=-(-q.concurrency // pools.decode),
            max_num_batched_tokens=min(DECODE_STEP_TOKENS, q.max_num_batched_tokens),
        )
    )
    pairs = []
    for decode in (t for t in takers if t.deployment.replicas == 1):
        same = [s for s in senders if s.deployment.engine == decode.deployment.engine and not s.deployment.has_draft]
        # One shape in both pools: the engines move whole pages, rank to rank.
        alike = [s for s in same if s.deployment.shape == decode.deployment.shape]
        if alike:
            pairs.append(Pair(pools=pools, prefill=alike[0], decode=decode))
    return sorted(pairs, key=lambda p: not p.works)


def pair_speed(pair: Pair, traffic: Traffic) -> PairSpeed | None:
    """`traffic` over both pools; None where the card's peaks are not known."""
    sender, taker, pools = pair.prefill.deployment, pair.decode.deployment, pair.pools
    if not can_estimate(taker.gpu):
        return None
    share = replace(traffic, concurrency=traffic.concurrency / pools.decode, prefilled_elsewhere=True)
    one = replace(estimate(taker, share), ttft_s=estimate(sender, replace(traffic, concurrency=1)).ttft_s)
    error = errors(sender.gpu)[level(traffic.concurrency)]["ttft"]
    gpus = taker.count * pools.engines
    rates = []
    for decoded, factor in ((one.output_tok_s.low, 1 / error), (one.output_tok_s.high, error)):
        requests = {
            "decode": decoded / traffic.output_tokens * pools.decode,
            "prefill": pools.prefill * prefill_rate(sender, traffic) * factor,
        }
        limit = min(requests, key=lambda name: requests[name])
        rates.append((requests[limit] * traffic.size / gpus, limit))
    (low, by_low), (high, by_high) = rates
    return PairSpeed(one=one, gpu_tok_s=Range(low, high), limited_by=by_low if by_low == by_high else "either")


def describe_pools(found: Sequence[tuple[Pair, PairSpeed | None]]) -> list[str]:
    """The pairs that work as a table, and what dsv4 makes of them."""
    works = [(p, s) for p, s in found if p.works][:SHOWN]
    pools, gpu = found[0][0].pools, found[0][0].decode.deployment.gpu
    count = found[0][0].decode.deployment.count
    head = f"Two pools: {pools.prefill} to prefill and {pools.decode} to decode, each engine on {count} x {gpu.id}"
    if not works:
        return [*wrap(f"{head}: nothing fits."), ""]
    rows: list[tuple[str, ...]] = [("both pools", "at once", "TTFT", "TPOT", "tok/s GPU", "limited by")]
    for pair, speed in works:
        held = f"{pair.decode.proof.at_once_low * pools.decode:,}"
        cells = ("-",) * 4 if speed is None else _cells(speed)
        rows.append((name_of(pair.decode), held, *cells))
    sent = works[0][0].sent_bytes / GIB
    notes = (
        f"At once: of all engines that decode. TTFT is without the transfer, {sent:.2f} GiB a rank and request of full"
        " length. Of four published pairs, tokens/s of a user lie in the printed range for three and 5 % below it for"
        " one, tokens/s of a GPU for three and 35 % above it for one."
    )
    plugin = "this card is served by dsv4's plugin, which refuses it" if gpu.needs_plugin else "native V4 serves it"
    last = f"Planned, not launched: {plugin}; dsv4 writes no launch of two pools and has tested none."
    return [*wrap(head), *columns(rows), *wrap(notes), *wrap(last), ""]


def _cells(speed: PairSpeed) -> tuple[str, ...]:
    one = speed.one
    return time_span(one.ttft_s), time_span(one.tpot_s), span(speed.gpu_tok_s), speed.limited_by
