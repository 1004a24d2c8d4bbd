# SPDX-License-Identifier: Apache-2.0
"""The real vLLM engine against HF transformers in fp32, on every path that reads or writes a
cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.comparison import LENGTHS
from tests.support.vllm_engine import Oracle, assert_equal, compare, engine_args, request, run

WHOLE = 2048


def _prompts(text: list[int]) -> list[dict]:
    return [request(text[:n]) for n in LENGTHS]


@pytest.mark.parametrize("budget", [WHOLE, 200, 48, 16])
def test_flash_prompts_of_every_boundary_length_in_any_chunking(
    tiny_flash: Path, flash_oracle: Oracle, flash_text: list[int], budget: int
) -> None:
    """Whole and chunked prefill, eight ragged requests at a time."""
    result = run(engine_args(tiny_flash, max_num_batched_tokens=budget), [_prompts(flash_text)])
    assert_equal(result, flash_oracle, least=0.95)


@pytest.mark.parametrize("budget", [WHOLE, 200, 48, 16])
def test_pro_prompts_of_every_boundary_length_in_any_chunking(
    tiny_pro: Path, pro_oracle: Oracle, pro_text: list[int], budget: int
) -> None:
    result = run(engine_args(tiny_pro, max_num_batched_tokens=budget), [_prompts(pro_text)])
    assert_equal(result, pro_oracle, least=0.95)


def test_decoding_from_one_token_passes_every_length(tiny_flash: Path, flash_oracle: Oracle) -> None:
    """Eight requests start from one token each and decode to length 1100: each length is compared
    in at least one."""
    result = run(engine_args(tiny_flash), [[request([first], 1099, prompt_logprobs=False) for first in range(40, 48)]])
    c = assert_equal(result, flash_oracle, least=0.3)
    assert c.lengths >= set(range(1, 1100))


def test_the_comparison_sees_a_wrong_logprob(tiny_flash: Path, flash_oracle: Oracle, flash_text: list[int]) -> None:
    """The harness itself: a result that is off by one part in a thousand is caught."""
    want, _ = flash_oracle(flash_text[:40])
    output = {
        "prompt": flash_text[:30],
        "tokens": flash_text[30:40],
        "prompt_logprobs": want[:29].tolist(),
        "logprobs": want[29:].tolist(),
    }
    assert compare({"phases": [[output]]}, flash_oracle).worst < 1e-5
    output["logprobs"][3] += 1e-3
    assert compare({"phases": [[output]]}, flash_oracle).worst > 9e-4
