# SPDX-License-Identifier: Apache-2.0
"""Rewrites the golden command lines beside it: `python tests/golden/launch/write.py`, then read
the diff."""

from __future__ import annotations

from pathlib import Path

from dsv4.planning.launch import commands
from dsv4.planning.manifests import of_recipe, render
from dsv4.planning.recipe.schema import find_recipe, shipped_recipes

HERE = Path(__file__).parent
FORMATS = {  # one of each kind of deployment, in every format
    "h200-x8-pro-vllm-context-800k": ("shell", "compose", "k8s"),
    "h100-x16-pro-vllm-context": ("shell", "k8s"),
    "h200-x16-pro-vllm-throughput": ("shell", "compose", "k8s"),
    "gb200-x8-pro-sglang-latency": ("shell", "compose", "k8s"),
    "a100-80g-x8-flash-vllm-context": ("shell", "compose", "k8s"),
    "a100-80g-x8-flash-sglang-context": ("shell",),
}


def command_lines() -> str:
    """Every recipe's commands, shell-quoted, one line per role."""
    lines = []
    for recipe in shipped_recipes():
        if recipe.can_work:
            env = "".join(f"{k}={v} " for k, v in of_recipe(recipe).environment().items())
            lines += [f"{recipe.id} {c.role}: {env}{c.shell()}" for c in commands(recipe)]
    return "\n".join(lines) + "\n"


def files() -> dict[str, str]:
    """Golden file name: content."""
    suffix = {"shell": "sh", "compose": "compose.yaml", "k8s": "k8s.yaml"}
    rendered = {
        f"{name}.{suffix[fmt]}": render(of_recipe(find_recipe(name)[0]), fmt) + "\n"
        for name, fmts in FORMATS.items()
        for fmt in fmts
    }
    return {"commands.txt": command_lines(), **rendered}


if __name__ == "__main__":
    for name, content in files().items():
        (HERE / name).write_text(content)
