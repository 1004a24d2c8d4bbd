# SPDX-License-Identifier: Apache-2.0
"""DSV4_CHECK=1 in the real engines: a sound step passes, and a bad slot ends in a message with its
layer and request."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

from dsv4.ops import check
from tests.support import sglang_engine, vllm_engine
from tests.support.bad_checkpoints import copy, edit_tensors
from tests.support.comparison import Oracle, assert_equal, request

CHECKED = {"DSV4_CHECK": "1"}
CHECKED_OPS = {
    "attention.norm_rope_store",
    "attention.sparse",
    "compressor.save_state",
    "compressor.update",
    *check.RULES,
}  # by type, and by name
# Entries of the second request of a step go where no page is.
BAD_SLOT = [
    "dsv4.ops.plan.caches",
    "_slots(page, entry % rows_per_page, rows_per_page), -1)",
    "_slots(page, entry % rows_per_page, rows_per_page) + (tokens.request_of_token == 1) * (1 << 20), -1)",
]
ENGINES = {"vllm": (vllm_engine, "summary.compress"), "sglang": (sglang_engine, "compressor.update")}


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> tuple[ModuleType, str]:
    """An engine, and its operator that stores entries."""
    return ENGINES[request.param]


def test_a_sound_run_is_not_bothered(
    engine: tuple[ModuleType, str], tiny_flash: Path, flash_oracle: Oracle, flash_text: list[int]
) -> None:
    module, _ = engine
    result = module.run(module.engine_args(tiny_flash), [[request(flash_text[:n], 6) for n in (150, 9)]], env=CHECKED)
    assert_equal(result, flash_oracle)
    reasons = {op: choice["reason"] for worker in result["workers"] for op, choice in worker["ops"].items()}
    assert {"attention.norm_rope_store", "attention.sparse", "indexer.logits", "indexer.topk"} < set(reasons)
    assert {op for op, reason in reasons.items() if reason.endswith("; checked")} == set(reasons) & CHECKED_OPS, reasons


def test_a_bad_slot_is_reported_with_its_layer_and_request(
    engine: tuple[ModuleType, str], tiny_flash: Path, flash_text: list[int]
) -> None:
    """Layer 2 is the first that stores entries."""
    module, op = engine
    done = module.start(
        module.engine_args(tiny_flash), [[request(flash_text[:n], 6) for n in (150, 9)]], env=CHECKED, mutation=BAD_SLOT
    )
    assert done.returncode != 0
    message = rf"OpInputError: {re.escape(op)} in model\.layers\.2\.attn: slot out of range at request 1, token \d+, place 0: 1\d{{6}}"
    assert re.search(message, done.stderr), done.stderr[-6000:]


@pytest.mark.parametrize("checked", [True, False])
def test_nan_is_noticed_in_the_layer_that_made_it(
    engine: tuple[ModuleType, str], tiny_flash: Path, tmp_path: Path, checked: bool
) -> None:
    """One ue8m0 scale of 255, which is NaN, as a damaged download may hold."""

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors["layers.2.attn.wkv.scale"].view(torch.uint8)[0, 0] = 255

    module, _ = engine
    folder = copy(tiny_flash, tmp_path / "nan", edit_tensors(damage))
    done = module.start(module.engine_args(folder), [[request([5, 6, 7], 2)]], env=CHECKED if checked else {})
    assert (done.returncode == 0) == (not checked), done.stderr[-4000:]
    words = "NotFiniteError: attention of model.layers.2: NaN or infinite at request 0, token 0"
    assert (words in done.stderr) == checked, done.stderr[-6000:]
