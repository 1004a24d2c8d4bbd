# SPDX-License-Identifier: Apache-2.0
"""Run a plan in the real SGLang engine. What its results are held against is in `comparison`."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.support.comparison import ROOT, clean_environment, served

DRIVER = Path(__file__).with_name("sglang_driver.py")
MODEL_CLASS = "dsv4_sglang.model.DeepseekV4PluginForCausalLM"


def environment(**extra: str) -> dict[str, str]:
    """The environment of a child process."""
    return clean_environment() | extra


def engine_args(folder: Path, **overrides: Any) -> dict[str, Any]:
    """Engine arguments for a tiny checkpoint in fp32: 12 requests of 1200 tokens fit the pool."""
    return {
        "model_path": str(folder),
        "dtype": "float32",
        "device": "cpu",
        "context_length": 1200,
        "max_total_tokens": 16384,
        "max_running_requests": 8,
        "chunked_prefill_size": 512,
        "swa_full_tokens_ratio": 0.5,
        "random_seed": 0,
    } | overrides


def run(
    engine: dict[str, Any], phases: list[list[dict[str, Any]]], env: dict[str, str] | None = None, **options: Any
) -> dict[str, Any]:
    """Run `phases` in a fresh engine. Fails with the end of its log when it does not exit 0.
    options: see `sglang_instruments`."""
    return served(start(engine, phases, env, **options), MODEL_CLASS)


def start(
    engine: dict[str, Any], phases: list[list[dict[str, Any]]], env: dict[str, str] | None = None, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run `phases` in a fresh engine, whatever becomes of it."""
    plan = {"engine": engine, "phases": phases, **options}
    with tempfile.TemporaryDirectory() as scratch:
        variables = environment(**(env or {}))
        if options:
            variables |= install_instruments(Path(scratch), plan, variables.get("PYTHONPATH", ""))
        # Not from the checkout: the working directory would come before PYTHONPATH.
        return subprocess.run(
            [sys.executable, str(DRIVER)],
            input=json.dumps(plan),
            capture_output=True,
            text=True,
            env=variables,
            timeout=600,
            cwd="/",
        )


def install_instruments(folder: Path, plan: dict[str, Any], pythonpath: str) -> dict[str, str]:
    """Variables that make every process of the engine load `sglang_instruments`."""
    (folder / "plan.json").write_text(json.dumps(plan))
    variables = install_plugin(folder, "tests.support.sglang_instruments", pythonpath)
    return variables | {"TEST_SGLANG_PLAN": str(folder / "plan.json")}


def install_plugin(folder: Path, module: str, pythonpath: str) -> dict[str, str]:
    """Variables that make every process of the engine call `module`'s register, as a plugin found
    before dsv4."""
    info = folder / "dsv4_test-0.0.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: dsv4-test\nVersion: 0.0.0\n")
    (info / "entry_points.txt").write_text(f"[sglang.srt.plugins]\ndsv4_test = {module}:register\n")
    return {"PYTHONPATH": ":".join(filter(None, (str(folder), str(ROOT), pythonpath)))}
