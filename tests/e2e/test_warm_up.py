# SPDX-License-Identifier: Apache-2.0
"""What the real engines launch, with their own tensors, is what the warm-up of their caches
compiles: by Triton's key for sm80.

The launches run in the interpreter, in the engine's process. A prompt of several chunks, one token
to prefill, decoding, requests side by side and a prefix hit between them meet every kind of step.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests.support import sglang_engine, vllm_engine
from tests.support.comparison import request

KERNELS = {"DSV4_OPS": "triton", "TRITON_INTERPRET": "1"}
IDS = random.Random(0)
# Launched in every step of a model that has all three kinds of layer.
ALWAYS = {
    "attend_kernel", "norm_rope_store_kernel", "prepare_query_kernel", "topk_kernel", "decode_logits_kernel",
    "prefill_logits_kernel", "post_project_kernel", "pre_kernel", "head_kernel", "swiglu_kernel",
}  # fmt: skip


def prompts() -> list[list[dict[str, Any]]]:
    first = [IDS.randrange(100, 250) for _ in range(40)]
    return [
        [request(first, max_tokens=2, prompt_logprobs=False), request(first[:9], max_tokens=3, prompt_logprobs=False)],
        [request(first[:1], max_tokens=2, prompt_logprobs=False)],
    ]


def assert_warm(found: dict[str, Any], pooling: str) -> None:
    assert set(found["kernels"]) >= ALWAYS | {pooling}
    assert found["cold"] == []


@pytest.mark.long
@pytest.mark.parametrize(("state", "pooling"), [("summary", "summary_kernel"), ("paged", "compress_store_kernel")])
def test_vllm(tiny_flash: Path, state: str, pooling: str) -> None:
    engine = vllm_engine.engine_args(tiny_flash, max_model_len=512, max_num_batched_tokens=24, kv_cache_dtype="fp8")
    env = KERNELS | vllm_engine.RUNNER_V2 | {"DSV4_STATE": state}
    assert_warm(vllm_engine.run(engine, prompts(), env=env, variants=True)["variants"], pooling)


@pytest.mark.long
def test_sglang(tiny_flash: Path) -> None:
    engine = sglang_engine.engine_args(tiny_flash, context_length=512, max_total_tokens=2048)
    result = sglang_engine.run(engine, prompts(), env=KERNELS, variants=True)
    assert_warm(result["counts"]["variants"], "compress_store_kernel")
