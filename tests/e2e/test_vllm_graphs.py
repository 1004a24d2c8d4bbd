# SPDX-License-Identifier: Apache-2.0
"""Steps replayed from CUDA graphs equal the same steps run eagerly, bit for bit: vLLM's own graph
machinery over tapes, on a CPU. What a tape is: `tests/support/tape.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.vllm_engine import ENV_DIR, RUNNER_V2, engine_args, request, run

GRAPHS = RUNNER_V2 | {"VLLM_USE_BREAKABLE_CUDAGRAPH": "1"}
# Sizes as vLLM chooses them are further apart than these; all batches of up to nine requests, those
# between sizes too, and mixed steps.
SIZES = [1, 2, 4, 8, 12, 24, 64]
MAX_SEQS = 9
# Contexts whose decoding crosses the window (128), the page (256), entries of both ratios, and the
# top-k of the tiny checkpoints (16 entries of 4 tokens).
LENGTHS = (1, 62, 126, 253, 60, 381, 30, 509, 5)


def workload() -> list[list[dict[str, Any]]]:
    """Nine requests that end one after another, so that every batch size decodes; then short ones
    that arrive while others decode, and steps of 17 and 10 tokens."""

    def ids(start: int, n: int) -> list[int]:
        return [(start * 37 + 11 * i + i * i) % 500 + 3 for i in range(n)]

    first = [request(ids(n, n), 4 + i, prompt_logprobs=False) for i, n in enumerate(LENGTHS)]
    mixed = [request(ids(n, 4 * n), 3 + n % 5, prompt_logprobs=False) for n in range(1, 13)]
    few, fewer = ([request(ids(n, n), 2, prompt_logprobs=False) for n in each] for each in ((5, 3, 9), (4, 6)))
    return [first, mixed, few, fewer]


def graphs(folder: Path, *, mode: str = "FULL_AND_PIECEWISE", **options: Any) -> dict[str, Any]:
    engine = {
        "max_model_len": 1100,
        "max_num_batched_tokens": 64,
        "max_num_seqs": MAX_SEQS,
        "kv_cache_memory_bytes": 48 << 20,
    }
    args = engine_args(folder, **engine | options.pop("engine", {}))
    env = GRAPHS | options.pop("env", {})
    result = run(args, workload(), env=env, graphs={"sizes": SIZES, "mode": mode}, **options)
    found: dict[str, Any] = result["graphs"]
    return found


def assert_replayed(found: dict[str, Any]) -> None:
    """Every size that decoding and mixed steps need was replayed, and nothing differed."""
    assert found["different"] == [], found
    full = {int(name.split()[1]) for name in found["replayed"] if name.startswith("full")}
    mixed = {int(name.split()[1]) for name in found["replayed"] if name.startswith("piecewise")}
    assert full == {size for size in SIZES if size <= MAX_SEQS + 3} - {12}, found["replayed"]
    assert {12, 24, 64} <= mixed, found["replayed"]
    assert found["held"] == 0, "captures keep memory alive"


@pytest.mark.parametrize(
    ("mapping", "pages"), [("summary", "fp8_ds_mla"), pytest.param("paged", "auto", marks=pytest.mark.long)]
)
def test_replayed_steps_equal_eager_ones(tiny_flash: Path, mapping: str, pages: str) -> None:
    found = graphs(tiny_flash, env={"DSV4_STATE": mapping}, engine={"kv_cache_dtype": pages})
    assert_replayed(found)


@pytest.mark.long
def test_the_layers_of_pro_in_the_next_vllm(tiny_pro: Path) -> None:
    found = graphs(tiny_pro, env={"PYTHONPATH": str(ENV_DIR / "vllm-0.33.0")}, engine={"kv_cache_dtype": "fp8_ds_mla"})
    assert_replayed(found)


# What each mutation makes of `attend`, which looks like vLLM's own wrapper in every case.
WRAPPED = "self.attend = eager_break_during_capture(self._attend_in_step)"
NO_BREAK = "self.attend = torch.no_grad()(self._attend_in_step)"
IN_A_CONTAINER = (
    "self.attend = (lambda at: torch.no_grad()(lambda **tensors: at(tensors)))"
    "(eager_break_during_capture(lambda tensors: self._attend_in_step(**tensors)))"
)


def test_a_lost_break_is_seen(tiny_flash: Path) -> None:
    """What vLLM 0.32 did to a method that was decorated before its variable was set: a mixed step
    repeats the attention of the batch that was captured."""
    found = graphs(tiny_flash, mutation=["dsv4_vllm.model", WRAPPED, NO_BREAK])
    assert any(what.startswith("piecewise") for what in found["different"]), found


@pytest.mark.long
def test_memory_that_a_container_keeps_is_seen(tiny_flash: Path) -> None:
    """vLLM lets go of tensors among a break's arguments, and of nothing else."""
    assert graphs(tiny_flash, mutation=["dsv4_vllm.model", WRAPPED, IN_A_CONTAINER])["held"] > 0
