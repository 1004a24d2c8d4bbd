# SPDX-License-Identifier: Apache-2.0
"""A decode step of the real engines launches, per layer, no more of our kernels than
docs/kernels.md says.

Only what layers launch is counted, without what a step builds once; see
`tests/ops/test_launches.py` for which they are.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support import sglang_engine, vllm_engine
from tests.support.comparison import request
from tests.support.launches import assert_decode_limits

IDS = random.Random(0)


def prompts(*lens: int) -> list[list[dict[str, Any]]]:
    return [[request([IDS.randrange(100, 250) for _ in range(n)], max_tokens=3, prompt_logprobs=False) for n in lens]]


@pytest.fixture
def long_selection(tiny_flash: Path, tmp_path: Path) -> Path:
    """The tiny checkpoint, choosing 128 entries: with the window enough keys for attention to be
    split and joined."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_flash, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"index_topk": 128}))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("state", ["summary", "paged"])
def test_vllm(long_selection: Path, state: str) -> None:
    """An eager step lists the entries it has, so that attention is split in CSA layers only."""
    engine = vllm_engine.engine_args(long_selection, max_model_len=512)
    env = {"DSV4_OPS": "triton", "DSV4_STATE": state, "TRITON_INTERPRET": "1"}
    launches = vllm_engine.run(engine, prompts(12, 9), env=env, launches=True)["launches"]
    assert_decode_limits(launches, requests=2, split={"csa"})


@pytest.mark.slow
def test_sglang(long_selection: Path) -> None:
    engine = sglang_engine.engine_args(long_selection, context_length=512, max_total_tokens=2048)
    result = sglang_engine.run(
        engine, prompts(12, 9), env={"DSV4_OPS": "triton", "TRITON_INTERPRET": "1"}, launches=True
    )
    assert_decode_limits(result["counts"]["launches"], requests=2, split={"csa"})
