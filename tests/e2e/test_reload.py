# SPDX-License-Identifier: Apache-2.0
"""Weights replaced under a running engine: its answers are those of a fresh one, or the weights are
refused and it answers as before."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsv4.reference.tiny import write_tiny
from tests.support import sglang_engine, vllm_engine
from tests.support.bad_checkpoints import copy, set_config
from tests.support.comparison import request

PHASE = [request(list(range(3, 140)), 6), request([5, 6, 7, 8, 9], 6)]
W3, SCALE, TABLE = "layers.3.ffn.experts.5.w3.weight", "layers.2.attn.wq_b.scale", "layers.1.ffn.gate.tid2eid"


def numbers(phase: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [(o["tokens"], o["logprobs"], o["prompt_logprobs"]) for o in phase]


def rewrite(folder: Path, name: str, change: Any) -> None:
    """Put change(tensor) in the place of a tensor, or take it away where that is None."""
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            changed = change(tensors.pop(name))
            save_file(tensors | ({} if changed is None else {name: changed}), file)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the same config as tiny_flash, with other weights."""
    return write_tiny(tmp_path_factory.mktemp("reload") / "other", "flash", seed=7)


@pytest.fixture(scope="module")
def bad(tiny_flash: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    """Checkpoints that must be refused, and words of the refusal."""
    folder = tmp_path_factory.mktemp("bad")
    changes = {
        "missing": (lambda f: rewrite(f, W3, lambda t: None), f"{W3} is missing"),
        "dtype": (lambda f: rewrite(f, SCALE, lambda t: t.float()), f"{SCALE} has dtype F32"),
        "table": (lambda f: rewrite(f, TABLE, lambda t: torch.full_like(t, 8)), f"{TABLE} holds expert ids from 8"),
        "config": (set_config(routed_scaling_factor=9.0), "another routed_scaling_factor"),
    }
    return {name: (copy(tiny_flash, folder / name, change), words) for name, (change, words) in changes.items()}


def assert_serves_what_it_was_given_last(
    harness: ModuleType, args: dict[str, Any], other: dict[str, Any], good: list[dict], refused: list[tuple[dict, str]]
) -> None:
    """good: updates, to the same weights, to the other's, and so on.

    refused: updates, each with words of its refusal
    """
    updates = [*good, *(update for update, _ in refused)]
    numbered = {str(i + 1): update for i, update in enumerate(updates)}
    result = harness.run(args, [PHASE] * (1 + len(updates)), updates=numbered)
    fresh = numbers(harness.run(args | other, [PHASE])["phases"][0])
    first, *replaced = map(numbers, result["phases"])
    assert [success for success, _ in result["updates"]] == [True] * len(good) + [False] * len(refused), result[
        "updates"
    ]
    assert first != fresh
    assert replaced[: len(good)] == [first, fresh] * (len(good) // 2)
    after = zip(refused, result["updates"][len(good) :], replaced[len(good) :], strict=True)
    for (_, words), (_, message), phase in after:
        assert words in message
        assert phase == fresh


def test_sglang(tiny_flash: Path, other: Path, bad: dict[str, tuple[Path, str]]) -> None:
    """From disk, from tensors in buckets, and from another process."""
    good = [
        {"disk": str(tiny_flash)},
        {"disk": str(other)},
        {"tensors": str(tiny_flash), "buckets": 7},
        {"tensors": str(other), "buckets": 1},
        {"distributed": str(tiny_flash), "buckets": 3},
        {"distributed": str(other)},
    ]
    refused = [({"disk": str(folder)}, words) for folder, words in bad.values()]
    refused += [
        ({"disk": "/nowhere/at/all"}, "/nowhere/at/all"),
        ({"tensors": str(bad["dtype"][0])}, f"{SCALE} has dtype F32"),
        ({"distributed": str(bad["dtype"][0])}, f"{SCALE} has dtype F32"),
        ({"tensors": str(other), "without": [SCALE]}, f"wait for their weight or scale: {SCALE[:-5]}weight"),
    ]
    args = sglang_engine.engine_args(tiny_flash)
    assert_serves_what_it_was_given_last(sglang_engine, args, {"model_path": str(other)}, good, refused)


@pytest.mark.long
def test_sglang_with_some_of_the_weights(tiny_flash: Path, other: Path, tmp_path: Path) -> None:
    """A bucket that holds a few tensors replaces those: as a fresh engine on a checkpoint that has
    them."""
    some = ["layers.2.attn.wq_b.weight", SCALE, W3, W3.replace("weight", "scale"), "norm.weight", TABLE]
    mixed, theirs = copy(tiny_flash, tmp_path / "mixed", lambda f: None), {}
    for file in other.glob("*.safetensors"):
        theirs |= load_file(file)
    for name in some:
        rewrite(mixed, name, lambda _, name=name: theirs[name])
    args = sglang_engine.engine_args(tiny_flash)
    ways = [
        {"tensors": str(other), "only": some, "buckets": 2},
        {"disk": str(tiny_flash)},
        {"distributed": str(other), "only": some},
    ]
    result = sglang_engine.run(args, [PHASE] * 4, updates={str(i + 1): way for i, way in enumerate(ways)})
    assert [success for success, _ in result["updates"]] == [True] * 3, result["updates"]
    fresh = numbers(sglang_engine.run(args | {"model_path": str(mixed)}, [PHASE])["phases"][0])
    first, *replaced = map(numbers, result["phases"])
    assert first != fresh
    assert replaced == [fresh, first, fresh]


def test_vllm(tiny_flash: Path, other: Path, bad: dict[str, tuple[Path, str]]) -> None:
    """By reload_weights, from disk and from a list of tensors."""
    good = [{"disk": str(tiny_flash)}, {"disk": str(other)}, {"tensors": str(tiny_flash)}, {"tensors": str(other)}]
    refused = [({"disk": str(folder)}, words) for folder, words in bad.values()]
    refused += [
        ({"disk": "/nowhere/at/all"}, "/nowhere/at/all"),
        ({"tensors": str(bad["dtype"][0])}, f"{SCALE} has dtype F32"),
        ({"tensors": str(other), "without": [SCALE]}, f"{SCALE} is missing"),
    ]
    args = vllm_engine.engine_args(tiny_flash)
    assert_serves_what_it_was_given_last(vllm_engine, args, {"model": str(other)}, good, refused)
