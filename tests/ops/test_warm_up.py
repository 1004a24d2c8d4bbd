# SPDX-License-Identifier: Apache-2.0
"""After the warm-up, no step launches a kernel that Triton has not compiled: by its own key for
sm80, without a GPU."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

from dsv4.model.config import V4Config
from dsv4.model.kv_layout import CacheFormats, StateMapping
from dsv4.ops import kernels
from dsv4.ops.launches import Variant, recorded
from dsv4.ops.warm_up import (
    NullStep,
    ServedLayer,
    ServedModel,
    allocate,
    attend,
    feed_forward,
    mix_streams,
    null_steps,
    plan_step,
    warm_up,
)

CONFIGS = Path(__file__).parents[1] / "golden" / "configs"
CONTEXT = 1_048_576
CHUNK = 8192
PACKED, PLAIN = CacheFormats.packed(2, mxfp4_keys=False), CacheFormats.plain(2)


def deployment(
    name: str, mapping: StateMapping, formats: CacheFormats, tp: int
) -> tuple[ServedModel, list[ServedLayer]]:
    path = CONFIGS / f"DeepSeek-V4-{name}.json"
    model = ServedModel(
        config=V4Config.from_dict(json.loads(path.read_text()), str(path)),
        tp=tp,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        mapping=mapping,
        index_format=formats.index,
        max_context=CONTEXT,
        routed_ids=torch.int64 if mapping is StateMapping.RING else None,
    )
    return model, allocate(model, formats)


@dataclass
class Workload:
    """Up to 64 requests of 1..9,000 tokens, in chunks of at most 8,192 tokens a step, each followed
    by some decoding."""

    seed: int
    waiting: list[int] = field(default_factory=list)
    running: list[list[int]] = field(default_factory=list)  # [tokens in the cache, of the prompt left, to generate]

    def steps(self, count: int) -> Iterator[NullStep]:
        rng = random.Random(self.seed)
        for _ in range(count):
            if len(self.running) < 64 and rng.random() < 0.5:
                new = rng.choice([1, 2, rng.randint(1, 300), rng.randint(1, 9000)])
                self.running += [[0, new, rng.randint(1, 30)] for _ in range(rng.choice([1, 1, 3, 20]))][
                    : 64 - len(self.running)
                ]
            budget, taken = CHUNK, []
            for request in self.running:
                n = min(request[1], budget) if request[1] else 1
                if n:
                    taken.append((request, n))
                    budget -= n
            for request, n in taken:
                request[0] += n
                if request[1]:
                    request[1] -= n
                else:
                    request[2] -= 1
            if taken:
                yield NullStep(
                    sum(n for _, n in taken), len(taken), max(r[0] for r, _ in taken), max(n for _, n in taken)
                )
            self.running = [r for r in self.running if r[2] > 0]


def launch(model: ServedModel, layers: list[ServedLayer], step: NullStep) -> None:
    mix_streams(model, step.tokens)
    feed_forward(model, step.tokens)
    plan_step(model, layers, step)
    for layer in layers:
        attend(model, layer, step)


def served(model: ServedModel, layers: list[ServedLayer], steps: list[NullStep]) -> dict[str, Variant]:
    """Variants by Triton's key."""
    with recorded("sm80") as found:
        for step in steps:
            launch(model, layers, step)
    return {v.key: v for v in found}


def warmed(model: ServedModel, layers: list[ServedLayer]) -> dict[str, Variant]:
    with recorded("sm80") as found:
        warm_up(model, layers)
    return {v.key: v for v in found}


@pytest.fixture(autouse=True)
def _untouched_memory() -> None:
    """Nothing is computed, so that what torch.empty returns need not be filled."""
    torch.use_deterministic_algorithms(False)


DEPLOYMENTS = {
    "flash-summary-fp8": ("Flash", StateMapping.SUMMARY, PACKED, 8),
    "flash-paged-bf16": ("Flash", StateMapping.PAGED, PLAIN, 8),
    "pro-summary-mxfp4": ("Pro", StateMapping.SUMMARY, CacheFormats.packed(2, mxfp4_keys=True), 8),
    "flash-ring-fp8": ("Flash", StateMapping.RING, PACKED, 4),
    "pro-ring-bf16": ("Pro", StateMapping.RING, PLAIN, 8),
}


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_a_served_workload_meets_no_variant_that_the_warm_up_did_not(name: str) -> None:
    model, layers = deployment(*DEPLOYMENTS[name])
    eager = list(Workload(seed=len(name)).steps(60))
    assert min(s.tokens for s in eager) < 64
    assert max(s.tokens for s in eager) == CHUNK
    # What a graph has captured is launched as if every context were the longest.
    captured = [replace(step, context=CONTEXT) for step in eager if step.query_len == 1]
    cold = served(model, layers, [*eager, *captured, NullStep(300, 1, CONTEXT, 300)]).keys() - warmed(model, layers)
    assert sorted(cold) == []


def test_so_few_variants_serve() -> None:
    """A number that grows is start-up time: about a second a variant, in every process."""
    counts = {name: len(warmed(*deployment(*given))) for name, given in DEPLOYMENTS.items()}
    assert counts == {
        "flash-summary-fp8": 29,
        "flash-paged-bf16": 32,
        "pro-summary-mxfp4": 30,
        "flash-ring-fp8": 36,
        "pro-ring-bf16": 37,
    }


def test_the_workload_meets_others_where_host_integers_are_specialised(monkeypatch: pytest.MonkeyPatch) -> None:
    """The instrument sees what it is for: without `do_not_specialize`, a dozen kernels and more are
    compiled while serving."""
    jitted = [
        f
        for module in kernels.import_kernels(kernels.KERNEL_MODULES)
        for f in vars(module).values()
        if isinstance(f, InterpretedFunction) and f.kwargs.get("do_not_specialize")
    ]
    for kernel in jitted:
        monkeypatch.setitem(kernel.kwargs, "do_not_specialize", None)
    model, layers = deployment("Flash", StateMapping.RING, PACKED, 4)
    warm = warmed(model, layers)
    found = served(model, layers, list(Workload(seed=0).steps(60)))
    cold = Counter(v.name for key, v in found.items() if key not in warm)
    assert {"decode_logits_kernel", "pre_kernel", "compress_store_kernel"} <= set(cold)
    assert cold.total() >= 12


def test_null_steps_reach_the_longest_context_and_both_kinds_of_step() -> None:
    model, _ = deployment("Flash", StateMapping.SUMMARY, PACKED, 8)
    steps = null_steps(model)
    assert max(s.context for s in steps) == CONTEXT
    assert {s.query_len == 1 for s in steps} == {True, False}
