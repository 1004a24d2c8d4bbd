# SPDX-License-Identifier: Apache-2.0
"""Break one function of dsv4 on purpose, wherever it is held."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from types import CodeType, FunctionType, ModuleType


def mutate(module_name: str, old: str, new: str) -> None:
    """Give every function of a module the code that it would have with `old` replaced by `new` in
    the module's source. Nothing is run again, so that classes stay the same and whoever holds a
    function has the broken one.
    """
    module = importlib.import_module(module_name)
    source = inspect.getsource(module)
    assert source.count(old) == 1, f"{module_name} no longer says {old!r}: write the mutation anew"
    codes = dict(_codes(compile(source.replace(old, new), str(module.__file__), "exec")))
    before = dict(_codes(compile(source, str(module.__file__), "exec")))
    changed = {name for name, code in codes.items() if _body(code) != _body(before[name])}
    found = {function.__qualname__: function for function in _functions(module)}
    outer = {name.split(".<locals>")[0] for name in changed}
    assert outer & found.keys(), f"{module_name}: {old!r} is in no function"
    for name in outer & found.keys():
        found[name].__code__ = codes[name]


def _codes(code: CodeType) -> Iterator[tuple[str, CodeType]]:
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield inner.co_qualname, inner
            yield from _codes(inner)


def _body(code: CodeType) -> tuple[object, ...]:
    """What a function does, wherever its lines are."""
    constants = tuple(_body(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts)
    return code.co_code, constants, code.co_names, code.co_varnames, code.co_freevars


def _functions(module: ModuleType) -> Iterator[FunctionType]:
    for value in list(vars(module).values()):
        if getattr(value, "__module__", None) != module.__name__:
            continue
        for each in vars(value).values() if isinstance(value, type) else (value,):
            inner = getattr(each, "__func__", None) or getattr(each, "fget", None) or each
            inner = inspect.unwrap(inner) if callable(inner) else inner
            if isinstance(inner, FunctionType):
                yield inner
