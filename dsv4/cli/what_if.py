# SPDX-License-Identifier: Apache-2.0
"""`dsv4 plan --pools` and `--host-memory`: layouts that dsv4 plans and does not launch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import click

from dsv4.cli.output import named
from dsv4.cli.speed import both_ends
from dsv4.errors import PlanError
from dsv4.machine.hardware import GIB
from dsv4.planning.host_store import HostStore, describe_store, host_store
from dsv4.planning.planner import Candidate, Question
from dsv4.planning.pools import Pair, PairSpeed, describe_pools, pair_speed, parse_pools, plan_pools
from dsv4.planning.speed.work import Traffic
from dsv4.planning.text import name_of, wrap


@dataclass(frozen=True, kw_only=True)
class WhatIf:
    """pairs: each with its speed, empty where --pools was not given; stores: by configuration."""

    traffic: Traffic
    pairs: tuple[tuple[Pair, PairSpeed | None], ...] = ()
    stores: tuple[tuple[str, HostStore], ...] = ()


def what_if_options(f: Callable[..., None]) -> Callable[..., None]:
    """Options of `dsv4 plan` that ask for other layouts."""
    for option in (
        click.option(
            "--host-memory",
            type=click.FloatRange(min=0, min_open=True),
            help="GiB of each node for prefixes that the GPUs let go.",
        ),
        click.option("--pools", help="Engines that prefill and that decode, each on --count GPUs, as 1P3D."),
    ):
        f = option(f)
    return f


def answer(q: Question, found: Sequence[Candidate], traffic: Traffic, pools: str | None, host: float | None) -> WhatIf:
    """What the two options ask. Raises PlanError that names the option."""
    pairs: list[Pair] = []
    if host and q.engine == "sglang":
        raise PlanError("--host-memory: is planned for vLLM's own KV store; leave --engine out, or give vllm")
    if pools:
        with named("--pools"):
            pairs = plan_pools(q, parse_pools(pools))
    works = [c for c in found if c.works and c.deployment.engine == "vllm"] if host else []
    return WhatIf(
        traffic=traffic,
        pairs=tuple((p, pair_speed(p, traffic) if p.works else None) for p in pairs),
        stores=tuple((name_of(c), host_store(c.proof, traffic, host or 0.0)) for c in works[:1]),
    )


def lines(asked: WhatIf) -> list[str]:
    """In words, at most 80 columns; empty where nothing was asked."""
    found = describe_pools(asked.pairs) if asked.pairs else []
    for name, store in asked.stores:
        found += [*wrap(describe_store(name, store)), *wrap("dsv4's plugin refuses KV offload today."), ""]
    return found


def as_json(asked: WhatIf) -> dict[str, Any]:
    """Both answers, without keys of what was not asked."""
    found: dict[str, Any] = {}
    if asked.pairs:
        found["pools"] = [_pair_json(pair, speed) for pair, speed in asked.pairs]
    if asked.stores:
        found["host_stores"] = [{"configuration": name, **_store_json(s)} for name, s in asked.stores]
    return found


def _pair_json(pair: Pair, speed: PairSpeed | None) -> dict[str, Any]:
    found: dict[str, Any] = {
        "engine": pair.decode.deployment.engine,
        "shape": pair.decode.deployment.shape,
        "speculative": pair.decode.deployment.speculation.method,
        "prefill_engines": pair.pools.prefill,
        "decode_engines": pair.pools.decode,
        "works": pair.works,
        "at_once_of_one_decoder": [pair.decode.proof.at_once_low, pair.decode.proof.at_once_high],
        "sent_gib_per_request_and_rank": round(pair.sent_bytes / GIB, 3),
    }
    if speed is not None:
        found["ttft_ms_without_transfer"] = both_ends(speed.one.ttft_s, 1000)
        found["tpot_ms"] = both_ends(speed.one.tpot_s, 1000)
        found["gpu_tok_s"] = both_ends(speed.gpu_tok_s)
        found["limited_by"] = speed.limited_by
    return found


def _store_json(s: HostStore) -> dict[str, Any]:
    return {
        "tokens": s.tokens,
        "gib_per_prefix": round(s.prefix_bytes / GIB, 3),
        "prefixes": s.prefixes,
        "prefixes_in_the_pools": s.pooled,
        "ttft_ms_miss": None if s.miss_s is None else both_ends(s.miss_s, 1000),
        "ttft_ms_hit_without_transfer": None if s.hit_s is None else both_ends(s.hit_s, 1000),
    }
