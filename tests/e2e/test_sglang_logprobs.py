# SPDX-License-Identifier: Apache-2.0
"""The real SGLang engine against HF transformers in fp32, on every path that reads or writes a
cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dsv4.model.kv_layout import IndexFormat
from tests.support.comparison import ENV_DIR, LENGTHS, Oracle, assert_equal, compare, request
from tests.support.replay import assert_equals_quantised_reference
from tests.support.sglang_engine import engine_args, run


def _prompts(text: list[int]) -> list[dict]:
    return [request(text[:n]) for n in LENGTHS]


@pytest.mark.parametrize("chunk", [48, 16])
def test_flash_prompts_of_every_boundary_length_in_any_chunking(
    tiny_flash: Path, flash_oracle: Oracle, flash_text: list[int], chunk: int
) -> None:
    """Eight ragged requests at a time, in chunks that end anywhere in a page. Chunks of 512 tokens:
    the test after the next."""
    result = run(engine_args(tiny_flash), [_prompts(flash_text)], chunk=chunk)
    assert result["counts"]["largest_prefill"] == chunk
    assert_equal(result, flash_oracle, least=0.95)


@pytest.mark.parametrize("chunk", [512, 48, 16])
def test_pro_prompts_of_every_boundary_length_in_any_chunking(
    tiny_pro: Path, pro_oracle: Oracle, pro_text: list[int], chunk: int
) -> None:
    result = run(engine_args(tiny_pro), [_prompts(pro_text)], chunk=chunk)
    assert result["counts"]["largest_prefill"] == chunk
    assert_equal(result, pro_oracle, least=0.95)


def test_flash_in_chunks_of_512_with_prefix_hits_and_unowned_memory_full_of_nan(
    tiny_flash: Path, flash_oracle: Oracle, flash_text: list[int]
) -> None:
    """Whole prompts, then radix hits of 256, 512, 768 and 1024 tokens continued differently, then
    decoding over page ends."""
    first = [request(flash_text[:1030], 8, prompt_logprobs=False)]
    again = [
        request(flash_text[:n] + flash_text[30 : 30 + k], 12, prompt_logprobs=False)
        for n, k in ((300, 5), (513, 40), (800, 1), (1024, 3))
    ]
    long = [request([first], 262, prompt_logprobs=False) for first in range(40, 44)]
    result = run(
        engine_args(tiny_flash, max_total_tokens=8192), [_prompts(flash_text), first, again, long], poison=True
    )
    assert result["counts"]["largest_prefill"] == 512
    assert result["counts"]["poisoned_pages"] > 0
    assert [o["cached"] for o in result["phases"][2]] == [256, 512, 768, 1024]
    c = assert_equal(result, flash_oracle, least=0.8)
    assert c.lengths >= set(range(1, 1100))


def test_decoding_passes_every_length(tiny_flash: Path, flash_oracle: Oracle, flash_text: list[int]) -> None:
    """Sixteen requests decode 140 tokens each, from prompts 70 apart: each length is compared in at
    least one."""
    prompts = [request(flash_text[: 70 * i + 1], 140, prompt_logprobs=False) for i in range(16)]
    result = run(engine_args(tiny_flash, max_running_requests=16), [prompts])
    c = assert_equal(result, flash_oracle, least=0.8)
    assert c.lengths >= set(range(1, 1150))


def test_without_a_prefix_cache_every_free_page_is_nan(tiny_pro: Path, pro_oracle: Oracle, pro_text: list[int]) -> None:
    """So each page starts its life as NaN."""
    prompts = [request(pro_text[:n], 30) for n in (1, 3, 70, 129, 260, 400, 515, 700)]
    result = run(engine_args(tiny_pro, disable_radix_cache=True), [prompts, prompts[:3]], chunk=48, poison=True)
    assert result["counts"]["poisoned_pages"] > 0
    assert_equal(result, pro_oracle)


def test_without_overlap_scheduling_a_conversation_goes_on_from_the_cache(
    tiny_flash: Path, flash_oracle: Oracle, flash_text: list[int]
) -> None:
    """Each turn is the turn before, its answer and more; prompts and answers of the second are
    found again."""
    turns = [flash_text[:290], flash_text[:600], flash_text[:900]]
    result = run(
        engine_args(tiny_flash, disable_overlap_schedule=True),
        [[request(turn, 8, prompt_logprobs=False), request(turn[1:], 4)] for turn in turns],
    )
    assert [phase[0]["cached"] for phase in result["phases"]] == [0, 256, 512]
    assert_equal(result, flash_oracle)


def test_retracted_requests_resume_exactly(tiny_flash: Path, flash_oracle: Oracle, flash_text: list[int]) -> None:
    """A pool too small for eight growing requests, which SGLang was told to admit all the same."""
    prompts = [request(flash_text[40 * i : 40 * i + 20 + 10 * i], 250, prompt_logprobs=False) for i in range(8)]
    engine = engine_args(
        tiny_flash,
        context_length=512,
        max_total_tokens=2560,
        swa_full_tokens_ratio=1.0,
        chunked_prefill_size=256,
        schedule_conservativeness=0.0,
    )
    result = run(engine, [prompts], poison=True)
    assert result["retractions"] > 0
    assert_equal(result, flash_oracle, least=0.5)


@pytest.mark.parametrize(
    "ep_size", [1, pytest.param(2, marks=pytest.mark.long)], ids=["sliced experts", "whole experts"]
)
def test_two_tensor_parallel_ranks_equal_one(
    tiny_pro: Path, pro_oracle: Oracle, pro_text: list[int], ep_size: int
) -> None:
    """Over gloo: heads, experts and vocabulary are sharded, caches are not."""
    result = run(
        engine_args(tiny_pro, tp_size=2, ep_size=ep_size), [[request(pro_text[:n], 8) for n in (1, 65, 130, 400, 700)]]
    )
    assert [w["rank"] for w in result["workers"]] == [0, 1]
    assert_equal(result, pro_oracle)


@pytest.mark.long
def test_ranks_that_share_the_index_scan_equal_one_that_does_not(tiny_pro: Path, pro_text: list[int]) -> None:
    """Over gloo, and to the last bit: each token is scored by one rank alone."""
    prompts = [request(pro_text[:n], 8) for n in (1, 5, 130, 700)]
    each = [
        run(engine_args(tiny_pro, tp_size=2), [prompts], env={"DSV4_SHARE_INDEX": share})["phases"]
        for share in ("on", "off")
    ]
    assert each[0] == each[1]


def test_sglang_0_5_22_equals_hf(tiny_flash: Path, flash_oracle: Oracle, flash_text: list[int]) -> None:
    """The oldest supported version, from its unpacked wheel in front of the installed one."""
    folder = ENV_DIR / "sglang-0.5.22"
    if not (folder / "sglang").is_dir():
        pytest.skip(f"{folder} is missing; `make env` unpacks it")
    again = [request([*flash_text[:600], 5, 6, 7], 6, prompt_logprobs=False)]
    prompts = [request(flash_text[:n], 6, prompt_logprobs=n < 700) for n in (1, 64, 129, 257, 700)]
    result = run(engine_args(tiny_flash), [prompts, again], env={"PYTHONPATH": str(folder)})
    assert result["workers"][0]["engine_version"] == "0.5.22"
    assert result["phases"][1][0]["cached"] == 512
    assert_equal(result, flash_oracle)


@pytest.mark.parametrize(
    ("variant", "chunk", "index"),
    [("flash", 48, "fp8"), ("flash", 512, "fp8"), ("pro", 48, "fp8"), ("pro", 512, "fp8"), ("flash", 200, "mxfp4")],
)
def test_packed_pages_equal_the_quantised_reference(
    variant: str,
    chunk: int,
    index: str,
    tmp_path: Path,
    tiny_flash: Path,
    tiny_pro: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """fp8_ds_mla rows and index keys, code for code. See `replay`. SGLang refuses mxfp4 keys on
    this machine; here it may not."""
    folder = {"flash": tiny_flash, "pro": tiny_pro}[variant]
    record = tmp_path / "recorded.pt"
    engine = engine_args(
        folder, max_running_requests=1, kv_cache_dtype="fp8_e4m3", enable_deepseek_v4_fp4_indexer=index == "mxfp4"
    )
    prompt = torch.randint(3, 259, (515,), generator=torch.Generator().manual_seed(7)).tolist()
    result = run(engine, [[request(prompt, 12)]], record=str(record), chunk=chunk, allow_fp4_indexer=True)
    assert (result["workers"][0]["kv_format"], result["workers"][0]["index_format"]) == ("fp8_ds_mla", index)
    assert_equals_quantised_reference(result["phases"][0][0], record, folder, monkeypatch, IndexFormat(index))


MUTATIONS = {
    "the open window is not kept": (
        "dsv4.ops.plan.rings",
        "keep = tokens.valid & _outlives(",
        "keep = ~tokens.valid & _outlives(",
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_is_seen(tiny_flash: Path, flash_oracle: Oracle, flash_text: list[int], name: str) -> None:
    """Mistakes that only the rings can make."""
    result = run(engine_args(tiny_flash), [[request(flash_text[:302], 12)]], mutation=MUTATIONS[name])
    assert compare(result, flash_oracle).worst > 4e-4
