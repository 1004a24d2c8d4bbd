# SPDX-License-Identifier: Apache-2.0
"""Steps that an engine replays from tapes (`tape`), each held against the same padded step run
eagerly from the same caches: results and every byte of every cache must be the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.support import tape


class GraphSteps:
    """caches: the memory of every cache, by name."""

    def __init__(self, caches: Callable[[], dict[str, Tensor]]) -> None:
        self.caches = caches
        self.replayed: Counter[str] = Counter()
        self.different: list[str] = []

    def compare(self, what: str, real: int, graph: Callable[[], Any], eager: Callable[[], Any]) -> Any:
        """Run both; what the graph computed goes on, or the other where the graph fails.

        real: rows of the result's tensors that are no padding's, which come first
        """
        self.replayed[what] += 1
        caches = self.caches()
        before = copies(caches)
        try:
            got = each_tensor(torch.clone, graph())
        except (RuntimeError, IndexError) as error:  # a launch that no longer fits its own tensors
            self.different.append(f"{what}: {error}")
            got = None
        after = copies(caches)
        restore(caches, before)
        want = eager()
        if got is None:
            return want
        if not all(same(a[:real], b[:real]) for a, b in zip(tensors(got), tensors(want), strict=True)):
            self.different.append(f"{what}: the result's {real} rows")
        self.different += [f"{what}: {name}" for name, cache in caches.items() if not same(after[name], cache)]
        restore(caches, after)
        return got

    def report(self, smallest: tape.Tape | None, outside: int | None) -> dict[str, Any]:
        """smallest: of a decode step of one request; outside: the launches before its graph, for
        attention's metadata."""
        assert smallest is not None
        pools = tape.Graph.pools.values()
        return {
            "replayed": dict(self.replayed),
            "different": self.different[:20],
            "captured": len(tape.Graph.captured),
            "inside": [launch.name for launch in smallest.launches if launch.works],
            "outside": outside,
            "held": sum(pool.held for pool in pools),
            "peak": sum(pool.peak for pool in pools),
        }


def each_tensor(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """A model's output with all its tensors changed."""
    if isinstance(value, tuple | list):
        return type(value)(each_tensor(change, each) for each in value)
    return change(value)


def tensors(value: Any) -> list[Tensor]:
    """Those of a model's output."""
    found: list[Tensor] = []
    each_tensor(lambda tensor: found.append(tensor) or tensor, value)  # type: ignore[func-returns-value]
    return found


def counted(plan: Callable[..., Any], counts: dict[int, int], size: Callable[[Any], int]) -> Callable[..., Any]:
    """`plan`, a function of a batch, whose launches are written to `counts` by the batch's size."""

    def counting(batch: Any, *args: Any, **kwargs: Any) -> Any:
        launches = tape.Counting()
        with launches:
            made = plan(batch, *args, **kwargs)
        counts[size(batch)] = launches.launches
        return made

    return counting


def copies(caches: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: cache.clone() for name, cache in caches.items()}


def restore(caches: dict[str, Tensor], contents: dict[str, Tensor]) -> None:
    for name, cache in caches.items():
        cache.copy_(contents[name])


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bytes."""
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
