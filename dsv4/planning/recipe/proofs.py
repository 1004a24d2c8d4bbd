# SPDX-License-Identifier: Apache-2.0
"""Rewrites what the planner computes in a recipe file: the step above which it stops fitting, in
`why_not`, and `memory.proof`, which comes last in the file.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from dsv4.data import read_yaml
from dsv4.errors import RecipeError
from dsv4.machine.hardware import GIB
from dsv4.planning.memory.proof import prove
from dsv4.planning.planner import MAX_STEP_TOKENS, step_limit
from dsv4.planning.recipe.schema import Recipe, parse_recipe, proof_section

_MARK = "  proof:"
_STEP_LIMIT = re.compile(r"^- what: max_num_batched_tokens above \d+\n  why: .*\n", re.MULTILINE)
_EMPTY = {
    "method": "formula",
    "weights_gib": 0.0,
    "budget_gib": 0.0,
    "pool_gib": [0.0, 0.0],
    "start_gib": 0.0,
    "reserve_gib": 0.0,
    "decoding_gib": 0.0,
    "need_gib": 0.0,
    "at_once": [0, 0],
    "vllm_prints": None,
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
    text = _with_step_limit(path.read_text(encoding="utf-8"), recipe)
    head = text[: text.index(_MARK)] if _MARK in text else text.rstrip("\n") + "\n"
    lines = [f"    {k}: {yaml.safe_dump(v, default_flow_style=True).splitlines()[0]}" for k, v in section.items()]
    path.write_text("\n".join([head.rstrip("\n"), _MARK, *lines]) + "\n", encoding="utf-8")


def _with_step_limit(text: str, recipe: Recipe) -> str:
    """`text` with its `max_num_batched_tokens above` reason recomputed, and left out where no step
    stops it.
    """
    d, n = recipe.deployment(), recipe.lengths.concurrency
    limit = step_limit(d, n)
    reason = ""
    if 0 < limit < MAX_STEP_TOKENS:
        above = prove(replace(d, max_num_batched_tokens=2 * limit), n)
        requests = f"{n} request{'s' if n > 1 else ''} of {d.max_model_len} tokens"
        reason = (
            f"- what: max_num_batched_tokens above {limit}\n"
            f"  why: {requests} at once no longer fit with the high end of the overheads;"
            f" at {2 * limit} {above.shortfall_bytes / GIB:.1f} GiB are missing\n"
        )
    return _STEP_LIMIT.sub(lambda _: reason, text).replace("why_not:\nmemory:", "why_not: []\nmemory:")
