# SPDX-License-Identifier: Apache-2.0
"""Decode steps replayed from CUDA graphs equal the same steps run eagerly, bit for bit: SGLang's
own graph runner over tapes, on a CPU. What a tape is: `tests/support/tape.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.comparison import ENV_DIR, Oracle, assert_equal, request
from tests.support.sglang_engine import engine_args, run

# Of SGLang's own choice of sizes, those up to twelve running requests.
SIZES = [1, 2, 4, 8, 12]
# Contexts whose decoding crosses the window (128), the page (256), entries of both ratios, and the
# top-k of the tiny checkpoints (16 entries of 4 tokens).
LENGTHS = (1, 62, 126, 253, 60, 381, 30, 509, 5, 127, 250)


def graphs(folder: Path, text: list[int], **options: Any) -> dict[str, Any]:
    """Eleven requests that end one after another, so that every batch size decodes."""
    engine = engine_args(folder, max_running_requests=12, **options.pop("engine", {}))
    phase = [request(text[n : 2 * n], 5 + i, prompt_logprobs=False) for i, n in enumerate(LENGTHS)]
    return run(engine, [phase], graphs=SIZES, **options)


def assert_replayed(found: dict[str, Any]) -> None:
    assert found["different"] == [], found
    assert sorted(map(int, found["replayed"])) == SIZES
    assert found["captured"] == len(SIZES)
    assert found["held"] == 0, "captures keep memory alive"


@pytest.mark.parametrize("version", ["installed", pytest.param("0.5.22", marks=pytest.mark.long)])
def test_replayed_steps_equal_eager_ones(
    tiny_flash: Path, flash_oracle: Oracle, flash_text: list[int], version: str
) -> None:
    """In fp32 and plain rows, where they equal HF too."""
    folder = ENV_DIR / f"sglang-{version}"
    if version != "installed" and not (folder / ".unpacked").exists():
        pytest.skip(f"{folder} is missing; `make env` unpacks it")
    result = graphs(tiny_flash, flash_text, env={} if version == "installed" else {"PYTHONPATH": str(folder)})
    assert_replayed(result["counts"]["graphs"])
    assert_equal(result, flash_oracle)


@pytest.mark.long
def test_packed_pages_and_the_layers_of_pro(tiny_pro: Path, pro_text: list[int]) -> None:
    result = graphs(tiny_pro, pro_text, engine={"kv_cache_dtype": "fp8_e4m3"})
    assert_replayed(result["counts"]["graphs"])


@pytest.mark.long
def test_a_plan_of_another_step_is_seen(tiny_flash: Path, flash_text: list[int]) -> None:
    """A plan that is made before the capture stays that of the batch which was captured."""
    made = "self.plan = self._plan(forward_batch, self.context_len)"
    kept = (
        "self.plan = self.plan if self.plan and len(self.plan.window.lens) == forward_batch.batch_size"
        " else self._plan(forward_batch, self.context_len)"
    )
    result = graphs(tiny_flash, flash_text, mutation=["dsv4_sglang.metadata", made, kept])
    assert result["counts"]["graphs"]["different"]
