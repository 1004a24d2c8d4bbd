# SPDX-License-Identifier: Apache-2.0
"""Run a plan in the real vLLM engine. What its results are held against is in `comparison`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support.comparison import (
    ENV_DIR,
    ROOT,
    TIE_MARGIN,
    TOLERANCE,
    Oracle,
    assert_equal,
    clean_environment,
    compare,
    request,
    served,
)

__all__ = [
    "ENV_DIR",
    "MODEL_CLASS",
    "RUNNER_V2",
    "TIE_MARGIN",
    "TOLERANCE",
    "Oracle",
    "assert_equal",
    "compare",
    "engine_args",
    "environment",
    "request",
    "run",
    "start",
]

MODEL_CLASS = "dsv4_vllm.model.DeepseekV4ForCausalLM"
VLLM_ENV = {"VLLM_NO_USAGE_STATS": "1", "VLLM_HOST_IP": "127.0.0.1"}
RUNNER_V2 = {"VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}


def environment(**extra: str) -> dict[str, str]:
    """The environment of a child process."""
    return clean_environment() | VLLM_ENV | extra


def engine_args(folder: Path, **overrides: Any) -> dict[str, Any]:
    """LLM arguments for a tiny checkpoint in fp32."""
    return {
        "model": str(folder),
        "dtype": "float32",
        "max_model_len": 1200,
        "max_num_batched_tokens": 200,
        "max_num_seqs": 8,
        "kv_cache_memory_bytes": 512 << 20,
    } | overrides


def run(
    engine: dict[str, Any], phases: list[list[dict[str, Any]]], env: dict[str, str] | None = None, **options: Any
) -> dict[str, Any]:
    """Run `phases` in a fresh engine process. Fails with the end of its log when it does not exit
    0. options: see `vllm_driver`."""
    return served(start(engine, phases, env, **options), MODEL_CLASS)


def start(
    engine: dict[str, Any], phases: list[list[dict[str, Any]]], env: dict[str, str] | None = None, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run `phases` in a fresh engine process, whatever becomes of it."""
    plan = json.dumps({"engine": engine, "phases": phases, **options})
    variables = environment(**(env or {}))
    command = [sys.executable, "-m", "tests.support.vllm_driver"]
    return subprocess.run(command, input=plan, capture_output=True, text=True, env=variables, timeout=900, cwd=ROOT)
