# SPDX-License-Identifier: Apache-2.0
"""Does a deployment fit, per rank, in its engine's own accounting? `prove` answers with every term
and its source.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from dsv4.planning.deployment import MAX_CONTEXT, Deployment
from dsv4.planning.memory import overheads as calibration
from dsv4.planning.memory.overheads import Range
from dsv4.planning.memory.sglang import SglangPool, SglangRequest, sglang_pool
from dsv4.planning.memory.vllm import VllmPool, in_flight_tokens, stage_with_draft, vllm_pool
from dsv4.planning.memory.weights import RankWeights, pipeline_layers, stage_weights

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
    request_bytes: what its admission reserves for one request of max_model_len.
    reserve_bytes: the part of request_bytes that does not depend on the context.
    need_bytes: what the target concurrency takes on one replica.
    by_memory_*: requests of max_model_len at once over all replicas, by KV alone.
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
    request_bytes: int
    reserve_bytes: int
    need_bytes: int
    by_memory_low: float
    by_memory_high: float
    max_context_low: int
    max_context_high: int
    shortfall_bytes: int
    verdict: Verdict
    headroom_shortfall_bytes: int = 0

    @property
    def concurrency_low(self) -> float:
        """Requests of max_model_len at once over all replicas, by KV and by max_num_seqs."""
        return min(self.by_memory_low, self.deployment.max_num_seqs * self.deployment.dp)

    @property
    def concurrency_high(self) -> float:
        return min(self.by_memory_high, self.deployment.max_num_seqs * self.deployment.dp)

    @property
    def weights_bytes(self) -> int:
        return sum(term.low for term in self.terms if term.name.startswith("weights"))


def prove(deployment: Deployment, concurrency: int = 1) -> Proof:
    """Prove `deployment` for `concurrency` requests of max_model_len over all replicas: the worst
    pipeline stage decides.
    """
    per_replica = -(-concurrency // deployment.dp)
    stages = range(deployment.pp)
    one = _prove_vllm if deployment.engine == "vllm" else _prove_sglang
    proofs = [one(deployment, stage, per_replica) for stage in stages]
    return min(
        proofs,
        key=lambda p: (p.verdict is Verdict.FITS, p.verdict is Verdict.TIGHT, p.concurrency_low, -p.shortfall_bytes),
    )


def weights_of(d: Deployment, stage: int) -> RankWeights:
    """Weights of one rank of pipeline stage `stage`."""
    return stage_weights(d.config, tp=d.tp, dp=d.dp, ep=d.ep, pp=d.pp, with_draft=d.has_draft)[stage]


def vllm_stage_pool(d: Deployment, stage: int) -> VllmPool:
    """vLLM's pool on a rank of pipeline stage `stage`."""
    layers = stage_with_draft(pipeline_layers(d.config.num_hidden_layers, d.pp)[stage], d.config, d.num_draft_layers)
    return vllm_pool(d.config, d.formats, d.num_draft_layers, layers, mapping=d.state)


def sglang_stage_pool(d: Deployment, stage: int) -> SglangPool:
    """SGLang's pool on a rank of pipeline stage `stage`."""
    request = SglangRequest(
        max_running_requests=d.max_num_seqs,
        chunked_prefill_tokens=d.max_num_batched_tokens,
        swa_full_tokens_ratio=d.swa_full_tokens_ratio,
        draft_tokens=d.speculation.num_tokens + 1 if d.has_draft else 0,
        overlap_schedule=d.async_scheduling,
    )
    return sglang_pool(d.config, d.formats, request, pipeline_layers(d.config.num_hidden_layers, d.pp)[stage])


def _weight_terms(w: RankWeights) -> list[Term]:
    body = w.total_bytes - w.draft_bytes
    terms = [Term("weights", body, body, INVENTORY_SOURCE)]
    if w.draft_bytes:
        terms.append(Term("weights of the draft", w.draft_bytes, w.draft_bytes, INVENTORY_SOURCE))
    return [*terms, _term("widened while loading", calibration.load_overhead(w.wo_a_bytes))]


def _exchange_terms(d: Deployment, suffix: str = "") -> list[Term]:
    backend = d.moe_backend if d.a2a_backend == "none" else d.a2a_backend
    buffers = calibration.all_to_all(d.config, backend, d.max_num_batched_tokens, d.tp * d.dp)
    return [] if buffers is None else [_term(f"expert exchange{suffix}", buffers)]


