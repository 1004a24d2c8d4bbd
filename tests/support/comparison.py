# SPDX-License-Identifier: Apache-2.0
"""An engine's log-probabilities held against HF transformers: what the tests of both engines
share."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.support.hf_oracle import hf_logprobs, hf_margins

TOLERANCE = (
    2e-4  # measured differences between correct fp32 implementations: up to 5e-5 on |logit| ~ 10 (docs/model.md, 7)
)
# A choice (expert or entry) this close to a tie may fall either way in fp32: measured flips had
# margins up to 1.2e-5.
TIE_MARGIN = 3e-5
# Around every boundary: entries (4, 128), windows (128), state pages (4, 8), pages (64, 256),
# prefix blocks (256).
LENGTHS = (
    1,
    2,
    3,
    4,
    5,
    7,
    8,
    9,
    31,
    63,
    64,
    65,
    127,
    128,
    129,
    131,
    255,
    256,
    257,
    383,
    511,
    512,
    513,
    641,
    767,
    769,
    1023,
    1025,
    1100,
)
ROOT = Path(__file__).parents[2]
ENV_DIR = ROOT / ".env"
# Tests bind to loopback and reach no hub.
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def clean_environment() -> dict[str, str]:
    """The caller's environment without the variables that would change what is tested, and without
    a network."""
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith(("DSV4_", "VLLM_", "SGLANG_", "PYTEST_", "TRITON_"))
    }
    return kept | OFFLINE


def served(done: subprocess.CompletedProcess[str], model_class: str) -> dict[str, Any]:
    """What a driver printed, after making sure that it ended well and that our model served. Fails
    with the end of its log."""
    assert done.returncode == 0, done.stderr[-6000:]
    result = json.loads(done.stdout)
    for worker in result["workers"]:
        assert worker["model_class"] == model_class, worker
        assert worker["served_by_dsv4"], worker
    return result


def request(prompt: list[int], max_tokens: int = 4, prompt_logprobs: bool = True) -> dict[str, Any]:
    return {"prompt": prompt, "max_tokens": max_tokens, "prompt_logprobs": prompt_logprobs}


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
    """worst: largest difference before the first near-tie; compared, total: positions; lengths:
    context lengths compared."""

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
    """All compared positions within TOLERANCE, and at least the share `least` of all positions
    compared."""
    c = compare(result, oracle)
    print(f"worst {c.worst:.1e} over {c.compared} of {c.total} positions")
    assert c.worst <= TOLERANCE
    assert c.compared >= least * c.total
    return c
