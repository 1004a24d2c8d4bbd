# SPDX-License-Identifier: Apache-2.0
"""The data folder `recipes/`: where it is, and how its YAML is read without trusting it."""

from __future__ import annotations

import functools
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from dsv4.errors import RecipeError

MAX_YAML_BYTES = 64 * 1024  # the largest shipped file is below 20 KiB
PACKAGED_FOLDER = "_recipes"  # name of recipes/ inside the wheel

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # five times faster where libyaml is there


class _StrictLoader(_Loader):  # type: ignore[misc]
    """SafeLoader that refuses a key given twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        mapping: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        if len(mapping) != len(node.value):
            keys = [key.value for key, _ in node.value]
            twice = sorted({str(k) for k in keys if keys.count(k) > 1})
            raise yaml.constructor.ConstructorError(
                None, None, f"key {', '.join(twice)} is given twice", node.start_mark
            )
        return mapping


@functools.cache
def data_folder() -> Path:
    """Folder with hardware.yaml, checkpoints.yaml and the recipes: packaged, or the checkout's.

    Raises RecipeError when neither is there.
    """
    packaged = Path(str(resources.files("dsv4"))) / PACKAGED_FOLDER
    checkout = Path(__file__).resolve().parents[1] / "recipes"
    for folder in (packaged, checkout):
        if (folder / "hardware.yaml").is_file():
            return folder
    raise RecipeError(f"{packaged}: dsv4's recipes are missing from this installation; reinstall dsv4")


def read_yaml(path: Path) -> Any:
    """Parse `path`: plain data only, no anchors, no tags, no key twice, at most 64 KiB. Raises
    RecipeError, one line.
    """
    try:
        raw = path.read_bytes()
    except OSError as e:
        raise RecipeError(
            f"{path}: cannot be read ({e.strerror}); give a recipe id (dsv4 recipes list) or a YAML file"
        ) from e
    if len(raw) > MAX_YAML_BYTES:
        raise RecipeError(f"{path}: is {len(raw)} bytes, a recipe is below {MAX_YAML_BYTES}; is this a recipe?")
    try:
        text = raw.decode("utf-8")
        _refuse_anchors(path, text)
        return yaml.load(text, Loader=_StrictLoader)  # noqa: S506 - a SafeLoader
    except (UnicodeDecodeError, RecursionError, ValueError) as e:
        raise RecipeError(f"{path}: is not YAML text ({type(e).__name__}); is this a recipe?") from e
    except yaml.YAMLError as e:
        raise RecipeError(f"{path}: is not valid YAML ({' '.join(str(e).split())[:160]})") from e


def _refuse_anchors(path: Path, text: str) -> None:
    # Aliases are how a small file becomes gigabytes, and recipes are flat on purpose.
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise RecipeError(f"{path}: line {_line(event)} uses a YAML anchor or alias; write the value out")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > 20:
            raise RecipeError(f"{path}: line {_line(event)} nests deeper than a recipe can; is this a recipe?")


def _line(event: Any) -> int:
    return int(event.start_mark.line) + 1
