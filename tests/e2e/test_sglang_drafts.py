# SPDX-License-Identifier: Apache-2.0
"""MTP drafts in the real SGLang engine, by its own EAGLE worker: what is served does not depend on
them, and they are what the block makes of the backbone's streams.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsv4.reference.draft import ReferenceDraft
from dsv4.reference.tiny import write_tiny
from tests.support.comparison import ENV_DIR, LENGTHS, TIE_MARGIN, Oracle, assert_equal, request
from tests.support.draft_checks import prompts, tokens, whole
from tests.support.hf_oracle import hf_logprobs
from tests.support.sglang_engine import engine_args, run

NEW = 24  # tokens a request: six entries of CSA, and most prompts cross a boundary
FEW = (2, 5, 63, 127, 129, 255, 257, 511)
Alone = Callable[..., dict[str, Any]]


def drafting(folder: Path, k: int, **overrides: Any) -> dict[str, Any]:
    return engine_args(folder, speculative_algorithm="NEXTN", speculative_num_steps=k, **overrides)


def kept(result: dict[str, Any]) -> list[int]:
    return [number for _, number in result["counts"]["drafts"]["kept"]]


@pytest.fixture(scope="module")
def alone(agreeing_flash: Path, draft_text: list[int]) -> Alone:
    """The same requests without drafts."""

    @functools.cache
    def served(lengths: tuple[int, ...], new: int = NEW) -> dict[str, Any]:
        return run(engine_args(agreeing_flash), [prompts(draft_text, lengths, new)])

    return served


def test_greedy_tokens_are_hfs_whatever_is_kept(
    agreeing_flash: Path, agreeing_oracle: Oracle, draft_text: list[int]
) -> None:
    """The block's own drafts, chunked prompts, then the same prompts from the cache, and NaN in
    memory that nobody owns.
    """
    again = prompts(draft_text, (5, 126, 255, 300), 10)
    result = run(drafting(agreeing_flash, 2, chunked_prefill_size=256), [again, again], poison=True, watch_drafts=True)
    assert result["counts"]["poisoned_pages"] > 0
    assert set(kept(result)) == {0, 1, 2}
    assert [r["cached"] for r in result["phases"][1]] == [0, 0, 0, 256]
    assert tokens(result)[:4] == tokens(result)[4:]
    assert_equal(result, agreeing_oracle, least=0.7)  # sequences end at their first near-tie
    for ids, prompt in zip(whole(result)[:4], again, strict=True):
        logits = hf_logprobs(agreeing_oracle.model, ids)
        margins = agreeing_oracle(ids)[1]
        for at in range(len(prompt["prompt"]) - 1, len(ids) - 1):
            if margins[: at + 1].min() < TIE_MARGIN:
                break
            assert ids[at + 1] == int(logits[at].argmax())


@pytest.mark.long
@pytest.mark.parametrize("k", range(1, 8))
def test_greedy_tokens_are_those_without_drafts(
    agreeing_flash: Path, agreeing_oracle: Oracle, draft_text: list[int], alone: Alone, k: int
) -> None:
    """Drafts that are right up to every depth, at lengths around a boundary, 8 ragged requests at a
    time; from every position mod 4 each.
    """
    result = run(drafting(agreeing_flash, k), [prompts(draft_text, LENGTHS, NEW)], drafts=whole(alone(LENGTHS)))
    assert tokens(result) == tokens(alone(LENGTHS))
    assert_equal(result, agreeing_oracle, least=0.7)
    met = {(length % 4, number) for length, number in result["counts"]["drafts"]["kept"]}
    assert met == {(phase, number) for phase in range(4) for number in range(k + 1)}


@pytest.mark.long
def test_the_blocks_own_drafts_are_the_references(agreeing_flash: Path, draft_text: list[int], alone: Alone) -> None:
    """Whole prompts and chunked ones. Compared where the reference's choice is no tie."""
    result = run(
        drafting(agreeing_flash, 3, chunked_prefill_size=256), [prompts(draft_text, FEW, NEW)], drafts=whole(alone(FEW))
    )
    reference, compared = ReferenceDraft.from_folder(agreeing_flash), 0
    for row in result["counts"]["drafts"]["rows"]:
        if row["before"] is None:
            continue
        want = reference.propose(row["before"], 3)
        gaps = want.logits.topk(2).values.diff(dim=-1).abs()[:, 0]
        if bool((gaps > 1e-3).all()):
            assert row["own"] == want.tokens
            compared += 1
    assert compared > 40


