# SPDX-License-Identifier: Apache-2.0
"""Stand-in for torchvision in the development environment, and nowhere else.

SGLang imports torchvision at module level for its image processors. PyPI's wheel is a CUDA build
whose operators do not load beside a CPU torch ("operator torchvision::nms does not exist"), and a
text model calls none of it. So every submodule can be imported here, and calling anything raises.
Delete once SGLang imports torchvision lazily.
"""

from __future__ import annotations

import enum
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Sequence

__version__ = "0.28.0"


class InterpolationMode(enum.Enum):
    """torchvision.transforms.InterpolationMode: processors name its members in default
    arguments."""

    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


class _Absent(types.ModuleType):
    """A submodule in which every name is a function that raises."""

    InterpolationMode = InterpolationMode
    __path__: list[str] = []  # noqa: RUF012 - the import system reads it from the module

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)

        def absent(*_: object, **__: object) -> None:
            raise RuntimeError(
                f"{self.__name__}.{name}: torchvision is a stub in this environment; install the real one"
            )

        return absent


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return (
            importlib.machinery.ModuleSpec(fullname, self, is_package=True)
            if fullname.startswith("torchvision.")
            else None
        )

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Absent(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing to run: `_Absent` answers by itself."""


sys.meta_path.append(_Finder())
