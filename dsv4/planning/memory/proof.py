# SPDX-License-Identifier: Apache-2.0
"""Does a deployment fit, per rank, in its engine's own accounting? `prove` answers with every term
and its source.
"""

from __future__ import annotations

from dataclasses import replace

from dsv4.model.kv_layout import StateMapping
from dsv4.planning.deployment import Deployment
from dsv4.planning.memory import sglang, vllm
from dsv4.planning.memory.account import Proof, Term, Verdict

__all__ = ["Proof", "Term", "Verdict", "prove", "requests_by_state", "roomier_state"]


def prove(deployment: Deployment, concurrency: int = 1) -> Proof:
    """Prove `deployment` for `concurrency` requests of max_model_len over all replicas: the worst
    pipeline stage decides.
    """
    per_replica = -(-concurrency // deployment.num_pools)
    stages = range(deployment.pp)
    one = vllm.prove_stage if deployment.engine == "vllm" else sglang.prove_stage
    proofs = [one(deployment, stage, per_replica) for stage in stages]
    return min(
        proofs,
        key=lambda p: (p.verdict is Verdict.FITS, p.verdict is Verdict.TIGHT, p.held_low, -p.shortfall_bytes),
    )


def requests_by_state(deployment: Deployment, pool_bytes: int | None = None) -> dict[StateMapping, int]:
    """Requests of max_model_len that vLLM holds at once with each mapping of compressor state.

    pool_bytes: of one rank's KV pool, where it is known; else what the proof leaves at least.
    """
    found = {}
    for state in (StateMapping.SUMMARY, StateMapping.PAGED):
        d = replace(deployment, state=state)
        found[state] = prove(d).held_low if pool_bytes is None else vllm.requests_in(d, pool_bytes)
    return found


def roomier_state(deployment: Deployment, pool_bytes: int | None = None) -> StateMapping:
    """How dsv4's vLLM plugin keeps more requests of max_model_len at once: summaries where the pool
    is of the order of the in-flight reserve, pages where it is many times that and contexts are
    long, since summaries make every page 1.17 times as wide. Summaries where both hold as many.
    """
    held = requests_by_state(deployment, pool_bytes)
    return StateMapping.PAGED if held[StateMapping.PAGED] > held[StateMapping.SUMMARY] else StateMapping.SUMMARY
