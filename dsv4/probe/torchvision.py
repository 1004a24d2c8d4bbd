# SPDX-License-Identifier: Apache-2.0
"""Stands in for torchvision where it is absent: SGLang imports it for image processors that a text
model never touches.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from typing import Any


def allow_absent() -> None:
    """Let every import from torchvision succeed, unless it is installed."""
    if importlib.util.find_spec("torchvision") is None:
        sys.meta_path.append(_AbsentFinder())


class _Absent(types.ModuleType):
    """A module all of whose names exist."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _AnyAttribute(name, (), {})


class _AnyAttribute(type):
    """A class all of whose attributes exist (InterpolationMode.NEAREST is read while importing)."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _AbsentFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        return (
            importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] == "torchvision" else None
        )

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = _Absent(spec.name)
        module.__path__ = []
        module.__version__ = "0.0.0"  # type: ignore[attr-defined]
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass
