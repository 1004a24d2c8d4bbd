# SPDX-License-Identifier: Apache-2.0
"""Whether an engine's steps launch a kernel that its warm-up has not compiled, by Triton's own key
for sm80.

Launches run in the interpreter, in the engine's process; their arguments are the engine's.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

TARGET = "sm80"


class ServedVariants:
    """What is launched from the moment that this is made."""

    def __init__(self) -> None:
        from dsv4.ops.launches import noted

        self._noting = ExitStack()
        self._served = self._noting.enter_context(noted(TARGET))

    def report(self, warm_up: Callable[[], Any]) -> dict[str, Any]:
        """Kernels served, variants that the warm-up launches, and those served without it."""
        from dsv4.ops.launches import noted

        self._noting.close()
        with noted(TARGET, run=False) as warmed:
            warm_up()
        warm = {v.key for v in warmed}
        ours = {v.key: v.name for v in self._served if v.kernel.fn.__module__.startswith("dsv4.")}
        cold = sorted(key for key in ours if key not in warm)
        return {"kernels": sorted(set(ours.values())), "warm": sorted(warm), "cold": cold}
