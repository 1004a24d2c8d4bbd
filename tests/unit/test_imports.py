# SPDX-License-Identifier: Apache-2.0
"""`pip install dsv4` without torch must plan, check and diagnose."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "triton", "transformers", "vllm", "sglang")


def planning_half() -> list[str]:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (contract,) = (c for c in contracts if c["name"] == "The planning half needs no torch")
    return contract["source_modules"]


def test_planning_half_pulls_in_neither_torch_nor_triton_nor_an_engine():
    code = f"import importlib, json, sys\nfor m in {planning_half()!r}: importlib.import_module(m)\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    assert set(json.loads(done.stdout)) & set(HEAVY) == set()


def test_planning_half_is_the_one_that_the_design_names():
    wanted = {"env", "compat", "config", "checkpoint", "kv_layout", "doctor", "cli", "decide", "errors"}
    assert {f"dsv4.{name}" for name in wanted} <= set(planning_half())


@pytest.mark.parametrize("command", [["--help"], ["doctor", "--json"]])
def test_commands_run_where_torch_and_engines_cannot_be_imported(tmp_path, command):
    for name in HEAVY:
        (tmp_path / f"{name}.py").write_text("raise ImportError('not here')")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from dsv4.cli import main; main({command!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode in (0, 1), done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout
