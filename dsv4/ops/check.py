# SPDX-License-Identifier: Apache-2.0
"""DSV4_CHECK=1: look at slots and lengths before a kernel runs, and say which request and layer held bad ones.

Kernels mask what is out of range and go on, since a served batch must not die of one bad slot; this mode reads the values
on the host, so it is slow, stops the device and cannot be captured into a CUDA graph.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

from torch import Tensor

from dsv4 import env
from dsv4.errors import Dsv4Error
from dsv4.ops.pages import Pages

_MAX_NAMED = 8
_layer: list[str] = []


class OpInputError(Dsv4Error):
    """An operator was given slots or lengths outside its pages."""


@functools.cache
def enabled() -> bool:
    """Whether DSV4_CHECK is on; read once."""
    return env.flag("DSV4_CHECK")


@contextlib.contextmanager
def layer(name: str) -> Iterator[None]:
    """Name the layer whose operators run inside, for messages."""
    _layer.append(name)
    try:
        yield
    finally:
        _layer.pop()


def slots(op: str, slots: Tensor, pages: Pages, lens: Tensor | None = None, request_of_token: Tensor | None = None) -> None:
    """Every slot is -1 or names a row of `pages`; with lens, only the first lens[t] of each row count.

    slots: [T] or [T, K] int; lens, request_of_token: [T]. Does nothing unless enabled. Raises OpInputError.
    """
    if not enabled():
        return
    num_slots = pages.data.shape[0] * pages.rows
    rows = slots.reshape(slots.shape[0], -1)
    bad = (rows < -1) | (rows >= num_slots)
    if lens is not None:
        bad &= _places(rows) < lens[:, None]
        at_most(op, "length", lens, rows.shape[1], request_of_token)
    _report(op, "slot", rows, bad, f"-1 or 0 .. {num_slots - 1} ({pages.data.shape[0]} pages of {pages.rows} rows)", request_of_token)


def at_most(op: str, what: str, values: Tensor, bound: int, request_of_token: Tensor | None = None) -> None:
    """Every value is in 0 .. bound. values: [T] int. Does nothing unless enabled. Raises OpInputError."""
    if enabled():
        rows = values[:, None]
        _report(op, what, rows, (rows < 0) | (rows > bound), f"0 .. {bound}", request_of_token)


def _places(rows: Tensor) -> Tensor:
    return rows.new_ones(rows.shape[1]).cumsum(0) - 1


def _report(op: str, what: str, rows: Tensor, bad: Tensor, allowed: str, request_of_token: Tensor | None) -> None:
    at = bad.nonzero().tolist()
    if not at:
        return
    found = []
    for token, place in at[:_MAX_NAMED]:
        owner = f"request {int(request_of_token[token])}, token {token}" if request_of_token is not None else f"token {token}"
        found.append(f"{owner}, place {place}: {int(rows[token, place])}")
    more = f" and {len(at) - _MAX_NAMED} more" if len(at) > _MAX_NAMED else ""
    where = f" in {_layer[-1]}" if _layer else ""
    raise OpInputError(f"{op}{where}: {what} out of range at {'; '.join(found)}{more}; allowed: {allowed}")
