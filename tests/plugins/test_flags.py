# SPDX-License-Identifier: Apache-2.0
"""Every option of the engines that touches what dsv4 does has been judged: served, or refused by
name in `support.py`.

`tests/golden/flags/<engine>.txt` lists the options of the groups that were judged, over all
supported versions. One that is not there is new: judge it, refuse it by name where it is neither
implemented nor tested, and add it to the list.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
VERSIONS = {"vllm": ("", "vllm-0.33.0"), "sglang": ("", "sglang-0.5.22")}
# Options of other commands, named in a message as the way out, and variables.
NOT_OPTIONS = {"--enforce-eager"}


def options(engine: str, unpacked: str) -> dict[str, list[str]]:
    """By group, of the installed version or of an unpacked one."""
    folder = ROOT / ".env" / unpacked
    if unpacked and not (folder / ".unpacked").exists():
        pytest.skip(f"{folder} is missing; `make env` unpacks it")
    path = os.pathsep.join(str(p) for p in (*([folder] if unpacked else []), ROOT))
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.engine_flags", engine], capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def judged(engine: str) -> set[tuple[str, str]]:
    """Groups and options that were judged."""
    lines = (ROOT / "tests" / "golden" / "flags" / f"{engine}.txt").read_text().splitlines()
    return {(group, flag) for group, flag in (line.split() for line in lines)}


@pytest.mark.parametrize(("engine", "unpacked"), [(e, u) for e, unpacked in VERSIONS.items() for u in unpacked])
def test_every_option_of_a_judged_group_is_judged(engine: str, unpacked: str) -> None:
    found, known = options(engine, unpacked), judged(engine)
    groups = {group for group, _ in known}
    assert groups <= set(found), "the engine has renamed a group"
    new = sorted((g, flag) for g in groups for flag in found[g] if (g, flag) not in known)
    assert new == [], f"judge in dsv4_{engine}/support.py, then add to tests/golden/flags/{engine}.txt"
    every = {flag for flags in found.values() for flag in flags}
    named = set(re.findall(r'"(--[a-z0-9-]+)', (ROOT / f"dsv4_{engine}" / "support.py").read_text()))
    every |= {flag for _, flag in known}  # of another supported version
    assert named - every - NOT_OPTIONS == set(), "support.py refuses what the engine does not have"
