# SPDX-License-Identifier: Apache-2.0
"""DSV4_CHECK=1: look at slots, lengths and ids before an operator runs, and say which request and layer held bad ones.

Operators mask what is out of range and go on, since a served batch must not die of one bad slot. In this mode the registry
puts `guard` around whatever serves an operator, kernel or twin. It reads the values on the host, so it is slow, stops the
device and cannot be captured into a CUDA graph. Without it nothing here runs.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsv4.errors import Dsv4Error
from dsv4.machine import env

_MAX_NAMED = 8
Arguments = Mapping[str, Any]  # an operator's, by name


class OpInputError(Dsv4Error):
    """An operator was given slots, lengths or ids outside what they index."""


class CheckImpossibleError(Dsv4Error):
    """DSV4_CHECK=1 where values cannot be read."""


@functools.cache
def enabled() -> bool:
    """Whether DSV4_CHECK is on; read once."""
    return env.flag("DSV4_CHECK")


# ---- where we are ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    layer: str
    request_of_token: Tensor


_place: _Place | None = None


def enter_layer(layer: str, request_of_token: Tensor) -> None:
    """Say whose operators run from here on, for messages: a model calls it in each layer where `enabled()`.

    request_of_token: [T] int, of the step.
    """
    global _place
    _place = _Place(layer, request_of_token)


# ---- what must hold --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slots:
    """Every slot is -1 or names a row of the pages. Names of arguments: slots [T] or [T, K] int, or [N, K] of which `row` [T]
    says which each token reads; lens: [T], how many of each row count."""

    slots: str
    pages: str
    lens: str | None = None
    row: str | None = None

    def __call__(self, op: str, given: Arguments) -> None:
        pages, slots = given.get(self.pages), given.get(self.slots)
        if pages is None or slots is None:
            return
        if self.row is not None:
            last = slots.shape[0] - 1
            Within(self.row, "row of slots", lambda _: last)(op, given)
            slots = slots[given[self.row].long()]
        rows = slots.reshape(slots.shape[0], -1)
        num_slots = pages.data.shape[0] * pages.rows
        bad = (rows < -1) | (rows >= num_slots)
        if self.lens is not None:
            Within(self.lens, "length", lambda _: rows.shape[1])(op, given)
            bad &= torch.arange(rows.shape[1], device=rows.device) < given[self.lens][:, None]
        _report(op, "slot", rows, bad, f"-1 or 0 .. {num_slots - 1} ({pages.data.shape[0]} pages of {pages.rows} rows)", given)


@dataclass(frozen=True)
class Within:
    """Every value of the argument `values`, [T] int or one of each request, is in 0 .. bound(arguments)."""

    values: str
    what: str
    bound: Callable[[Arguments], int]
    of_requests: bool = False

    def __call__(self, op: str, given: Arguments) -> None:
        rows, most = given[self.values][:, None], self.bound(given)
        _report(op, self.what, rows, (rows < 0) | (rows > most), f"0 .. {most}", given, self.of_requests)


@dataclass(frozen=True)
class Each:
    """The rules hold for every element of the argument `items`, a sequence of dataclasses, whose fields they name."""

    items: str
    rules: tuple[Slots | Within, ...]

    def __call__(self, op: str, given: Arguments) -> None:
        for item in given[self.items]:
            for rule in self.rules:
                rule(op, {**given, **vars(item)})


RULES: Mapping[str, tuple[Slots | Within | Each, ...]] = {
    "attention.norm_rope_store": (Slots("slots", "window"),),
    "attention.sparse": (Slots("window_slots", "window", "window_lens"), Slots("entry_slots", "entries", "entry_lens", "entry_row")),
    "compressor.save_state": (Slots("slots", "state"),),
    "compressor.compress_store": (Slots("entry_slots", "cache"),),
    "compressor.update": (Each("poolings", (Slots("state_slots", "state"), Slots("entry_slots", "cache"))),),
    "summary.compress": (
        Each(
            "poolings",
            (
                Within("state_page", "state page", lambda a: a["state"].shape[0] - 1, of_requests=True),
                Slots("entry_slots", "cache"),
            ),
        ),
    ),
    "indexer.logits": (
        Within("entry_lens", "number of entries", lambda a: min(a["max_entries"], a["block_table"].shape[1] * a["keys"].rows)),
    ),
    "indexer.topk": (Within("entry_lens", "number of entries", lambda a: a["logits"].shape[1]),),
    "moe.route_hash": (Within("input_ids", "token id", lambda a: a["tid2eid"].shape[0] - 1),),
}


def guard(op: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which serves `op`, behind the rules of `op`.

    It raises OpInputError for what breaks a rule, and CheckImpossibleError while a CUDA graph is captured.
    """
    rules = RULES[op]
    parameters = inspect.signature(function)

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise CheckImpossibleError(
                f"{op}: DSV4_CHECK=1 reads slots and lengths on the host, which a CUDA graph under capture cannot;"
                " serve without graphs (vLLM: --enforce-eager, SGLang: --disable-cuda-graph) or unset DSV4_CHECK"
            )
        given = parameters.bind(*args, **kwargs).arguments
        for rule in rules:
            rule(op, given)
        return function(*args, **kwargs)

    return guarded


def _report(op: str, what: str, rows: Tensor, bad: Tensor, allowed: str, given: Arguments, of_requests: bool = False) -> None:
    """Raise when anything in bad [N, K] is true, naming the first few of rows [N, K]."""
    at = bad.nonzero().tolist()
    if not at:
        return
    # An operator that was given part of a step says itself whose tokens they are.
    owners = given.get("request_of_token")
    if owners is None and _place is not None:
        owners = _place.request_of_token
    found = []
    for n, place in at[:_MAX_NAMED]:
        owner = f"request {n}" if of_requests else f"{_owner(owners, n)}token {n}"
        found.append(f"{owner}, place {place}: {int(rows[n, place])}")
    more = f" and {len(at) - _MAX_NAMED} more" if len(at) > _MAX_NAMED else ""
    where = f" in {_place.layer}" if _place is not None else ""
    raise OpInputError(f"{op}{where}: {what} out of range at {'; '.join(found)}{more}; allowed: {allowed}")


def _owner(request_of_token: Tensor | None, token: int) -> str:
    """Tokens behind the step's own are a graph's padding and nobody's."""
    known = request_of_token is not None and token < request_of_token.shape[0]
    return f"request {int(request_of_token[token])}, " if known and request_of_token is not None else ""
