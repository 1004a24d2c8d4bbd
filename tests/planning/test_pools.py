# SPDX-License-Identifier: Apache-2.0
"""Prefill and decode as two pools, against four published pairs that no fit has seen, and prefixes
in host memory, against bytes counted by hand.
"""

from __future__ import annotations

import pytest

from dsv4.errors import PlanError
from dsv4.machine.hardware import GIB, find_gpu
from dsv4.planning.deployment import find_checkpoint
from dsv4.planning.host_store import describe_store, host_store
from dsv4.planning.planner import Question, plan
from dsv4.planning.pools import Pair, Pools, describe_pools, pair_speed, parse_pools, plan_pools
from dsv4.planning.speed.work import Traffic

# Model, card, GPUs an engine, shape, draft, pools, requests, tok/s of a user, output tok/s a GPU.
# 64K in, 400 out, 90 % of the input cached; source: dynamo's recipes/deepseek-v4/README.md.
PUBLISHED = [
    ("pro", "h200", 8, "TP8", "none", "1P3D", 32, 50.5, 43.9),
    ("flash", "b200", 4, "TP4", "none", "4P2D", 320, 50.0, 388.3),
    ("flash", "h200", 4, "DP4 + EP", "mtp", "4P3D", 128, 51.8, 201.9),
    ("pro", "b200", 8, "TP8", "mtp", "1P1D", 28, 51.3, 77.3),
]


def question(model: str = "pro", gpu: str = "h200", count: int = 8, concurrency: int = 32) -> Question:
    return Question(
        checkpoint=find_checkpoint(model),
        gpu=find_gpu(gpu),
        count=count,
        nodes=1,
        context=86_016,
        engine="vllm",
        concurrency=concurrency,
    )


def pairs(q: Question, pools: Pools, shape: str, draft: str) -> list[Pair]:
    found = [p for p in plan_pools(q, pools) if p.decode.deployment.shape == shape]
    return [p for p in found if p.decode.deployment.speculation.method == draft]


def test_published_pairs_lie_where_the_answer_says_they_do():
    user, gpu = [], []
    for model, card, count, shape, draft, pools, requests, user_tok_s, gpu_tok_s in PUBLISHED:
        (pair,) = pairs(question(model, card, count, requests), parse_pools(pools), shape, draft)
        assert pair.works
        traffic = Traffic(input_tokens=65_536, output_tokens=400, cached=0.9, concurrency=requests)
        speed = pair_speed(pair, traffic)
        assert speed is not None
        assert not speed.one.waits
        outputs = 400 / (65_536 + 400)
        user.append(_off(user_tok_s, speed.one.user_tok_s.low, speed.one.user_tok_s.high))
        gpu.append(_off(gpu_tok_s, speed.gpu_tok_s.low * outputs, speed.gpu_tok_s.high * outputs))
    assert user == [0, 0, 0, pytest.approx(-0.05, abs=0.01)]
    assert gpu == [pytest.approx(0.35, abs=0.02), 0, 0, 0]
    said = " ".join(" ".join(describe_pools([(pair, speed)])).split())
    assert "for three and 5 % below it for one, tokens/s of a GPU for three and 35 % above it for one" in said


def _off(value: float, low: float, high: float) -> float:
    """How far outside low..high, as a share of the nearer end."""
    return value / high - 1 if value > high else value / low - 1 if value < low else 0


def test_a_decoder_takes_small_steps_so_it_holds_more():
    (pair,) = pairs(question(), Pools(prefill=1, decode=3), "TP8", "none")
    (alone,) = [c for c in plan(question()) if c.deployment.shape == "TP8" and not c.deployment.has_draft]
    assert pair.decode.deployment.max_num_batched_tokens < alone.deployment.max_num_batched_tokens
    assert pair.decode.proof.reserve_bytes < alone.proof.reserve_bytes
    assert pair.decode.proof.held_low > alone.proof.held_low


def test_the_slower_pool_limits():
    traffic = Traffic(input_tokens=65_536, output_tokens=400, concurrency=32)
    (few,) = pairs(question(), Pools(prefill=1, decode=3), "TP8", "none")
    (many,) = pairs(question(), Pools(prefill=6, decode=1), "TP8", "none")
    chat = Traffic(input_tokens=512, output_tokens=4096, concurrency=32)
    one, other = pair_speed(few, traffic), pair_speed(many, chat)
    assert one is not None
    assert other is not None
    assert (one.limited_by, other.limited_by) == ("prefill", "decode")


def test_pools_are_written_as_1p3d():
    assert parse_pools(" 2p1D") == Pools(prefill=2, decode=1)
    for wrong in ("1P", "0P1D", "p1d1", "1x3", "1P3D2"):
        with pytest.raises(PlanError, match="write 1P3D"):
            parse_pools(wrong)
    with pytest.raises(PlanError, match="a plan has at most"):
        plan_pools(question(), Pools(prefill=50, decode=50))


def test_a_plugin_card_is_told_that_it_refuses():
    q = Question(checkpoint=find_checkpoint("flash"), gpu=find_gpu("a100-80g"), count=8, nodes=1, context=65_536)
    said = " ".join(describe_pools([(p, None) for p in plan_pools(q, Pools(prefill=1, decode=1))]))
    assert "served by dsv4's plugin, which refuses" in said


def test_host_memory_keeps_what_it_holds():
    (c,) = [c for c in plan(question()) if c.deployment.shape == "TP8" and not c.deployment.has_draft]
    traffic = Traffic(input_tokens=8192, output_tokens=1024)
    store = host_store(c.proof, traffic, 100)
    assert store.prefix_bytes == 8 * c.proof.decoding_bytes  # TP8 repeats the one KV head on every rank
    assert store.prefixes == int(100 * GIB) // store.prefix_bytes
    assert store.miss_s is not None
    assert store.hit_s is not None
    assert store.hit_s.high < store.miss_s.low
    assert f"{store.prefixes:,} prefixes of 86,016 tokens" in describe_store("x", store)
    assert host_store(c.proof, traffic, 200).prefixes // 2 == store.prefixes
