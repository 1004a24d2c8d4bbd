# SPDX-License-Identifier: Apache-2.0
"""bf16, as GPUs serve it, through the whole engine: no further from fp32 than HF transformers' own
bf16.

bf16 carries 8 bits, so nothing can be compared value by value. What this catches is a path that
does not run in bf16 or loses much more than bf16 does. Measured mean errors against HF's fp32: HF's
bf16 0.076, vLLM 0.049, SGLang 0.050. It does not see one operator in the wrong precision: mixing
weights in bf16 give 0.054. The operators' own tests do.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.support import sglang_engine, vllm_engine
from tests.support.comparison import Oracle, request
from tests.support.hf_oracle import hf_logprobs, load_hf

draw = random.Random(0)
PROMPTS = [[draw.randrange(100, 400) for _ in range(length)] for length in (300, 150, 9)]
PHASES = [[request(prompt, max_tokens=1) for prompt in PROMPTS]]


def chosen(logprobs: Tensor, prompt: list[int]) -> Tensor:
    return logprobs[:-1].float().gather(1, torch.tensor(prompt[1:])[:, None]).squeeze(1)


@pytest.fixture(scope="module")
def exact(flash_oracle: Oracle) -> Tensor:
    return torch.cat([flash_oracle(prompt)[0] for prompt in PROMPTS])


@pytest.fixture(scope="module")
def hf_error(tiny_flash: Path, exact: Tensor) -> float:
    model = load_hf(tiny_flash, torch.bfloat16)
    return float((torch.cat([chosen(hf_logprobs(model, p), p) for p in PROMPTS]) - exact).abs().mean())


@pytest.mark.parametrize("engine", [vllm_engine, sglang_engine], ids=["vllm", "sglang"])
def test_bf16_is_no_further_from_fp32_than_hf_in_bf16(
    engine: object, tiny_flash: Path, exact: Tensor, hf_error: float
) -> None:
    outputs = engine.run(engine.engine_args(tiny_flash, dtype="bfloat16"), PHASES)["phases"][0]  # type: ignore[attr-defined]
    error = float((torch.cat([torch.tensor(o["prompt_logprobs"]) for o in outputs]) - exact).abs().mean())
    print(f"mean error {error:.4f}, HF {hf_error:.4f}")
    assert 0.01 * hf_error < error <= hf_error  # an error near nothing would mean that fp32 ran
