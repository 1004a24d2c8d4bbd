# SPDX-License-Identifier: Apache-2.0
"""What a GPU may do with a launch and Triton's interpreter does not: run its programs in any order,
and the threads of a program apart.

The interpreter runs one program after another, in one order. Here every load and store is noted in
a shadow of the memory that it touches: who wrote each byte, who read it, and behind which barrier.
`watched` also runs the programs in another order, in which a race shows in the results.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from triton.runtime import interpreter

NOBODY, SEVERAL = -1, -2
ORDERS = ("forward", "reverse", "random")

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass
class Shadow:
    """One storage, byte by byte. writer, reader: a program, NOBODY or SEVERAL; the barriers that
    the writer, and the last reader, had passed."""

    start: int
    writer: Array
    reader: Array
    written_behind: Array
    read_behind: Array

    @classmethod
    def of(cls, start: int, size: int) -> Shadow:
        nobody = [np.full(size, NOBODY, np.int32) for _ in range(4)]
        return cls(start, *nobody)


@dataclass
class Watch:
    """Findings and launches, as they come. findings: "kernel: what", each once; loads, bytes_read:
    of each launch."""

    order: str
    findings: list[str] = field(default_factory=list)
    launches: list[str] = field(default_factory=list)
    loads: list[int] = field(default_factory=list)
    bytes_read: list[int] = field(default_factory=list)
    _shadows: list[Shadow] = field(default_factory=list)
    _programs: list[tuple[int, int, int]] = field(default_factory=list)
    _next: int = 0
    _barriers: int = 0

    def begin(self, kernel: str, storages: dict[int, int]) -> None:
        self.launches.append(kernel)
        self.loads.append(0)
        self.bytes_read.append(0)
        self._shadows = [Shadow.of(start, size) for start, size in sorted(storages.items())]

    def end(self) -> None:
        self._shadows = []

    def arrange(self, grid: Sequence[int]) -> None:
        """Decide the order of a launch's programs."""
        self._next = 0
        self._programs = list(np.ndindex(*grid))
        if self.order == "reverse":
            self._programs.reverse()
        elif self.order == "random":
            random.Random(len(self.launches)).shuffle(self._programs)

    def program(self) -> tuple[int, int, int]:
        """The next one's place in the grid."""
        self._next, self._barriers = self._next + 1, 0
        return self._programs[self._next - 1]

    def barrier(self) -> None:
        self._barriers += 1

    def access(self, pointers: Any, mask: Any, is_store: bool) -> None:
        if not self._shadows:
            return
        at, inside = np.broadcast_arrays(pointers.data, np.asarray(mask.data).astype(bool))
        at = np.sort(at[inside].astype(np.int64).ravel())
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        if not is_store:
            self.loads[-1] += 1
            self.bytes_read[-1] += size * np.unique(at).size
        if not at.size:
            return
        if is_store and (np.diff(at) < size).any():
            self._find("one store writes a byte twice")
        starts = np.array([s.start for s in self._shadows])
        owner = np.searchsorted(starts, at, side="right") - 1
        for i in np.unique(owner):
            shadow, mine = self._shadows[max(i, 0)], at[owner == i] - starts[max(i, 0)]
            if i < 0 or mine[-1] + size > shadow.writer.size:
                self._find(f"a {'store' if is_store else 'load'} outside every argument")
                mine = mine[(mine >= 0) & (mine + size <= shadow.writer.size)]
            places = np.unique((mine[:, None] + np.arange(size)).ravel())
            (self._store if is_store else self._load)(shadow, places)

    def _load(self, shadow: Shadow, places: Array) -> None:
        me, writer, reader = self._next, shadow.writer[places], shadow.reader[places]
        if ((writer != NOBODY) & (writer != me)).any():
            self._find("a program reads what another writes")
        if ((writer == me) & (shadow.written_behind[places] == self._barriers)).any():
            self._find("a program reads what it wrote, with no barrier between")
        shadow.reader[places] = np.where((reader == NOBODY) | (reader == me), me, SEVERAL)
        shadow.read_behind[places] = self._barriers

    def _store(self, shadow: Shadow, places: Array) -> None:
        me, writer, reader = self._next, shadow.writer[places], shadow.reader[places]
        if ((writer != NOBODY) & (writer != me)).any():
            self._find("two programs write the same byte")
        if ((reader != NOBODY) & (reader != me)).any():
            self._find("a program reads what another writes")
        if ((reader == me) & (shadow.read_behind[places] == self._barriers)).any():
            self._find("a program writes what it read, with no barrier between")
        if ((writer == me) & (shadow.written_behind[places] == self._barriers)).any():
            self._find("a program writes a byte twice, with no barrier between")
        shadow.writer[places], shadow.written_behind[places] = me, self._barriers

    def _find(self, what: str) -> None:
        finding = f"{self.launches[-1]}: {what}"
        if finding not in self.findings:
            self.findings.append(finding)


@contextmanager
def watched(order: str = "forward") -> Iterator[Watch]:
    """Run interpreted launches with their programs in this order, and note what none of them may
    do."""
    assert order in ORDERS, order
    watch, builder, executor = Watch(order), interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, barrier = builder.create_masked_load, builder.create_masked_store, builder.create_barrier
    grid_dim, grid_idx, call = builder.set_grid_dim, builder.set_grid_idx, executor.__call__
    atomics = builder.create_atomic_cas, builder.create_atomic_rmw

    def watched_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        watch.access(pointers, mask, is_store=False)
        return load(self, pointers, mask, *rest)

    def watched_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        watch.access(pointers, mask, is_store=True)
        return store(self, pointers, value, mask, *rest)

    def watched_barrier(self: Any) -> Any:
        watch.barrier()
        return barrier(self)

    def arranged(self: Any, *grid: int) -> None:
        watch.arrange(grid)
        grid_dim(self, *grid)

    def in_order(self: Any, *place: int) -> None:
        grid_idx(self, *watch.program())

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        watch.begin(self.fn.__name__.removesuffix("_kernel"), dict(_storages((args, tuple(kwargs.values())))))
        try:
            call(self, *args, **kwargs)
        finally:
            watch.end()

    def no_atomics(self: Any, *args: Any) -> Any:
        raise NotImplementedError("the detector knows no atomic operations; our kernels use none")

    builder.create_masked_load, builder.create_masked_store = watched_load, watched_store
    builder.create_barrier, builder.set_grid_dim, builder.set_grid_idx = watched_barrier, arranged, in_order
    builder.create_atomic_cas = builder.create_atomic_rmw = no_atomics
    executor.__call__ = launch
    try:
        yield watch
    finally:
        builder.create_masked_load, builder.create_masked_store, builder.create_barrier = load, store, barrier
        builder.set_grid_dim, builder.set_grid_idx, executor.__call__ = grid_dim, grid_idx, call
        builder.create_atomic_cas, builder.create_atomic_rmw = atomics


def _storages(value: Any) -> Iterator[tuple[int, int]]:
    """Address and bytes of the memory of every tensor among arguments, those in groups included."""
    if isinstance(value, tuple):
        for element in value:
            yield from _storages(element)
    elif hasattr(value, "untyped_storage"):
        storage = value.untyped_storage()
        yield storage.data_ptr(), storage.nbytes()
