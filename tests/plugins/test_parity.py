# SPDX-License-Identifier: Apache-2.0
"""One checkpoint, one set of prompts, two engines: the same parameters and the same
log-probabilities."""

from __future__ import annotations

import pytest

from dsv4.model.config import V4Config
from dsv4.reference.tiny import write_tiny
from tests.support import sglang_engine, vllm_engine
from tests.support.comparison import TIE_MARGIN, TOLERANCE, Oracle, assert_equal, request
from tests.support.hf_oracle import load_hf, prompt_without_ties


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = write_tiny(tmp_path_factory.mktemp("parity") / "tiny-pro", "pro", seed=1)
    oracle = Oracle(load_hf(folder))
    text = prompt_without_ties(oracle.model, 600, margin=TIE_MARGIN)
    phases = [[request(text[:n], 8) for n in (1, 5, 128, 261, 600)]]
    return {
        "folder": folder,
        "oracle": oracle,
        "vllm": vllm_engine.run(vllm_engine.engine_args(folder), phases, mapping=True),
        "sglang": sglang_engine.run(sglang_engine.engine_args(folder), phases, mapping=True),
    }


def test_both_load_every_tensor_into_the_same_parameter_and_shard(results: dict) -> None:
    maps = [sorted(map(tuple, results[engine]["counts"]["mapped"]), key=str) for engine in ("vllm", "sglang")]
    assert maps[0] == maps[1]
    config = V4Config.from_path(results["folder"])
    experts = 6 * config.n_routed_experts * config.num_hidden_layers  # weight and scale of w1, w2 and w3
    assert sum(".experts." in name for name, _, _ in maps[0]) == experts


def test_both_models_have_the_same_parameters(results: dict) -> None:
    assert results["vllm"]["counts"]["parameters"] == results["sglang"]["counts"]["parameters"]


def test_both_give_the_same_log_probabilities(results: dict) -> None:
    for engine in ("vllm", "sglang"):
        assert_equal(results[engine], results["oracle"])
    for a, b in zip(results["vllm"]["phases"][0], results["sglang"]["phases"][0], strict=True):
        assert a["prompt"] == b["prompt"]
        assert a["tokens"] == b["tokens"]
        ours, theirs = (o["prompt_logprobs"] + o["logprobs"] for o in (a, b))
        assert max(abs(x - y) for x, y in zip(ours, theirs, strict=True)) <= TOLERANCE
