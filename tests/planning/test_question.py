# SPDX-License-Identifier: Apache-2.0
"""What the checker asks and the probe answers survives JSON; anything else is refused."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from dsv4.planning.memory.proof import prove
from dsv4.planning.recipe.check import case_of, kv_question
from dsv4.planning.recipe.question import (
    Answer,
    BlockPools,
    BlockStage,
    Case,
    EngineAnswer,
    EngineQuestion,
    TokenPools,
    TokenStage,
    read_answer,
    read_question,
    to_json,
)
from dsv4.planning.recipe.schema import find_recipe

BLOCKS = BlockPools(
    in_flight_tokens=8192, stages=(BlockStage(block_bytes=3, request_bytes=30),), num_blocks=7, concurrency=0.5
)
TOKENS = TokenPools(stages=(TokenStage(bytes_per_full_token=1.5, fixed_bytes=2.0, full_tokens=256),))


@pytest.mark.parametrize(
    "name", ["h200-x8-pro-vllm-context-800k", "gb200-x8-pro-sglang-latency", "a100-80g-x8-flash-vllm-context"]
)
def test_a_question_survives_json(name):
    recipe = find_recipe(name)[0]
    question = EngineQuestion(engine=recipe.engine.name, cases=(case_of(recipe, id=name), Case(id="bare")))
    assert read_question(to_json(question)) == question


@pytest.mark.parametrize("kv", [BLOCKS, TOKENS, None])
def test_an_answer_survives_json(kv):
    answer = EngineAnswer(version="1", cases={"a": Answer(errors=("e",), kv=kv, kv_error=None if kv else "ValueError")})
    assert read_answer(to_json(answer)) == answer


def _raw_question() -> dict:
    d = find_recipe("h200-x8-pro-vllm-context-800k")[0].deployment()
    return json.loads(to_json(EngineQuestion(engine="vllm", cases=(Case(id="a", kv=kv_question(d, prove(d))),))))


@pytest.mark.parametrize("key", ["state", "pool_bytes", "head_dim", "swa_full_tokens_ratio"])
def test_a_missing_key_is_refused(key):
    raw = _raw_question()
    del raw["cases"][0]["kv"][key]
    with pytest.raises(ValidationError, match=key):
        read_question(json.dumps(raw))


@pytest.mark.parametrize("path", [(), ("cases", 0), ("cases", 0, "kv")])
def test_an_unknown_key_is_refused(path):
    raw = _raw_question()
    where = raw
    for part in path:
        where = where[part]
    where["newer"] = 1
    with pytest.raises(ValidationError, match="newer"):
        read_question(json.dumps(raw))


def test_a_value_of_another_type_is_refused():
    raw = _raw_question()
    raw["cases"][0]["kv"]["dp"] = "1"
    with pytest.raises(ValidationError, match="dp"):
        read_question(json.dumps(raw))


def test_an_answer_with_another_engines_pools_half_filled_is_refused():
    text = json.dumps({"version": "1", "cases": {"a": {"errors": [], "kv": {"stages": [{"block_bytes": 1}]}}}})
    with pytest.raises(ValidationError, match="request_bytes"):
        read_answer(text)
