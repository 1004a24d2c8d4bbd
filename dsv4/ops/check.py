# SPDX-License-Identifier: Apache-2.0
"""DSV4_CHECK=1: look at slots, lengths and ids before an operator runs, and at what each sublayer
made, and say which request and layer held bad ones.

Operators mask what is out of range and go on, since a served batch must not die of one bad slot. In
this mode the registry puts `guard` around whatever serves an operator, kernel or reference. It
reads the values on the host, so it is slow, stops the device and cannot be captured into a CUDA
graph. Without it nothing here runs.

What must hold follows from types: every `Selection` and `SlotMapping` that an operator is given, in
a container or in another dataclass too, is checked. Bare tensors that index memory have rules by
name, in `RULES`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor

from dsv4.errors import CheckImpossibleError, NotFiniteError, OpInputError
from dsv4.machine import env
from dsv4.ops.pages import Pages, Selection, SlotMapping

_MAX_NAMED = 8
Arguments = Mapping[str, Any]  # an operator's, by name


@functools.cache
def enabled() -> bool:
    """Whether DSV4_CHECK is on; read once."""
    return env.flag("DSV4_CHECK")


# ---- where we are --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    layer: str
    request_of_token: Tensor


_place: _Place | None = None


def enter_layer(layer: str, request_of_token: Tensor) -> None:
    """Say whose operators run from here on, for messages: a model calls it in each layer where
    `enabled()`.

    request_of_token: [T] int, of the step.
    """
    global _place
    _place = _Place(layer, request_of_token)


def finite(what: str, values: Tensor, of_requests: bool = False) -> Tensor:
    """`values` [T, ...], after raising NotFiniteError where `enabled()` and any is NaN or infinite.

    what: names them, with their layer; of_requests: a row of each request, or of a token
    """
    if not enabled():
        return values
    rows = (~torch.isfinite(values.flatten(1))).any(-1).nonzero().flatten().tolist()
    if rows:
        owners = _place.request_of_token if _place is not None and not of_requests else None
        found = "; ".join(f"{_owner(owners, n)}{'request' if of_requests else 'token'} {n}" for n in rows[:_MAX_NAMED])
        more = f" and {len(rows) - _MAX_NAMED} more" if len(rows) > _MAX_NAMED else ""
        raise NotFiniteError(
            f"{what}: NaN or infinite at {found}{more}; look at that layer's tensors, and compare with"
            " DSV4_OPS=reference"
        )
    return values


# ---- what must hold ------------------------------------------------------------------------


def _check_selection(op: str, selection: Selection, given: Arguments) -> None:
    slots, lens, row = selection.slots, selection.lens, selection.row
    if row is not None:
        _check_range(op, "row of slots", row, slots.shape[0] - 1, given)
        slots = slots[row.long()]
    _check_range(op, "length", lens, slots.shape[1], given)
    counted = torch.arange(slots.shape[1], device=slots.device) < lens[:, None]
    _check_slots(op, slots, selection.pages, counted, given)


def _check_slot_mapping(op: str, mapping: SlotMapping, given: Arguments) -> None:
    _check_slots(op, mapping.slots[:, None], mapping.pages, None, given)


def _check_slots(op: str, slots: Tensor, pages: Pages, counted: Tensor | None, given: Arguments) -> None:
    """slots: [T, K]; counted: [T, K] bool, the places that mean anything; None for all."""
    bad = (slots < -1) | (slots >= pages.num_slots)
    if counted is not None:
        bad &= counted
    _report(
        op,
        "slot",
        slots,
        bad,
        f"-1 or 0 .. {pages.num_slots - 1} ({pages.data.shape[0]} pages of {pages.rows} rows)",
        given,
    )


def _check_range(op: str, what: str, values: Tensor, most: int, given: Arguments, of_requests: bool = False) -> None:
    """values: [T], or one of each request."""
    rows = values[:, None]
    _report(op, what, rows, (rows < 0) | (rows > most), f"0 .. {most}", given, of_requests=of_requests)


CHECK_OF_TYPE: Mapping[type, Callable[[str, Any, Arguments], None]] = {
    Selection: _check_selection,
    SlotMapping: _check_slot_mapping,
}


@dataclass(frozen=True)
class Within:
    """Every value of the argument `values`, [T] int or one of each request, is in 0 ..
    bound(arguments)."""

    values: str
    what: str
    bound: Callable[[Arguments], int]
    of_requests: bool = False

    def __call__(self, op: str, given: Arguments) -> None:
        _check_range(op, self.what, given[self.values], self.bound(given), given, self.of_requests)


@dataclass(frozen=True)
class Each:
    """The rules hold for every element of the argument `items`, a sequence of dataclasses, whose
    fields they name."""

    items: str
    rules: tuple[Within, ...]

    def __call__(self, op: str, given: Arguments) -> None:
        for item in given[self.items]:
            for rule in self.rules:
                rule(op, {**given, **vars(item)})


RULES: Mapping[str, tuple[Within | Each, ...]] = {
    "summary.compress": (
        Each(
            "states",
            (Within("state_page", "state page", lambda a: a["kept"].summaries.shape[0] - 1, of_requests=True),),
        ),
    ),
    "indexer.logits": (
        Within(
            "entry_lens",
            "number of entries",
            lambda a: min(a["max_entries"], a["keys"].block_table.shape[1] * a["keys"].pages.rows),
        ),
    ),
    "indexer.topk": (Within("entry_lens", "number of entries", lambda a: a["logits"].shape[1]),),
    "moe.route_hash": (Within("input_ids", "token id", lambda a: a["tid2eid"].shape[0] - 1),),
}


def applies(op: str, reference: Callable[..., Any]) -> bool:
    """Whether anything that `op` is given is checked, by the types of its reference's parameters or
    by name."""
    return op in RULES or any(_mentions(hint) for name, hint in get_type_hints(reference).items() if name != "return")


def _mentions(hint: Any) -> bool:
    if hint in CHECK_OF_TYPE:
        return True
    inner = get_type_hints(hint).values() if is_dataclass(hint) else get_args(hint)
    return any(_mentions(each) for each in inner)


def _checked_in(value: Any) -> Iterator[Any]:
    """Everything of a checked type in an argument."""
    if type(value) in CHECK_OF_TYPE:
        yield value
    elif isinstance(value, (list, tuple)) or is_dataclass(value):
        for each in value if isinstance(value, (list, tuple)) else vars(value).values():
            yield from _checked_in(each)


def guard(op: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which serves `op`, behind the checks of what it is given.

    It raises OpInputError for what breaks a rule, and CheckImpossibleError while a CUDA graph is
    captured.
    """
    rules = RULES.get(op, ())
    parameters = inspect.signature(function)

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise CheckImpossibleError(
                f"{op}: DSV4_CHECK=1 reads slots and lengths on the host, which a CUDA graph under capture cannot;"
                " serve without graphs (vLLM: --enforce-eager, SGLang: --disable-cuda-graph) or unset DSV4_CHECK"
            )
        given = parameters.bind(*args, **kwargs).arguments
        for argument in given.values():
            for value in _checked_in(argument):
                CHECK_OF_TYPE[type(value)](op, value, given)
        for rule in rules:
            rule(op, given)
        return function(*args, **kwargs)

    return guarded


def _report(
    op: str, what: str, rows: Tensor, bad: Tensor, allowed: str, given: Arguments, of_requests: bool = False
) -> None:
    """Raise when anything in bad [N, K] is true, naming the first few of rows [N, K]."""
    at = bad.nonzero().tolist()
    if not at:
        return
    # Operators called on a slice pass their own request_of_token.
    owners = given["step"].request_of_token if "step" in given else given.get("request_of_token")
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
