# SPDX-License-Identifier: Apache-2.0
"""`pip install dsv4` without torch must plan, check and diagnose."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "triton", "transformers", "vllm", "sglang")
FLOORS = ("machine", "model", "planning")  # the contract in pyproject.toml names the same


def light_modules() -> list[str]:
    """Every module of the floors that need no torch, and what `dsv4 plan`, `check` and `doctor` add
    to them."""
    files = [file for floor in FLOORS for file in (ROOT / "dsv4" / floor).rglob("*.py")]
    files += [file for file in (ROOT / "dsv4" / "cli").glob("*.py") if file.stem != "tiny"]
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files]
    return ["dsv4.errors", "dsv4.data", "dsv4.proof.doctor", *sorted(names)]


def test_the_light_floors_pull_in_neither_torch_nor_triton_nor_an_engine():
    modules = light_modules()
    assert {"dsv4.machine.env", "dsv4.model.kv_layout", "dsv4.planning.memory.proof", "dsv4.cli.planning"} <= set(
        modules
    )
    code = f"import importlib, json, sys\nfor m in {modules!r}: importlib.import_module(m)\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    assert set(json.loads(done.stdout)) & set(HEAVY) == set()


@pytest.mark.parametrize("command", [["--help"], ["doctor", "--json"]])
def test_commands_run_where_torch_and_engines_cannot_be_imported(tmp_path, command):
    for name in HEAVY:
        (tmp_path / f"{name}.py").write_text("raise ImportError('not here')")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from dsv4.cli.main import main; main({command!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode in (0, 1), done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout
