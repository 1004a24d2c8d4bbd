# SPDX-License-Identifier: Apache-2.0
"""Serve DeepSeek-V4 through stock vLLM and stock SGLang, and plan where it fits.

What semantic versioning covers: the `dsv4` command, its exit codes and its `--json` output (by
`schema_version`), the recipe schema, the `DSV4_*` variables, the engines' entry points, `GET
/dsv4/status`, and the names below. Everything else may move with any release. Names are imported
when they are first used, so that `import dsv4` costs nothing and needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsv4.errors import Dsv4Error
    from dsv4.machine.compat import dsv4_version
    from dsv4.machine.hardware import find_gpu
    from dsv4.model.checkpoint import validate
    from dsv4.model.config import V4Config
    from dsv4.planning.deployment import find_checkpoint
    from dsv4.planning.planner import Question, plan
    from dsv4.planning.recipe.schema import Recipe, find_recipe, read_recipe
    from dsv4.proof.doctor import diagnose
    from dsv4.reference.tiny import write_tiny

_HOME = {
    "Dsv4Error": "dsv4.errors",
    "Question": "dsv4.planning.planner",
    "Recipe": "dsv4.planning.recipe.schema",
    "V4Config": "dsv4.model.config",
    "diagnose": "dsv4.proof.doctor",
    "dsv4_version": "dsv4.machine.compat",
    "find_checkpoint": "dsv4.planning.deployment",
    "find_gpu": "dsv4.machine.hardware",
    "find_recipe": "dsv4.planning.recipe.schema",
    "plan": "dsv4.planning.planner",
    "read_recipe": "dsv4.planning.recipe.schema",
    "validate": "dsv4.model.checkpoint",
    "write_tiny": "dsv4.reference.tiny",  # needs torch
}

__all__ = [
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


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dsv4' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