@pytest.mark.long
def test_drafts_survive_hits_and_poison(agreeing_flash: Path, draft_text: list[int], alone: Alone) -> None:
    """From the cache twice, at every page end, with NaN in pages that nobody owns."""
    lengths = (63, 129, 256, 257, 511, 513, 800)
    again = prompts(draft_text, lengths, NEW)
    result = run(drafting(agreeing_flash, 3), [again, again], drafts=whole(alone(lengths)), poison=True, chunk=48)
    assert tokens(result) == tokens(alone(lengths)) * 2
    # A row of the draft depends on the token behind it, so a page is the same only with that token.
    assert [r["cached"] for r in result["phases"][1]] == [(n - 2) // 256 * 256 for n in lengths]
    assert result["counts"]["poisoned_pages"] > 0


@pytest.mark.long
def test_retracted_requests_resume_exactly(
    agreeing_flash: Path, agreeing_oracle: Oracle, draft_text: list[int]
) -> None:
    """A pool too small for eight growing requests, which SGLang was told to admit all the same."""
    grown = [request(draft_text[40 * i : 40 * i + 20 + 10 * i], 250, prompt_logprobs=False) for i in range(8)]
    small: dict[str, Any] = {
        "context_length": 512,
        "max_total_tokens": 2560,
        "swa_full_tokens_ratio": 1.0,
        "chunked_prefill_size": 256,
        "schedule_conservativeness": 0.0,
    }
    truth = run(engine_args(agreeing_flash, context_length=512), [grown])
    result = run(drafting(agreeing_flash, 2, **small), [grown], poison=True, drafts=whole(truth))
    assert result["retractions"] > 0
    assert tokens(result) == tokens(truth)
    assert set(kept(result)) == {0, 1, 2}


@pytest.mark.long
@pytest.mark.parametrize("where", ["two ranks", "packed pages", "checked", "the previous SGLang"])
def test_drafts_change_nothing_elsewhere(agreeing_flash: Path, draft_text: list[int], where: str) -> None:
    engine: dict[str, Any] = {
        "two ranks": {"tp_size": 2},
        "packed pages": {"kv_cache_dtype": "fp8_e4m3"},
    }.get(where, {})
    env = {
        "the previous SGLang": {"PYTHONPATH": str(ENV_DIR / "sglang-0.5.22")},
        "checked": {"DSV4_CHECK": "1"},
    }.get(where, {})
    few = [prompts(draft_text, FEW, NEW)]
    without = run(engine_args(agreeing_flash, **engine), few, env)
    result = run(drafting(agreeing_flash, 2, **engine), few, env, watch_drafts=True)
    assert tokens(result) == tokens(without)
    assert set(kept(result)) == {0, 1, 2}


@pytest.mark.long
def test_kernels_verify_drafts_too(agreeing_flash: Path, agreeing_oracle: Oracle, draft_text: list[int]) -> None:
    """In Triton's interpreter: steps of five tokens a request, on rings of three windows."""
    engine = drafting(agreeing_flash, 4, context_length=512, max_total_tokens=4096)
    env = {"DSV4_OPS": "triton", "TRITON_INTERPRET": "1"}
    asked = [request(draft_text[:n], 8, prompt_logprobs=False) for n in (76, 9)]
    result = run(engine, [asked], env=env, interpret=True, watch_drafts=True)
    impls = {op: choice["impl"] for worker in result["workers"] for op, choice in worker["ops"].items()}
    assert {impl for op, impl in impls.items() if op != "moe.experts"} == {"triton"}, impls
    assert len(set(kept(result))) > 1
    assert_equal(result, agreeing_oracle, least=0.7)


@pytest.mark.long
def test_pro_drafts_too(tmp_path: Path, draft_text: list[int]) -> None:
    """HCA from the first layer on, and a window of drafts longer than a CSA window."""
    pro = write_tiny(tmp_path / "tiny", "pro", agree=True)
    few = [prompts(draft_text, FEW, NEW)]
    without = run(engine_args(pro), few)
    result = run(drafting(pro, 5), few, drafts=whole(without))
    assert tokens(result) == tokens(without)
    assert set(kept(result)) == set(range(6))


@pytest.mark.long
def test_rings_without_drafts_in_mind_give_other_tokens(tiny_flash: Path, flash_text: list[int]) -> None:
    """On a checkpoint whose next token hangs on the whole context."""
    asked = [request(flash_text[-n:], NEW, prompt_logprobs=False) for n in LENGTHS]
    without = run(engine_args(tiny_flash), [asked])
    right = run(drafting(tiny_flash, 7), [asked], drafts=whole(without))
    assert tokens(right) == tokens(without)
    broken = ["dsv4_sglang.metadata", "drafted = self.pool.drafted", "drafted = 0"]
    wrong = run(drafting(tiny_flash, 7), [asked], drafts=whole(without), mutation=broken)
    assert tokens(wrong) != tokens(without)
