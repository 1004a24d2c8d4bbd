# SPDX-License-Identifier: Apache-2.0
"""What a vLLM server says of its drafts, read from the counters that the engine itself keeps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import SimpleNamespace

import pytest
from prometheus_client import CollectorRegistry, Counter
from vllm.v1.spec_decode.metrics import SpecDecodingProm, SpecDecodingStats

from dsv4.proof.status import Acceptance
from dsv4_vllm.status import acceptance


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> CollectorRegistry:
    own = CollectorRegistry()
    monkeypatch.setattr(SpecDecodingProm, "_counter_cls", staticmethod(lambda **given: Counter(registry=own, **given)))
    return own


def samples(registry: CollectorRegistry) -> Iterator[tuple[str, Mapping[str, str], float]]:
    return ((s.name, s.labels, s.value) for metric in registry.collect() for s in metric.samples)


def counted(registry: CollectorRegistry, accepted: list[list[int]]) -> Acceptance | None:
    """After two engines, one behind the other, verified three drafts a step, of which so many were
    accepted."""
    metrics = SpecDecodingProm(SimpleNamespace(num_speculative_tokens=3), ["engine"], {0: ["0"], 1: ["1"]})
    for engine, steps in enumerate(accepted):
        stats = SpecDecodingStats.new(3)
        for n in steps:
            stats.observe_draft(num_draft_tokens=3, num_accepted_tokens=n)
        metrics.observe(stats, engine)
    return acceptance(samples(registry))


def test_accepted_tokens_are_counted_by_position_over_all_engines(registry: CollectorRegistry) -> None:
    found = counted(registry, [[0, 1, 3], [2]])
    assert found == Acceptance(tokens_per_step=1 + 6 / 4, by_position=(3 / 4, 2 / 4, 1 / 4))


def test_nothing_is_said_before_a_draft_was_verified(registry: CollectorRegistry) -> None:
    assert acceptance(samples(registry)) is None
    assert counted(registry, [[], []]) is None