def _term(name: str, r: Range) -> Term:
    return Term(name, r.low, r.high, r.source)


def _prove_vllm(d: Deployment, stage: int, per_replica: int) -> Proof:
    terms = [
        *_weight_terms(weights_of(d, stage)),
        _term("outside PyTorch", calibration.non_torch(d.tp * d.dp)),
        _term("activation peak", calibration.activation(d.config, d.max_num_batched_tokens)),
        _term("CUDA graphs", calibration.graphs(d.max_num_seqs, d.decode_graphs_only)),
        *_exchange_terms(d),
    ]
    budget = int(d.memory_fraction * d.gpu.total_bytes)
    pool = vllm_stage_pool(d, stage)
    flight = in_flight_tokens(d.max_num_batched_tokens, d.async_scheduling, d.pp)
    low, high = budget - sum(t.high for t in terms), budget - sum(t.low for t in terms)
    request = pool.request_bytes(d.max_model_len, flight)
    need = per_replica * request + pool.block_bytes  # the pool holds back one null block
    return Proof(
        deployment=d,
        stage=stage,
        terms=tuple(terms),
        budget_bytes=budget,
        pool_low=low,
        pool_high=high,
        request_bytes=request,
        reserve_bytes=pool.state_bytes(flight, d.max_model_len),
        need_bytes=need,
        by_memory_low=pool.max_concurrency(low, d.max_model_len, flight) * d.dp,
        by_memory_high=pool.max_concurrency(high, d.max_model_len, flight) * d.dp,
        max_context_low=pool.max_model_len(low, flight, MAX_CONTEXT, per_replica),
        max_context_high=pool.max_model_len(high, flight, MAX_CONTEXT, per_replica),
        shortfall_bytes=max(need - low, 0),
        verdict=_verdict(need <= low, need <= high),
    )


def _prove_sglang(d: Deployment, stage: int, per_replica: int) -> Proof:
    before = _term("context before load", calibration.context(d.tp * d.dp))
    weights = _weight_terms(weights_of(d, stage))
    pool = sglang_stage_pool(d, stage)

    def pool_bytes(context: int, loaded: int) -> int:
        return int((d.gpu.total_bytes - context) * d.memory_fraction) - loaded

    low = pool_bytes(before.high, sum(t.high for t in weights))
    high = pool_bytes(before.low, sum(t.low for t in weights))
    request = int(pool.bytes_for(d.max_model_len) - pool.fixed_bytes)
    need = int(pool.bytes_for(per_replica * d.max_model_len))
    tokens_low, tokens_high = pool.full_tokens(low), pool.full_tokens(high)
    # The fraction leaves the rest of the card to activations and graphs: that must hold them.
    headroom = int((d.gpu.total_bytes - before.high) * (1 - d.memory_fraction))
    runtime = [
        _term("activation peak, in the headroom", calibration.activation(d.config, d.max_num_batched_tokens)),
        _term("CUDA graphs, in the headroom", calibration.graphs(d.max_num_seqs, d.decode_graphs_only)),
        *_exchange_terms(d, ", in the headroom"),
    ]
    lack_low, lack_high = (max(sum(getattr(t, end) for t in runtime) - headroom, 0) for end in ("high", "low"))
    return Proof(
        deployment=d,
        stage=stage,
        terms=(before, *weights, *runtime),
        budget_bytes=int((d.gpu.total_bytes - before.high) * d.memory_fraction),
        pool_low=low,
        pool_high=high,
        request_bytes=request,
        reserve_bytes=int(pool.fixed_bytes),
        need_bytes=need,
        by_memory_low=pool.max_requests(tokens_low, d.max_model_len) * d.dp,
        by_memory_high=pool.max_requests(tokens_high, d.max_model_len) * d.dp,
        max_context_low=min(tokens_low // max(per_replica, 1), MAX_CONTEXT),
        max_context_high=min(tokens_high // max(per_replica, 1), MAX_CONTEXT),
        shortfall_bytes=max(need - low, lack_low, 0),
        headroom_shortfall_bytes=lack_low,
        verdict=_verdict(need <= low and not lack_low, need <= high and not lack_high),
    )


def _verdict(with_high_ends: bool, with_low_ends: bool) -> Verdict:
    return Verdict.FITS if with_high_ends else Verdict.TIGHT if with_low_ends else Verdict.NO
