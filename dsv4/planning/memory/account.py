# SPDX-License-Identifier: Apache-2.0
"""What a proof consists of, and the terms that both engines' proofs share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from dsv4.planning.deployment import Deployment
from dsv4.planning.memory import overheads
from dsv4.planning.memory.overheads import Range
from dsv4.planning.memory.weights import RankWeights, stage_weights

INVENTORY_SOURCE = "tensor inventory, equal to the released checkpoints to the byte"


class Verdict(str, Enum):
    """FITS with the high end of every range, TIGHT only with the low ends, NO otherwise."""

    FITS = "fits"
    TIGHT = "tight"
    NO = "no"


@dataclass(frozen=True)
class Term:
    """One line of the proof, in bytes on the fullest rank."""

    name: str
    low: int
    high: int
    source: str


@dataclass(frozen=True, kw_only=True)
class Proof:
    """Memory of the fullest rank. `*_low` assume the high end of every overhead, `*_high` the low
    end.

    budget_bytes: what the engine may use.
    start_bytes: what one request of max_model_len needs of the pool, with the whole in-flight
    reserve: below it vLLM refuses to start.
    reserve_bytes: the part of start_bytes that does not grow with the context.
    decoding_bytes: what a request of max_model_len holds once it decodes.
    need_bytes: what the target concurrency takes on one replica: one request starts while the
    others decode.
    held_*: requests of max_model_len that decode together over all replicas, by KV alone.
    printed_*: vLLM's own start-up line for one replica, "Maximum concurrency"; it charges the
    reserve to every request. None for SGLang.
    longest: the context that the target concurrency fits with, of a pool's bytes.
    shortfall_bytes: missing with the high ends, 0 when it fits.
    headroom_shortfall_bytes: the part of it that activations and graphs lack outside SGLang's
    fraction.
    """

    deployment: Deployment
    stage: int
    terms: tuple[Term, ...]
    budget_bytes: int
    pool_low: int
    pool_high: int
    start_bytes: int
    reserve_bytes: int
    decoding_bytes: int
    need_bytes: int
    held_low: int
    held_high: int
    printed_low: float | None
    printed_high: float | None
    longest: Callable[[int], int] = field(compare=False, repr=False)
    shortfall_bytes: int
    verdict: Verdict
    headroom_shortfall_bytes: int = 0

    @functools.cached_property
    def max_context_low(self) -> int:
        """The longest context that the target concurrency fits with; 0 when none does."""
        return self.longest(self.pool_low)

    @functools.cached_property
    def max_context_high(self) -> int:
        return self.longest(self.pool_high)

    @property
    def starts(self) -> Verdict:
        """Whether one request of max_model_len can be served at all: what vLLM checks at start."""
        if self.headroom_shortfall_bytes:
            return self.verdict
        return verdict_of(self.start_bytes <= self.pool_low, self.start_bytes <= self.pool_high)

    @property
    def at_once_low(self) -> int:
        """Requests of max_model_len that decode together over all replicas, by KV and by
        max_num_seqs.
        """
        return min(self.held_low, self.deployment.max_num_seqs * self.deployment.num_pools)

    @property
    def at_once_high(self) -> int:
        return min(self.held_high, self.deployment.max_num_seqs * self.deployment.num_pools)

    @property
    def weights_bytes(self) -> int:
        return sum(term.low for term in self.terms if term.name.startswith("weights"))


def weights_of(d: Deployment, stage: int) -> RankWeights:
    """Weights of one rank of pipeline stage `stage`."""
    return stage_weights(
        d.config, tp=d.tp, dp=d.dp, ep=d.ep, pp=d.pp, with_draft=d.has_draft, weights=d.checkpoint.weights
    )[stage]


def weight_terms(d: Deployment, stage: int) -> list[Term]:
    """Weights of one rank of pipeline stage `stage`, and what widening them may take."""
    w = weights_of(d, stage)
    body = w.total_bytes - w.draft_bytes
    source = INVENTORY_SOURCE if d.checkpoint.weights is None else f"headers of {d.checkpoint.repo}"
    terms = [Term("weights", body, body, source)]
    if w.draft_bytes:
        terms.append(Term("weights of the draft", w.draft_bytes, w.draft_bytes, source))
    terms.append(term("widened while loading", overheads.load_overhead(w.wo_a_bytes)))
    if w.draft_bytes and d.engine == "vllm" and d.speculation.method == "dspark":
        terms.append(term("built for the draft", overheads.draft_load_overhead(d.config)))
    return terms


def graph_range(d: Deployment) -> Range:
    """CUDA graphs of `d`, by who serves it."""
    if not d.gpu.needs_plugin:
        return overheads.graphs(d.max_num_seqs, d.decode_graphs_only)
    mixed, decode = d.max_capture_size or 0, d.max_num_seqs * (1 + d.speculation.num_tokens)
    return overheads.plugin_graphs(d.config, d.tp, d.max_model_len, min(decode, mixed or decode), mixed)


def exchange_terms(d: Deployment, suffix: str = "") -> list[Term]:
    """Buffers of the expert exchange, where there are any."""
    backend = d.moe_backend if d.a2a_backend == "none" else d.a2a_backend
    buffers = overheads.all_to_all(d.config, backend, d.max_num_batched_tokens, d.tp * d.dp)
    return [] if buffers is None else [term(f"expert exchange{suffix}", buffers)]


def term(name: str, r: Range) -> Term:
    """A range of overheads as a line of the proof."""
    return Term(name, r.low, r.high, r.source)


def verdict_of(with_high_ends: bool, with_low_ends: bool) -> Verdict:
    """Whether it fits with the high, and with the low ends of every range."""
    return Verdict.FITS if with_high_ends else Verdict.TIGHT if with_low_ends else Verdict.NO
