# SPDX-License-Identifier: Apache-2.0
"""What SGLang's draft worker runs on a CPU is what its kernels do, and sampling does not depend on
what was drafted."""

from __future__ import annotations

import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from dsv4_sglang import draft_ops
from tests.support.comparison import ENV_DIR, ROOT
from tests.support.sglang_engine import environment

DRAWS = 10_000


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank, as SGLang says it in an engine."""
    monkeypatch.setattr(draft_ops, "get_parallel", lambda: SimpleNamespace(tp_size=1))


@pytest.mark.parametrize("version", ["installed", pytest.param("sglang-0.5.22", marks=pytest.mark.long)])
def test_each_is_what_sglangs_kernel_is(version: str) -> None:
    path = f"{ENV_DIR / version}:{ROOT}" if version != "installed" else str(ROOT)
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.sglang_draft_kernels"],
        capture_output=True, text=True, cwd="/", env=environment(TRITON_INTERPRET="1", PYTHONPATH=path), timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[-1] == "21"


def served(logits: Tensor, drafts: list[int], **sampling: Tensor) -> tuple[Tensor, Tensor]:
    """The first two tokens behind `DRAWS` equal requests, -1 where one was not reached. logits: [3,
    V], behind none, the first and the second draft.
    """
    n, vocab = logits.shape
    plain = {
        "temperatures": torch.ones(DRAWS, 1),
        "top_ks": torch.full((DRAWS,), vocab),
        "top_ps": torch.ones(DRAWS),
        "min_ps": torch.zeros(DRAWS),
    }
    info = SimpleNamespace(is_all_greedy=False, need_min_p_sampling=False, **plain | sampling)
    tokens = torch.tensor([0, *drafts]).repeat(DRAWS, 1)
    index = torch.arange(DRAWS * n).view(DRAWS, n)
    predicts, accepted, kept = torch.zeros(DRAWS * n), torch.full((DRAWS, n), -1), torch.empty(DRAWS)
    batch = SimpleNamespace(forward_mode=SimpleNamespace(is_idle=lambda: False), sampling_info=info)

    def engine(*args: object) -> None:
        none = torch.empty(0)
        draft_ops.verify(predicts, accepted, kept, tokens, index, none, none, torch.zeros_like(tokens))

    draft_ops.sample(engine, None, batch, SimpleNamespace(next_token_logits=logits.repeat(DRAWS, 1)))
    out = torch.where(accepted >= 0, predicts[accepted.clamp(min=0)], -1).long()
    return out[:, 0], out[:, 1]


def assert_drawn_from(tokens: Tensor, probs: Tensor) -> None:
    """Pearson's statistic is below the point that it exceeds once in a million, by
    Wilson and Hilferty's cube."""
    got, want = torch.bincount(tokens, minlength=len(probs)), probs * len(tokens)
    assert not got[want == 0].any()
    got, want = got[want > 0], want[want > 0]
    assert bool((want > 5).all())
    dof = len(want) - 1
    limit = dof * (1 - 2 / (9 * dof) + 4.753 * math.sqrt(2 / (9 * dof))) ** 3
    assert float(((got - want) ** 2 / want).sum()) < limit


@pytest.mark.parametrize("drafts", [[0, 1], [5, 5], [2, 3]])
def test_sampled_tokens_are_the_backbones_whatever_was_drafted(drafts: list[int]) -> None:
    torch.manual_seed(0)
    logits = 0.5 * torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    probs = logits.softmax(-1)
    first, second = served(logits, drafts)
    assert_drawn_from(first, probs[0])
    assert bool(((first == drafts[0]) == (second >= 0)).all())
    assert_drawn_from(second[second >= 0], probs[1])


def test_sampling_parameters_hold_for_each_row() -> None:
    torch.manual_seed(0)
    logits = 0.5 * torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    order = logits[0].argsort(descending=True)
    first, _ = served(logits, [0, 1], top_ks=torch.full((DRAWS,), 2), temperatures=torch.full((DRAWS, 1), 0.5))
    probs = torch.zeros(6)
    probs[order[:2]] = (2 * logits[0][order[:2]]).softmax(-1)
    assert_drawn_from(first, probs)


def test_a_greedy_request_beside_sampled_ones_is_greedy() -> None:
    """SGLang gives it top_k 1."""
    logits = 0.5 * torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    best = logits.argmax(-1).tolist()
    first, second = served(logits, best[:2], top_ks=torch.ones(DRAWS, dtype=torch.long))
    assert (first == best[0]).all()
    assert (second == best[1]).all()
