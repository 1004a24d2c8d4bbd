# SPDX-License-Identifier: Apache-2.0
"""MTP drafts in the real vLLM engine: what is served does not depend on them, and they are what the
block makes of the backbone's streams.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv4.reference.draft import ReferenceDraft
from dsv4.reference.tiny import write_tiny
from tests.support.comparison import ENV_DIR, LENGTHS, TOLERANCE, Oracle, assert_equal, compare
from tests.support.draft_checks import compare_proposals, prompts, tokens, whole
from tests.support.vllm_engine import RUNNER_V2, engine_args, request, run, start

NEW = 24  # tokens a request: six entries of CSA, and most prompts cross a boundary
FEW = (2, 5, 63, 127, 129, 255, 257, 511)
Alone = Callable[[tuple[int, ...]], dict[str, Any]]


def drafting(folder: Path, k: int, **overrides: Any) -> dict[str, Any]:
    return engine_args(folder, speculative_config={"method": "mtp", "num_speculative_tokens": k}, **overrides)


@pytest.fixture(scope="module")
def alone(agreeing_flash: Path, draft_text: list[int]) -> Alone:
    """The same requests without drafts."""

    @functools.cache
    def served(lengths: tuple[int, ...]) -> dict[str, Any]:
        return run(engine_args(agreeing_flash), [prompts(draft_text, lengths, NEW)])

    return served


@pytest.mark.parametrize(
    ("k", "lengths", "state"),
    [
        (3, FEW, "summary"),
        pytest.param(1, FEW, "paged", marks=pytest.mark.long),
        *(
            pytest.param(k, LENGTHS, state, marks=pytest.mark.long)
            for k in (1, 2, 3, 4, 5, 6, 7)
            for state in ("paged", "summary")
        ),
    ],
)
def test_greedy_tokens_are_those_without_drafts(
    agreeing_flash: Path,
    agreeing_oracle: Oracle,
    draft_text: list[int],
    alone: Alone,
    k: int,
    lengths: tuple[int, ...],
    state: str,
) -> None:
    """Drafts that are right up to every depth, at lengths around a boundary."""
    env = {"DSV4_STATE": state}
    result = run(drafting(agreeing_flash, k), [prompts(draft_text, lengths, NEW)], env, drafts=whole(alone(lengths)))
    assert tokens(result) == tokens(alone(lengths))
    assert_equal(result, agreeing_oracle, least=0.7)  # sequences end at their first near-tie
    kept = result["accepted"]
    assert kept["drafts"] > 2 * len(lengths)
    assert 0 < kept["kept"] < kept["tokens"]
    assert all(kept["kept_by_position"])


@pytest.mark.long
def test_without_the_rows_that_are_kept_log_probabilities_are_wrong(
    agreeing_flash: Path, agreeing_oracle: Oracle, draft_text: list[int], alone: Alone
) -> None:
    """The control: summaries of the rows before the drafts, taken for those of all rows."""
    mutation = (
        "dsv4.ops.compressor.summary.reference",
        "torch.where(resumes, state.kept.since[page], start)",
        "start",
    )
    env, asked = {"DSV4_STATE": "summary"}, [prompts(draft_text, FEW, NEW)]
    result = run(drafting(agreeing_flash, 3), asked, env, drafts=whole(alone(FEW)), mutation=mutation)
    assert compare(result, agreeing_oracle).worst > 2 * TOLERANCE


def test_the_blocks_own_drafts_are_the_references(agreeing_flash: Path, draft_text: list[int], alone: Alone) -> None:
    """Whole prompts alone: vLLM's first runner drafts after a chunk from the token at the prompt's
    end. A draft is compared where the reference's choice is no tie.
    """
    few = [r for r in prompts(draft_text, FEW, NEW) if len(r["prompt"]) in (2, 5, 127, 129, 257)]
    result = run(drafting(agreeing_flash, 2, max_num_batched_tokens=2048), [few], drafts=whole(alone(FEW)))
    found = compare_proposals(result, ReferenceDraft.from_folder(agreeing_flash), 2)
    assert found.other == []
    assert found.same > 40


def test_drafts_survive_hits_and_poison(agreeing_flash: Path, draft_text: list[int], alone: Alone) -> None:
    """Twice the same prompts, with NaN in pages that nobody owns. A hit is at most a page
    shorter than without drafts, whose rows depend on the token after them.
    """
    lengths = (63, 129, 511, 800)
    again = prompts(draft_text, lengths, NEW)
    engine = drafting(agreeing_flash, 3, max_num_batched_tokens=128, prefix_cache_retention_interval=256)
    result = run(engine, [again, again], drafts=whole(alone(lengths)), poison=True)
    assert tokens(result) == tokens(alone(lengths)) * 2
    assert [r["cached"] for r in result["phases"][1]] == [0, 0, 256, 512]
    assert result["poisoned_pages"] > 0


@pytest.mark.long
@pytest.mark.parametrize("where", ["two ranks", "packed pages", "the next vLLM"])
def test_drafts_change_nothing_elsewhere(agreeing_flash: Path, draft_text: list[int], where: str) -> None:
    engine: dict[str, Any] = {
        "two ranks": {"tensor_parallel_size": 2},
        "packed pages": {"kv_cache_dtype": "fp8_ds_mla"},
    }.get(where, {})
    env = {"PYTHONPATH": str(ENV_DIR / "vllm-0.33.0")} if where == "the next vLLM" else {}
    few = [prompts(draft_text, FEW, NEW)]
    without = run(engine_args(agreeing_flash, **engine), few, env)
    result = run(drafting(agreeing_flash, 2, **engine), few, env)
    assert tokens(result) == tokens(without)
    assert all(result["accepted"]["kept_by_position"])


@pytest.mark.long
def test_preempted_requests_resume_with_drafts(
    agreeing_flash: Path, agreeing_oracle: Oracle, draft_text: list[int]
) -> None:
    """A pool too small for eight growing requests, whose pages are NaN before they are theirs."""
    growing = [request(draft_text[40 * i : 40 * i + 20 + 10 * i], 200, prompt_logprobs=False) for i in range(8)]
    engine = {"max_model_len": 512, "max_num_batched_tokens": 32, "kv_cache_memory_bytes": 24 << 20}
    result = run(drafting(agreeing_flash, 3, **engine), [growing], poison=True)
    assert result["preemptions"] > 0
    assert result["poisoned_pages"] > 0
    assert all(result["accepted"]["kept_by_position"])
    assert_equal(result, agreeing_oracle, least=0.5)


@pytest.mark.long
@pytest.mark.parametrize("k", [1, 3])
def test_pro_with_drafts(draft_text: list[int], tmp_path: Path, k: int) -> None:
    folder = write_tiny(tmp_path / "pro", "pro", agree=True)
    few = [prompts(draft_text, FEW, NEW)]
    without = run(engine_args(folder), few)
    result = run(drafting(folder, k, kv_cache_dtype="auto"), few, drafts=whole(without))
    assert tokens(result) == tokens(without)
    assert all(result["accepted"]["kept_by_position"])


@pytest.mark.long
def test_sampled_tokens_follow_the_targets_distribution(
    agreeing_flash: Path, agreeing_oracle: Oracle, draft_text: list[int]
) -> None:
    """10,000 seeds at temperature 1: pairs of the first two tokens, the second of which a draft was
    held against. Cells that 5 draws are not expected in are one. Pearson's statistic of a right
    sampler exceeds the quantile for its degrees of freedom once in 10,000 runs; seeds are fixed.
    """
    prompt = draft_text[:12]
    expected = pair_probabilities(agreeing_oracle, prompt)
    asked = [
        {"prompt": prompt, "max_tokens": 2, "prompt_logprobs": False, "temperature": 1, "seed": seed}
        for seed in range(DRAWS)
    ]
    engine = drafting(agreeing_flash, 2, max_num_seqs=100, max_num_batched_tokens=1200)
    result = run(engine, [asked])
    assert 0 < result["accepted"]["kept"] < result["accepted"]["tokens"]
    pairs = [(r["tokens"][0], r["tokens"][1]) for r in result["phases"][0]]
    assert false_alarm(pairs, expected) > 1e-4
    # The test can fail: had the draft been kept always, the second token would be its choice.
    first = torch.tensor([a for a, _ in pairs])
    assert false_alarm(list(zip(first.tolist(), ((first + 7) % 512).tolist(), strict=True)), expected) < 1e-9


DRAWS = 10_000


def pair_probabilities(oracle: Oracle, prompt: list[int]) -> torch.Tensor:
    """Of the first two tokens after a prompt, by HF: [V, V]."""
    vocab = oracle.model.config.vocab_size
    with torch.inference_mode():
        first = oracle.model(torch.tensor([prompt])).logits[0, -1].double().softmax(-1)
        both = torch.tensor([[*prompt, token] for token in range(vocab)])
        second = torch.cat([oracle.model(part).logits[:, -1] for part in both.split(64)]).double().softmax(-1)
    return first[:, None] * second


def false_alarm(pairs: list[tuple[int, int]], expected: torch.Tensor) -> float:
    """The share of right samplers that differ at least so much, by Pearson's statistic."""
    vocab = expected.shape[0]
    at = torch.tensor([a * vocab + b for a, b in pairs])
    seen, wanted = at.bincount(minlength=vocab * vocab).double(), len(pairs) * expected.flatten()
    cell = wanted >= 5
    seen, wanted = (torch.cat([x[cell], x[~cell].sum()[None]]) for x in (seen, wanted))
    statistic = ((seen - wanted).square() / wanted).sum()
    return float(torch.special.gammaincc(torch.tensor((len(wanted) - 1) / 2).double(), statistic / 2))


