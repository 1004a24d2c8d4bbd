# SPDX-License-Identifier: Apache-2.0
"""Where a plugin's loader puts each tensor of a checkpoint, seen from inside an engine's
process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from dsv4 import loading as core


def record_mapping() -> dict[tuple[Any, ...], None]:
    """Collect what the loading of weights makes of each released name: [released name, parameter,
    shard]."""
    mapped: dict[tuple[Any, ...], None] = {}  # each once, however often the loader asks

    def watch(name: str, describe: Callable[[Any], list[Any]]) -> None:
        function = getattr(core, name)

        def wrapped(released: str) -> Any:
            result = function(released)
            if result is not None:
                mapped.setdefault((released, *describe(result)))
            return result

        setattr(core, name, wrapped)

    watch("parameter_name", lambda found: [found[0], found[1]])
    watch(
        "expert_tensor",
        lambda e: [f"{e.layer}.{e.stem}_{'scale' if e.is_scale else 'weight'}", f"{e.expert} {e.linear}"],
    )
    return mapped


def parameters(model: nn.Module) -> dict[str, list[int]]:
    """Shapes of the loaded model's parameters by name; the wrapper that one engine puts around
    experts is left out."""
    return {name.replace(".routed_experts.", "."): list(p.shape) for name, p in model.named_parameters()}
