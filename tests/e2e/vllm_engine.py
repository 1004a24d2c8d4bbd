# SPDX-License-Identifier: Apache-2.0
"""Run a plan in the real engine, and hold its log-probabilities against HF transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_oracle import hf_logprobs, hf_margins

TOLERANCE = 2e-4  # measured differences between correct fp32 implementations: up to 5e-5 on |logit| ~ 10 (spec section 9)
# A choice (expert or entry) this close to a tie may fall either way in fp32: measured flips had margins up to 1.2e-5.
TIE_MARGIN = 3e-5
DRIVER = Path(__file__).with_name("vllm_driver.py")
ENV_DIR = Path(__file__).parents[2] / ".env"
# Tests bind to loopback and reach no hub; a stray variable of the caller must not change what is tested.
BASE_ENV = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "OMP_NUM_THREADS": "1",
}
RUNNER_V2 = {"VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}


def environment(**extra: str) -> dict[str, str]:
    """The environment of a child process: the caller's without DSV4_*, VLLM_* and PYTEST_* variables, then ours."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("DSV4_", "VLLM_", "PYTEST_", "TRITON_"))}
    return kept | BASE_ENV | extra


def engine_args(folder: Path, **overrides: Any) -> dict[str, Any]:
    """LLM arguments for a tiny checkpoint in fp32."""
    return {
        "model": str(folder), "dtype": "float32", "max_model_len": 1200, "max_num_batched_tokens": 200, "max_num_seqs": 8,
        "kv_cache_memory_bytes": 512 << 20,
    } | overrides  # fmt: skip


def request(prompt: list[int], max_tokens: int = 4, prompt_logprobs: bool = True) -> dict[str, Any]:
    return {"prompt": prompt, "max_tokens": max_tokens, "prompt_logprobs": prompt_logprobs}


def run(engine: dict[str, Any], phases: list[list[dict[str, Any]]], env: dict[str, str] | None = None, **options: Any) -> dict[str, Any]:
    """Run `phases` in a fresh engine process. Fails with the end of its log when it does not exit 0."""
    plan = {"engine": engine, "phases": phases, **options}
    done = subprocess.run(
        [sys.executable, str(DRIVER)], input=json.dumps(plan), capture_output=True, text=True, env=environment(**(env or {})), timeout=900
    )
    assert done.returncode == 0, done.stderr[-6000:]
    result = json.loads(done.stdout)
    for worker in result["workers"]:
        assert worker["model_class"] == "dsv4_vllm.model.DeepseekV4ForCausalLM", worker
    return result


@dataclass
class Oracle:
    """HF's log-probabilities and choice margins, remembered per sequence."""

    model: Any
    seen: dict[tuple[int, ...], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __call__(self, ids: list[int]) -> tuple[Tensor, Tensor]:
        key = tuple(ids)
        if key not in self.seen:
            logprobs = hf_logprobs(self.model, ids)
            chosen = logprobs[:-1].gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1)
            self.seen[key] = chosen, hf_margins(self.model, ids)
        return self.seen[key]


@dataclass(frozen=True)
class Comparison:
    """worst: largest difference before the first near-tie; compared, total: positions; lengths: context lengths compared."""

    worst: float
    compared: int
    total: int
    lengths: frozenset[int]


def compare(result: dict[str, Any], oracle: Oracle) -> Comparison:
    """Every log-probability the engine gave against HF's, up to each sequence's first near-tie.

    From a near-tie on, two correct implementations may have chosen differently and stay different.
    """
    worst, compared, total, lengths = 0.0, 0, 0, set()
    for output in (o for phase in result["phases"] for o in phase):
        ids, n = output["prompt"] + output["tokens"], len(output["prompt"])
        want, margins = oracle(ids)
        ties = (margins[:-1] < TIE_MARGIN).nonzero()
        end = int(ties[0]) if len(ties) else len(want)
        got = dict(enumerate(output["prompt_logprobs"] or []))  # position -> log-probability of the next token
        got |= {n - 1 + i: value for i, value in enumerate(output["logprobs"])}
        for position, value in got.items():
            total += 1
            if position < end:
                compared += 1
                lengths.add(position + 1)
                worst = max(worst, abs(value - float(want[position])))
    return Comparison(worst, compared, total, frozenset(lengths))


def assert_equal(result: dict[str, Any], oracle: Oracle, least: float = 0.8) -> Comparison:
    """All compared positions within TOLERANCE, and at least the share `least` of all positions compared."""
    c = compare(result, oracle)
    print(f"worst {c.worst:.1e} over {c.compared} of {c.total} positions")
    assert c.worst <= TOLERANCE
    assert c.compared >= least * c.total
    return c
