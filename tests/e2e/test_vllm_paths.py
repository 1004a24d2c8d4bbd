# SPDX-License-Identifier: Apache-2.0
"""The real vLLM engine against HF transformers in fp32, cache hits, preemption, NaN, several ranks,
other runners and versions."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsv4.reference.tiny import TinyDims, write_tiny
from tests.support.hf_oracle import load_hf, prompt_without_ties
from tests.support.vllm_engine import ENV_DIR, RUNNER_V2, TIE_MARGIN, Oracle, assert_equal, engine_args, request, run


def test_prefix_cache_hits_equal_cold_runs(tiny_flash: Path, flash_oracle: Oracle, flash_text: list[int]) -> None:
    """Hits of 256, 512, 768 and 1024 tokens, each continued differently; unowned pages are NaN."""
    first = [request(flash_text[:1030], 8, prompt_logprobs=False)]
    again = [
        request(flash_text[:n] + flash_text[30 : 30 + k], 12, prompt_logprobs=False)
        for n, k in ((300, 5), (513, 40), (800, 1), (1024, 3))
    ]
    # vLLM keeps only the last boundary of a prompt by default; here every 256th token, so that
    # every kind of hit occurs.
    result = run(engine_args(tiny_flash, prefix_cache_retention_interval=256), [first, again], poison=True)
    assert [o["cached"] for o in result["phases"][0]] == [0]
    assert [o["cached"] for o in result["phases"][1]] == [256, 512, 768, 1024]
    assert_equal(result, flash_oracle)


def test_preempted_requests_resume_exactly(tiny_flash: Path, flash_oracle: Oracle, flash_text: list[int]) -> None:
    """A pool too small for eight growing requests: some are preempted and recomputed; unowned pages
    are NaN."""
    prompts = [request(flash_text[40 * i : 40 * i + 20 + 10 * i], 250, prompt_logprobs=False) for i in range(8)]
    engine = engine_args(tiny_flash, max_model_len=512, max_num_batched_tokens=32, kv_cache_memory_bytes=24 << 20)
    result = run(engine, [prompts], poison=True)
    assert result["preemptions"] > 0
    assert result["poisoned_pages"] > 0
    assert_equal(result, flash_oracle, least=0.5)


def test_nan_in_unowned_pages_changes_nothing(tiny_pro: Path, pro_oracle: Oracle, pro_text: list[int]) -> None:
    """Without prefix caching every free page is poisoned before every step, so each page starts its
    life as NaN."""
    prompts = [request(pro_text[:n], 30) for n in (1, 3, 70, 129, 260, 400, 515, 700)]
    result = run(
        engine_args(tiny_pro, max_num_batched_tokens=48, enable_prefix_caching=False),
        [prompts, prompts[:3]],
        poison=True,
    )
    assert result["poisoned_pages"] > 0
    assert_equal(result, pro_oracle)


@pytest.mark.parametrize(
    "expert_parallel", [False, pytest.param(True, marks=pytest.mark.long)], ids=["sliced experts", "whole experts"]
)
def test_two_tensor_parallel_ranks_equal_one(
    tiny_flash: Path, flash_oracle: Oracle, flash_text: list[int], expert_parallel: bool
) -> None:
    engine = engine_args(tiny_flash, tensor_parallel_size=2, enable_expert_parallel=expert_parallel)
    prompts = [request(flash_text[:n], 8) for n in (1, 65, 130, 400, 700)]
    result = run(engine, [prompts], env={"VLLM_ENABLE_V1_MULTIPROCESSING": "1"})
    assert [w["rank"] for w in result["workers"]] == [0, 1]
    assert_equal(result, flash_oracle)


@pytest.mark.long
def test_ranks_that_share_the_index_scan_equal_one_that_does_not(tiny_flash: Path, flash_text: list[int]) -> None:
    """Over gloo, and to the last bit: each token is scored by one rank alone."""
    engine = engine_args(tiny_flash, tensor_parallel_size=2, max_num_batched_tokens=128)
    prompts = [request(flash_text[:n], 8) for n in (1, 5, 130, 700)]
    env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    each = [run(engine, [prompts], env=env | {"DSV4_SHARE_INDEX": share})["phases"] for share in ("on", "off")]
    assert each[0] == each[1]


def test_model_runner_v2_equals_hf(tiny_flash: Path, flash_oracle: Oracle, flash_text: list[int]) -> None:
    """The runner GPU users get, here through the Triton interpreter."""
    prompts = [request(flash_text[:n], 6) for n in (1, 64, 129, 300, 520)]
    result = run(engine_args(tiny_flash), [prompts], env=RUNNER_V2)
    assert result["workers"][0]["model_runner"].startswith(
        "vllm.v1.worker.cpu.model_runner."
    )  # V1's is cpu_model_runner
    assert_equal(result, flash_oracle)


@pytest.fixture(scope="module")
def five_hashed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint whose first five layers of six choose experts by token id."""
    folder = tmp_path_factory.mktemp("stages") / "five-hashed"
    return write_tiny(folder, "flash", dims=TinyDims(num_hash_layers=5))


def test_two_pipeline_stages_equal_one(five_hashed: Path) -> None:
    """On model runner V2, which gives token ids to the first stage alone: layers 3 and 4 get them
    from there. V1 cannot run stages on a CPU, with any model. Other cuts are refused."""
    oracle = Oracle(load_hf(five_hashed))
    text = prompt_without_ties(oracle.model, 130, margin=TIE_MARGIN)
    engine = engine_args(five_hashed, pipeline_parallel_size=2)
    env = RUNNER_V2 | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_PP_LAYER_PARTITION": "3,3"}
    result = run(engine, [[request(text[:n], 3) for n in (5, 130)]], env=env)
    assert len(result["workers"]) == 2
    assert_equal(result, oracle)


def test_vllm_0_33_equals_hf(tiny_flash: Path, flash_oracle: Oracle, flash_text: list[int]) -> None:
    """The newest supported version, from its unpacked wheel in front of the installed one."""
    folder = ENV_DIR / "vllm-0.33.0"
    if not (folder / ".unpacked").exists():
        pytest.skip(f"{folder} is missing; `make env` unpacks it")
    prompts = [request(flash_text[:n], 6) for n in (1, 64, 129, 257, 700)]
    again = [request([*flash_text[:600], 5, 6, 7], 6, prompt_logprobs=False)]
    result = run(engine_args(tiny_flash), [prompts, again], env={"PYTHONPATH": str(folder)})
    assert result["workers"][0]["engine_version"].startswith("0.33.")
    assert result["phases"][1][0]["cached"] == 512
    assert_equal(result, flash_oracle)
