# SPDX-License-Identifier: Apache-2.0
"""The shape of the house, computed from the sources: which file imports which, and how long calls
and kernels are."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("dsv4", "dsv4_sglang", "dsv4_vllm")
HOST = (*PACKAGES, "benchmarks", "examples")
MOST_POSITIONAL = 6
MOST_KERNEL_PARAMETERS = 25
FOREIGN = ("torch.ops.", "library.")  # operators of vendors' libraries take nothing by name
# Lowest first; a module may import from its own floor and from those below. The contracts in
# pyproject.toml say the same.
FLOORS = (
    ("errors",),
    ("data",),
    ("machine", "model"),
    ("planning", "ops"),
    ("reference", "loading"),
    ("probe", "proof"),
    ("cli",),
    ("__main__", ""),  # the program, and the package's own lazy exports
)


def files(*folders: str) -> list[Path]:
    return sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


@cache
def imports() -> dict[str, set[str]]:
    """Every module of the packages and the modules it imports, at its top or inside a function."""
    modules = {module_of(file): file for file in files(*PACKAGES)}
    found: dict[str, set[str]] = {}
    for name, file in modules.items():
        found[name] = set()
        for node in ast.walk(parsed(file)):
            if isinstance(node, ast.Import):
                found[name] |= {alias.name for alias in node.names} & modules.keys()
            elif isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    full = f"{node.module}.{alias.name}"
                    found[name] |= {full if full in modules else node.module} & modules.keys()
        found[name].discard(name)
    return found


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Paths that come back to where they start: one for each such place that a walk in depth
    meets."""
    done: set[str] = set()
    found: list[list[str]] = []

    def walk(node: str, path: list[str]) -> None:
        if node in path:
            found.append([*path[path.index(node) :], node])
            return
        if node not in done:
            for target in sorted(graph[node]):
                walk(target, [*path, node])
            done.add(node)

    for start in sorted(graph):
        walk(start, [])
    return found


def floor_of(module: str) -> int:
    room = module.partition(".")[2].partition(".")[0]
    return next(i for i, rooms in enumerate(FLOORS) if room in rooms)


def upward(graph: dict[str, set[str]]) -> list[str]:
    return [
        f"{module} -> {target}"
        for module, targets in graph.items()
        for target in targets
        if module.startswith("dsv4.") and target.startswith("dsv4.") and floor_of(target) > floor_of(module)
    ]


def test_no_file_imports_itself_by_a_detour() -> None:
    assert circles(imports()) == []


def test_no_import_goes_upwards() -> None:
    assert upward(imports()) == []


def test_a_circle_and_an_upward_arrow_would_be_seen() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == [["a", "b", "c", "a"]]
    assert upward({"dsv4.model.config": {"dsv4.ops.moe"}, "dsv4.ops.moe": {"dsv4.model.config"}}) == [
        "dsv4.model.config -> dsv4.ops.moe"
    ]


def is_kernel(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list)


def host_calls(node: ast.AST) -> Iterator[ast.Call]:
    """Calls outside kernels; the launch of a kernel, `kernel[grid](...)`, is none."""
    if is_kernel(node):
        return
    if isinstance(node, ast.Call) and not isinstance(node.func, ast.Subscript):
        yield node
    for child in ast.iter_child_nodes(node):
        yield from host_calls(child)


@pytest.mark.parametrize("folder", HOST)
def test_no_call_has_more_than_six_positional_arguments(folder: str) -> None:
    long = [
        f"{file.relative_to(ROOT)}:{call.lineno}: {ast.unparse(call.func)} gets {len(call.args)}"
        for file in files(folder)
        for call in host_calls(parsed(file))
        if len(call.args) > MOST_POSITIONAL and not ast.unparse(call.func).startswith(FOREIGN)
    ]
    assert not long, "\n".join(long)


def test_no_kernel_has_more_than_25_parameters() -> None:
    long = [
        f"{file.relative_to(ROOT)}: {node.name} has {len(node.args.args)}"
        for file in files("dsv4")
        for node in ast.walk(parsed(file))
        if isinstance(node, ast.FunctionDef) and is_kernel(node) and len(node.args.args) > MOST_KERNEL_PARAMETERS
    ]
    assert not long, "\n".join(long)
