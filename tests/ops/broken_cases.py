# SPDX-License-Identifier: Apache-2.0
"""Cases for bench_ops.py that go wrong in every way a case can, between two that do not."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Case:
    kernel: Callable[[], Tensor]
    reference: Callable[[], Tensor] = lambda: torch.ones(3)
    compare: str = "close"
    read: Callable[[Any], Any] = lambda result: result
    served: bool = True


@dataclass(frozen=True)
class Plan:
    name: str
    build: Callable[[], Case]
    model: str = "none"
    sizes: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


def raises() -> Tensor:
    raise RuntimeError("no such kernel\nand more lines")


def plans(device: str, small: bool) -> list[Plan]:
    return [
        Plan("first", lambda: Case(lambda: torch.ones(3))),
        Plan("wrong", lambda: Case(lambda: torch.tensor([1.0, 1.0, 2.0]))),
        Plan("nan", lambda: Case(lambda: torch.tensor([1.0, 1.0, float("nan")]))),
        Plan("raises", lambda: Case(raises)),
        Plan("unbuilt", lambda: 1 // 0),
        Plan("dies", lambda: Case(lambda: os._exit(3))),
        Plan("hangs", lambda: Case(lambda: time.sleep(600))),
        Plan("last", lambda: Case(lambda: torch.ones(3))),
    ]
