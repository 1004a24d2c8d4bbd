# SPDX-License-Identifier: Apache-2.0
"""What both engines make of the recipes' own command lines on the recipes' own cards, which are not
here: see `fake_gpu` and `fake_gpu_sglang`. One process per engine version resolves them all, dsv4's
hooks active, up to where a device would be touched; asserted is what the engine reads."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from dsv4.model.kv_layout import KvFormat
from dsv4.planning.launch import commands, deployment_commands
from dsv4.planning.recipe.schema import Recipe, shipped_recipes
from tests.support.comparison import ENV_DIR, ROOT, clean_environment

PROGRAMS = {"vllm": "tests.support.fake_gpu", "sglang": "tests.support.fake_gpu_sglang"}
VERSIONS = [("vllm", ""), ("vllm", "vllm-0.33.0"), ("sglang", ""), ("sglang", "sglang-0.5.22")]
# SGLang's own sizes of decode graphs (cuda_graph_hook.py) up to the largest that recipes ask for.
SGLANG_SIZES = [1, 2, 4, 8, 12, 16, 24, 32]
# A default launch, no recipe's, on each capability that the plugin can serve.
CARDS = {"sm80": (8, 0), "sm89": (8, 9), "sm90": (9, 0)}
# Launches with KV pools of a given size: of the order of a request.s reserve, and many times that.
POOLS = {"small pool": 12 << 30, "large pool": 100 << 30}


@cache
def recipes(engine: str) -> tuple[Recipe, ...]:
    """Those that the plugin serves."""
    return tuple(
        r for r in shipped_recipes() if r.engine.name == engine and r.engine.serves_with == "plugin" and r.can_work
    )


@pytest.fixture(scope="module")
def folders(tiny_flash: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By repository: the released config and a tokenizer, but no weights."""
    base = tmp_path_factory.mktemp("released")
    found = {}
    for checkpoint in {r.deployment().checkpoint.repo for engine in PROGRAMS for r in recipes(engine)}:
        folder = found[checkpoint] = base / checkpoint.split("/")[-1]
        shutil.copytree(tiny_flash, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
        shutil.copy(ROOT / "recipes" / "configs" / f"{folder.name}.json", folder / "config.json")
    return found


def launches(engine: str, folders: dict[str, Path]) -> list[dict[str, Any]]:
    found = []
    for recipe in recipes(engine):
        d = recipe.deployment()
        # Equal to the recipe's own command but for the revision, which a folder has not.
        argv = [a for a in commands(recipe)[0].argv() if a != "--revision" and a != recipe.checkpoint.revision]
        assert argv == [a for a in deployment_commands(d)[0].argv() if a not in ("--revision", "main")]
        card = {"capability": d.gpu.capability, "name": d.gpu.name, "memory_bytes": d.gpu.visible_mib << 20}
        found.append({"id": recipe.id, "argv": argv, "folder": str(folders[d.checkpoint.repo]), "card": card})
    start = ["vllm", "serve", "FOLDER"] if engine == "vllm" else ["sglang", "serve", "--model-path", "FOLDER"]
    for name, capability in CARDS.items():
        folder = next(str(f) for repo, f in folders.items() if repo.endswith("Flash"))
        tp = "--tensor-parallel-size" if engine == "vllm" else "--tp-size"
        card = {"capability": capability, "name": f"A card of {name}", "memory_bytes": 80 << 30}
        found.append({"id": name, "argv": [*start, tp, "8"], "folder": folder, "card": card})
    if engine == "vllm":
        step = ["--max-num-batched-tokens", "8192", "--max-model-len", "1048576"]
        for name, pool in POOLS.items():
            argv = [*start, "--tensor-parallel-size", "8", *step, "--kv-cache-memory-bytes", str(pool)]
            found.append({"id": name, "argv": argv, "folder": folder, "card": card})
    return found


@pytest.fixture(scope="module", params=VERSIONS, ids=lambda v: v[1] or v[0])
def resolved(request: pytest.FixtureRequest, folders: dict[str, Path]) -> tuple[str, dict[str, dict[str, Any]]]:
    """The engine's name, and what one version of it made of every launch."""
    engine, unpacked = request.param
    if unpacked and not (ENV_DIR / unpacked / ".unpacked").exists():
        pytest.skip(f"{ENV_DIR / unpacked} is missing; `make env` unpacks it")
    path = os.pathsep.join(str(p) for p in ([ENV_DIR / unpacked] if unpacked else []) + [ROOT])
    done = subprocess.run(
        [sys.executable, "-m", PROGRAMS[engine]], input=json.dumps({"launches": launches(engine, folders)}),
        capture_output=True, text=True, timeout=600, cwd="/",
        env=clean_environment() | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "DSV4_MODE": "on"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return engine, {answer["id"]: answer for answer in json.loads(done.stdout)}


def test_every_recipes_command_becomes_what_the_recipe_says(resolved: tuple[str, dict[str, dict[str, Any]]]) -> None:
    engine, found = resolved
    assert len(recipes(engine)) >= 9
    wrong = []
    for recipe in recipes(engine):
        want = vllm_reads(recipe) if engine == "vllm" else sglang_reads(recipe)
        got = {key: found[recipe.id][key] for key in want}
        wrong += [f"{recipe.id}: {key} {got[key]}, not {want[key]}" for key in want if got[key] != want[key]]
    assert wrong == []


def vllm_reads(recipe: Recipe) -> dict[str, Any]:
    d = recipe.deployment()
    assert d.max_capture_size is not None
    assert d.max_capture_size >= max(128, d.max_num_seqs)
    sizes = [n for n in (1, 2, 4, *range(8, 257, 8), *range(272, 513, 16)) if n <= d.max_capture_size]
    return {
        "class": "dsv4_vllm.model",
        "architecture": "DeepseekV4ForCausalLM",
        "runner_v2": True,
        "kv": [d.kv.value, KvFormat.FP8_DS_MLA.value, d.index.value],
        "block_size": 256,
        "mapping": d.state.value,
        "in_workers": d.state.value,
        "graphs": "FULL_AND_PIECEWISE",
        "graph_sizes": sizes,
        "largest_graph": sizes[-1],
        "breakable": True,
        "tp": d.tp,
        "pp": d.pp,
        "ep": d.ep,
        "executor": "mp",
        "max_model_len": d.max_model_len,
        "step_tokens": d.max_num_batched_tokens,
        "max_num_seqs": d.max_num_seqs,
        "async_scheduling": d.async_scheduling,
        "moe_backend": d.moe_backend,
        "quantisation": "deepseek_v4_fp8",
        "memory": d.memory_fraction,
    }


def sglang_reads(recipe: Recipe) -> dict[str, Any]:
    d = recipe.deployment()
    return {
        "device": "cuda",
        "kv": "fp8_e4m3",
        "decode_graphs": ["full", [n for n in SGLANG_SIZES if n <= d.max_num_seqs]],
        "prefill_graphs": "disabled",
        "page_size": 256,
        "window_ratio": d.swa_full_tokens_ratio,
        "tp": d.tp,
        "pp": 1,
        "attention": ["dsv4_plugin", None, None],
        "moe": "marlin",
        "context": d.max_model_len,
        "chunk": d.max_num_batched_tokens,
        "max_running_requests": d.max_num_seqs,
        "memory": d.memory_fraction,
        "quantisation": "fp8",
        "architectures": ["DeepseekV4PluginForCausalLM"],
    }


@pytest.mark.parametrize(("name", "state"), [("small pool", "summary"), ("large pool", "paged")])
def test_vllm_keeps_state_as_the_pool_holds_more_requests(
    resolved: tuple[str, dict[str, dict[str, Any]]], name: str, state: str
) -> None:
    """DSV4_STATE=auto, decided in the first process by the planner, and told with its figures."""
    engine, found = resolved
    if engine != "vllm":
        assert name not in found  # SGLang has rings alone
        return
    got = found[name]
    assert (got["mapping"], got["in_workers"]) == (state, state)
    (line,) = [line for line in got["said"] if "DSV4_STATE" in line]
    told = re.fullmatch(
        rf"dsv4: DSV4_STATE=auto is {state}: requests of 1048576 tokens at once in the KV pool"
        r" \(--kv-cache-memory-bytes\): (\d+) with summary, (\d+) with paged",
        line,
    )
    assert told, line
    summary, paged = map(int, told.groups())
    assert (paged > summary) == (state == "paged")


@pytest.mark.parametrize("name", CARDS)
def test_a_default_launch_packs_pages_and_captures_decode_steps(
    resolved: tuple[str, dict[str, dict[str, Any]]], name: str
) -> None:
    """TP8 and no other flag. The graph runners read these and nothing else."""
    engine, found = resolved
    got = found[name]
    if engine == "vllm":
        assert got["kv"] == ["auto", "fp8_ds_mla", "fp8"]
        assert (got["graphs"], got["largest_graph"]) == ("FULL_AND_PIECEWISE", 512)
        assert (got["class"], got["breakable"], got["tp"]) == ("dsv4_vllm.model", True, 8)
        return
    assert got["architectures"] == ["DeepseekV4PluginForCausalLM"]
    assert (got["attention"][0], got["moe"], got["page_size"], got["tp"]) == ("dsv4_plugin", "marlin", 256, 8)
    assert (got["decode_graphs"][0], got["prefill_graphs"]) == ("full", "disabled")
    assert got["max_running_requests"] == 256
