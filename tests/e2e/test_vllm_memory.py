# SPDX-License-Identifier: Apache-2.0
"""vLLM's memory profile takes what a step takes, and lets go of what vLLM takes back."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.vllm_engine import RUNNER_V2, engine_args, request, run


@pytest.mark.parametrize("mapping", ["summary", "paged"])
def test_the_profile_takes_what_a_step_takes(tiny_flash: Path, mapping: str) -> None:
    """In every kind of layer, in prefill, mixed and decode steps; what exceeds it would be missing
    from the KV pool at the first long prompt."""
    engine = engine_args(tiny_flash, max_num_batched_tokens=48, kv_cache_dtype="fp8_ds_mla")
    prompts = [request(list(range(3, 3 + n)), 3, prompt_logprobs=False) for n in (150, 40, 7)]
    result = run(engine, [prompts], env=RUNNER_V2 | {"DSV4_STATE": mapping}, memory=True)
    assert result["still_held"] == []
    calls = result["memory"]
    assert {call["kind"] for call in calls} == {"swa", "csa", "hca"}
    assert max(call["tokens"] for call in calls) == 48
    short = [call for call in calls if any(p < s for p, s in zip(call["profile"], call["step"], strict=True))]
    assert not short, short[:3]
