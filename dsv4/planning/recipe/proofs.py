# SPDX-License-Identifier: Apache-2.0
"""Rewrites a recipe file's `memory.proof`, which comes last in the file, from the planner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from dsv4.data import read_yaml
from dsv4.errors import RecipeError
from dsv4.planning.memory.proof import prove
from dsv4.planning.recipe.schema import parse_recipe, proof_section

_MARK = "  proof:"
_EMPTY = {
    "method": "formula",
    "weights_gib": 0.0,
    "budget_gib": 0.0,
    "pool_gib": [0.0, 0.0],
    "request_gib": 0.0,
    "reserve_gib": 0.0,
    "need_gib": 0.0,
    "concurrency": [0.0, 0.0],
    "max_context": [0, 0],
    "verdict": "no",
}


def rewrite(path: Path) -> None:
    """Recompute and replace the proof of the recipe in `path`. Raises RecipeError."""
    raw: Any = read_yaml(path)
    if not isinstance(raw, dict) or "memory" not in raw:
        raise RecipeError(f"{path}: is not a recipe (no memory section)")
    raw["memory"]["proof"] = dict(_EMPTY)
    recipe = parse_recipe(raw, str(path))
    section = proof_section(prove(recipe.deployment(), recipe.lengths.concurrency))
    text = path.read_text(encoding="utf-8")
    head = text[: text.index(_MARK)] if _MARK in text else text.rstrip("\n") + "\n"
    lines = [f"    {k}: {yaml.safe_dump(v, default_flow_style=True).splitlines()[0]}" for k, v in section.items()]
    path.write_text("\n".join([head.rstrip("\n"), _MARK, *lines]) + "\n", encoding="utf-8")