@pytest.mark.long
@pytest.mark.parametrize("with_eager", [False, True])
def test_verify_and_draft_steps_replayed_from_graphs(
    agreeing_flash: Path, draft_text: list[int], with_eager: bool
) -> None:
    """Runner V2 captures steps of three tokens a request, and the draft's own steps. A replayed
    verify step equals an eager one bit for bit; a replayed draft step that did not would change
    how many drafts are kept.
    """
    few = [
        [request(draft_text[-n:], 9, prompt_logprobs=False) for n in each] for each in ((1, 62, 126, 253), (3, 5, 9, 4))
    ]
    args = drafting(agreeing_flash, 2, max_num_batched_tokens=64, max_num_seqs=4, kv_cache_memory_bytes=64 << 20)
    asked = {"sizes": [3, 6, 9, 12, 24, 64], "mode": "FULL_AND_PIECEWISE"}
    result = run(args, few, RUNNER_V2 | {"VLLM_USE_BREAKABLE_CUDAGRAPH": "1"}, graphs=asked)
    found = result["graphs"]
    assert found["different"] == [], found
    assert {"full 3", "full 6", "full 12"} <= set(found["replayed"])
    assert any(name.startswith("piecewise") for name in found["replayed"])
    assert found["held"] == 0, "captures keep memory alive"
    assert tokens(result) == tokens(run(args | {"speculative_config": None}, few))
    assert all(result["accepted"]["kept_by_position"])
    if with_eager:
        assert result["accepted"] == run(args, few, RUNNER_V2)["accepted"]


def test_other_drafts_are_refused(agreeing_flash: Path) -> None:
    speculative = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
    done = start(engine_args(agreeing_flash, speculative_config=speculative), [[request([5], 1)]])
    assert done.returncode != 0
    assert "method ngram, but the checkpoint" in done.stderr
