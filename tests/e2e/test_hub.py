# SPDX-License-Identifier: Apache-2.0
"""A checkpoint named by its hub id, as in every recipe, is looked at as closely as a folder."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
from safetensors.torch import load_file, save_file

from tests.support import sglang_engine, vllm_engine
from tests.support.bad_checkpoints import copy
from tests.support.comparison import Oracle, assert_equal, request
from tests.support.hub import loopback_hub

ENGINES = pytest.mark.parametrize(
    ("harness", "argument"), [(vllm_engine, "model"), (sglang_engine, "model_path")], ids=["vllm", "sglang"]
)
# One piece each of a fused expert, of a fused linear, and of the scales of another.
GONE = ("layers.3.ffn.experts.5.w3.weight", "layers.2.ffn.shared_experts.w1.weight", "layers.4.attn.wkv.scale")


def remove(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()  # it would promise what is gone
    for file in folder.glob("*.safetensors"):
        save_file({name: tensor for name, tensor in load_file(file).items() if name not in GONE}, file)


@ENGINES
def test_each_tensor_that_is_missing_is_named(
    harness: ModuleType, argument: str, tiny_flash: Path, tmp_path: Path
) -> None:
    folder = copy(tiny_flash, tmp_path / "gone", remove)
    with loopback_hub({"tests/tiny": folder}, tmp_path / "home") as env:
        args = harness.engine_args(folder) | {argument: "tests/tiny"}
        done = harness.start(args, [[request([5, 6, 7], 2)]], env)
    assert done.returncode != 0, done.stdout[-2000:]
    for name in GONE:
        assert f"{name} is missing" in done.stderr, done.stderr[-4000:]


@ENGINES
def test_a_whole_checkpoint_is_served(
    harness: ModuleType, argument: str, tiny_flash: Path, flash_oracle: Oracle, flash_text: list[int], tmp_path: Path
) -> None:
    with loopback_hub({"tests/tiny": tiny_flash}, tmp_path / "home") as env:
        args = harness.engine_args(tiny_flash) | {argument: "tests/tiny"}
        assert_equal(harness.run(args, [[request(flash_text[:150])]], env), flash_oracle)
