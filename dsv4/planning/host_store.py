# SPDX-License-Identifier: Apache-2.0
"""What host memory would keep of prefixes that the KV pools have to let go. A question only: dsv4's
plugin refuses KV offload; native V4 of vLLM has it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from dsv4.machine.hardware import GIB
from dsv4.planning.memory.proof import Proof
from dsv4.planning.speed.estimate import Range, can_estimate, estimate
from dsv4.planning.speed.text import time_span
from dsv4.planning.speed.work import Traffic


@dataclass(frozen=True, kw_only=True)
class HostStore:
    """tokens: of a prefix. prefix_bytes: that it takes in the nodes of its engine. prefixes: that
    all stores keep; pooled: that the GPUs' own pools keep. miss_s, hit_s: TTFT of that prompt, a
    hit's without the transfer; None where the card's peaks are not known.
    """

    tokens: int
    prefix_bytes: int
    prefixes: int
    pooled: int
    miss_s: Range | None
    hit_s: Range | None


def host_store(proof: Proof, traffic: Traffic, node_gib: float) -> HostStore:
    """Prefixes of max_model_len in `node_gib` GiB of each node. Every rank keeps its copy of what
    it holds, as vLLM's native store does unless it finds the ranks alike. traffic.cached: what a
    hit finds; all but the last page where it is 0.
    """
    d = proof.deployment
    tokens = d.max_model_len
    prefix = proof.decoding_bytes * d.tp * d.pp
    one = replace(traffic, concurrency=1, input_tokens=tokens, output_tokens=1)
    found = traffic.cached or max(1 - 256 / tokens, 0.0)
    known = can_estimate(d.gpu)
    return HostStore(
        tokens=tokens,
        prefix_bytes=prefix,
        prefixes=int(node_gib * GIB * d.nodes) // prefix,
        pooled=proof.held_low,
        miss_s=estimate(d, replace(one, cached=0.0)).ttft_s if known else None,
        hit_s=estimate(d, replace(one, cached=found)).ttft_s if known else None,
    )


def describe_store(name: str, s: HostStore) -> str:
    """In one sentence or two."""
    text = (
        f"{name}: host memory would keep {s.prefixes:,} prefixes of {s.tokens:,} tokens, {s.prefix_bytes / GIB:.2f} GiB"
        f" each with every rank's copy; the pools themselves keep {s.pooled:,}"
    )
    if s.miss_s is not None and s.hit_s is not None:
        text += f". TTFT {time_span(s.hit_s)} plus the transfer after a hit, {time_span(s.miss_s)} without"
    return text + "."
