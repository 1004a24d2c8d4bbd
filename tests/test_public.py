# SPDX-License-Identifier: Apache-2.0
"""What semantic versioning covers, pinned: a change here is a change of the major version, or an
addition."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import dsv4
from dsv4.cli.main import COMMANDS
from dsv4.machine.env import VARIABLES

ROOT = Path(__file__).parents[1]

if sys.version_info >= (3, 11):
    import tomllib


def test_names() -> None:
    assert dsv4.__all__ == [
        "Dsv4Error",
        "Question",
        "Recipe",
        "V4Config",
        "diagnose",
        "dsv4_version",
        "find_checkpoint",
        "find_gpu",
        "find_recipe",
        "plan",
        "read_recipe",
        "validate",
        "write_tiny",
    ]
    assert all(getattr(dsv4, name).__name__ == name for name in dsv4.__all__)
    assert dir(dsv4) == dsv4.__all__


def test_importing_the_package_imports_nothing_else() -> None:
    code = "import sys; before = set(sys.modules); import dsv4; print(sorted(m for m in set(sys.modules) - before if m.startswith('dsv4.')))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_commands() -> None:
    assert set(COMMANDS) == {"plan", "launch", "recipes", "check", "tiny", "doctor"}


def test_variables() -> None:
    assert set(VARIABLES) == {
        "DSV4_MODE",
        "DSV4_OPS",
        "DSV4_CHECK",
        "DSV4_STATE",
        "DSV4_SHARE_INDEX",
        "DSV4_CPU_PLATFORM",
        "DSV4_ALLOW_UNTESTED",
    }


def test_entry_points() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"dsv4": "dsv4.cli.main:main"}
    assert {(group, name) for group, names in project["entry-points"].items() for name in names} == {
        ("vllm.platform_plugins", "dsv4_cpu"), ("vllm.general_plugins", "dsv4"),
        ("sglang.srt.platforms", "dsv4_cpu"), ("sglang.srt.plugins", "dsv4"),
    }  # fmt: skip


def test_the_wheel_is_typed_and_holds_its_data(tmp_path: Path) -> None:
    code = "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True, text=True, cwd=ROOT
    )
    names = set(zipfile.ZipFile(tmp_path / done.stdout.strip().splitlines()[-1]).namelist())
    assert {f"{package}/py.typed" for package in ("dsv4", "dsv4_sglang", "dsv4_vllm")} <= names
    assert {
        "dsv4/_recipes/hardware.yaml",
        "dsv4/_recipes/checkpoints.yaml",
        "dsv4/_recipes/recipe.schema.json",
    } <= names
    shipped = {f"dsv4/_recipes/{p.relative_to(ROOT / 'recipes')}" for p in (ROOT / "recipes").rglob("*.yaml")}
    assert shipped <= names
    assert not [n for n in names if n.startswith(("tests/", "benchmarks/"))]
