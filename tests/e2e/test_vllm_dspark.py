# SPDX-License-Identifier: Apache-2.0
"""DSpark drafts in the real vLLM engine, on its second model runner in the Triton interpreter: what
is served does not depend on them, and they are what the reference proposes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dsv4.reference.draft import ReferenceDraft
from dsv4.reference.tiny import write_tiny
from tests.support.comparison import ENV_DIR, Oracle, assert_equal
from tests.support.draft_checks import compare_proposals, prompts, tokens, whole
from tests.support.hf_oracle import load_hf
from tests.support.vllm_engine import RUNNER_V2, engine_args, request, run

BLOCK = 5
FEW = (5, 63, 129, 330)
MANY = (1, 2, 3, 4, 62, 64, 66, 126, 127, 128, 130, 191, 254, 256, 258, 511, 513, 700)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("dspark") / "flash", "flash", draft="dspark", agree=True)


def drafting(folder: Path, **overrides: Any) -> dict[str, Any]:
    return engine_args(folder, speculative_config={"method": "dspark", "num_speculative_tokens": BLOCK}, **overrides)


def assert_drafted(result: dict[str, Any], folder: Path, least: int) -> None:
    """Every proposal that is no tie is the reference's, and at least so many are none."""
    found = compare_proposals(result, ReferenceDraft.from_folder(folder), BLOCK)
    assert found.other == []
    assert found.same >= least


def test_the_drafts_are_the_references_and_change_nothing(folder: Path, draft_text: list[int]) -> None:
    """Ragged prompts in chunks, then the same again, from what the prefix cache has kept; pages
    that nobody owns are NaN. A proposal after a chunk of a prompt counts too.
    """
    again = prompts(draft_text, FEW[1:], 7)
    engine = drafting(folder, max_num_batched_tokens=128, prefix_cache_retention_interval=256)
    result = run(engine, [again, again], RUNNER_V2, drafts=None, poison=True)
    assert_drafted(result, folder, 20)
    assert_equal(result, Oracle(load_hf(folder)), least=0.7)
    assert tokens(result)[:3] == tokens(result)[3:]
    assert [r["cached"] for r in result["phases"][1]] == [0, 0, 256]
    assert result["poisoned_pages"] > 0
    kept = result["accepted"]
    assert all(kept["kept_by_position"])
    assert kept["kept"] < kept["tokens"]


@pytest.mark.long
@pytest.mark.parametrize("version", ["0.32", "0.33"])
def test_every_accepted_length_at_every_edge(folder: Path, draft_text: list[int], version: str) -> None:
    """Drafts that are right up to every depth, at prompts around page ends and windows."""
    env = {"PYTHONPATH": str(ENV_DIR / "vllm-0.33.0")} if version == "0.33" else {}
    asked = prompts(draft_text, MANY, 24)
    alone = run(engine_args(folder), [asked], env)
    result = run(drafting(folder), [asked], RUNNER_V2 | env, drafts=whole(alone))
    assert tokens(result) == tokens(alone)
    assert_drafted(result, folder, 100)
    kept = lengths_kept(result)
    assert {n for n, _ in kept} == set(range(BLOCK + 1))
    for modulus in (4, 128):
        seen = {(n, at % modulus) for n, at in kept}
        assert len({phase for _, phase in seen}) > min(modulus, 40) // 2


def lengths_kept(result: dict[str, Any]) -> list[tuple[int, int]]:
    """How many drafts each verifying step kept, and the length of the sequence before it."""
    found, last = [], {}
    for row in result["drafts"]:
        key = row["request"]
        if key in last and len(row["before"]) > last[key]:
            found.append((len(row["before"]) - last[key] - 1, last[key]))
        last[key] = len(row["before"])
    return [(n, at) for n, at in found if n <= BLOCK]


@pytest.mark.long
@pytest.mark.parametrize("where", ["Pro", "packed pages", "two ranks"])
def test_dspark_changes_nothing_elsewhere(folder: Path, draft_text: list[int], where: str, tmp_path: Path) -> None:
    engine: dict[str, Any] = {
        "two ranks": {"tensor_parallel_size": 2},
        "packed pages": {"kv_cache_dtype": "fp8_ds_mla"},
    }.get(where, {})
    if where == "Pro":
        folder = write_tiny(tmp_path / "pro", "pro", draft="dspark", agree=True)
    few = [prompts(draft_text, FEW, 16)]
    without = run(engine_args(folder, **engine), few, RUNNER_V2)
    result = run(drafting(folder, **engine), few, RUNNER_V2)
    assert tokens(result) == tokens(without)
    assert all(result["accepted"]["kept_by_position"])


@pytest.mark.long
def test_blocks_replayed_from_graphs(folder: Path, draft_text: list[int]) -> None:
    """Verify steps of six tokens a request and the whole draft step, context rows and the choice of
    tokens included, are captured; the drafts that replays make are the reference's.
    """
    few = [
        [request(draft_text[-n:], 9, prompt_logprobs=False) for n in each] for each in ((1, 62, 126, 253), (3, 5, 9, 4))
    ]
    args = drafting(folder, max_num_batched_tokens=64, max_num_seqs=4, kv_cache_memory_bytes=64 << 20)
    asked = {"sizes": [6, 12, 24, 64], "mode": "FULL_AND_PIECEWISE"}
    env = RUNNER_V2 | {"VLLM_USE_BREAKABLE_CUDAGRAPH": "1"}
    result = run(args, few, env, graphs=asked, drafts=None)
    found = result["graphs"]
    assert found["different"] == [], found
    assert {"full 6", "full 12", "full 24"} <= set(found["replayed"])
    assert found["held"] == 0, "captures keep memory alive"
    assert_drafted(result, folder, 20)
    assert tokens(result) == tokens(run(args | {"speculative_config": None}, few))


MUTATIONS = {
    "an aux layer off by one": (
        "dsv4_vllm.model",
        "if number in self.aux_hidden_state_layers:",
        "if number + 1 in self.aux_hidden_state_layers:",
    ),
    "input of the aux layer": (
        "dsv4_vllm.model",
        "                outputs.append(mhc.post(streams).mean(1))",
        "                outputs.append(mhc.post(streams)[:, 0])",
    ),
    "draft rows kept as context": ("dsv4_vllm.dspark", "    if slots is None:\n", "    if slots is not None:\n"),
    "no Markov bias": (
        "dsv4_vllm.dspark",
        "return nn.functional.linear(markov_embed, self",
        "return 0 * nn.functional.linear(markov_embed, self",
    ),
    "a causal block": ("dsv4_vllm.dspark", "return [False for _", "return [True for _"),
    "a window one row short": ("dsv4.ops.plan.caches", "(start - self.window)", "(start - self.window + 1)"),
}


@pytest.mark.long
@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_is_seen(folder: Path, draft_text: list[int], name: str) -> None:
    """A draft that is computed wrongly serves the same tokens, so the proposals must tell."""
    engine = drafting(folder, max_num_batched_tokens=128)
    result = run(engine, [prompts(draft_text, (63, 140), 8)], RUNNER_V2, drafts=None, mutation=MUTATIONS[name])
    assert compare_proposals(result, ReferenceDraft.from_folder(folder), BLOCK).other
