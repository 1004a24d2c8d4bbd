# SPDX-License-Identifier: Apache-2.0
"""Operators, and which implementation of each runs here: chosen once per operator and device,
logged once, with the reason.

An operator is declared once, in its family's `__init__`, on its reference:

    swiglu = operator("moe.swiglu", reference.swiglu, triton="dsv4.ops.moe.triton:swiglu")

It is called with the reference's signature, and mypy holds it to that.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec, TypeVar, cast

import torch

from dsv4.errors import OpUnavailableError
from dsv4.machine import env
from dsv4.ops import check
from dsv4.ops.kernels import refuse_triton

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

# Why an implementation cannot run on a device, or None when it can.
Refusal = Callable[[torch.device], str | None]


@dataclass(frozen=True)
class Implementation:
    """name: reference or triton; target: "module:function", imported when chosen."""

    name: str
    target: str
    refuse: Refusal


@dataclass(frozen=True)
class Choice:
    """The implementation of one operator that serves on one device, and why."""

    op: str
    impl: str
    reason: str
    function: Callable[..., Any]


class Operator(Generic[P, R]):
    """One operator. Calling it runs what serves on the device of its first argument that has one.

    name: `family.function`; offers: its implementations, the reference first, later ones preferred.
    """

    def __init__(self, name: str, reference: Callable[P, R], offers: tuple[Implementation, ...]) -> None:
        self.name, self.reference, self.offers = name, reference, offers
        self.__doc__, self.__wrapped__ = reference.__doc__, reference
        self._choices: dict[str, Choice] = {}

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        for argument in (*args, *kwargs.values()):
            device = getattr(argument, "device", None)
            if device is not None:
                return cast("R", self.choice(device).function(*args, **kwargs))
        raise TypeError(f"{self.name}: no argument has a device")

    def choice(self, device: torch.device) -> Choice:
        """What serves on `device`. Raises OpUnavailableError, naming every refusal."""
        found = self._choices.get(device.type)
        if found is None:
            found = self._choices[device.type] = _choose(self, device)
            logger.info("dsv4: %s on %s is served by %s (%s)", self.name, device.type, found.impl, found.reason)
        return found

    def forget(self) -> None:
        """Choose anew at the next call."""
        self._choices.clear()

    @property
    def choices(self) -> tuple[Choice, ...]:
        """What has been chosen so far, one per kind of device."""
        return tuple(self._choices.values())


OPERATORS: dict[str, Operator[..., Any]] = {}


def operator(
    name: str, reference: Callable[P, R], *, triton: str | None = None, refuse: Refusal = refuse_triton
) -> Operator[P, R]:
    """Declare the operator `name` on its plain-PyTorch `reference`.

    triton: "module:function" of its kernel, which has the same signature; refuse: why that kernel
    cannot run on a device. Raises ValueError for a name that is taken.
    """
    if name in OPERATORS:
        raise ValueError(f"{name}: declared twice")
    # By name, so that the function that serves is the module's at the time of the choice.
    offers = [Implementation("reference", f"{reference.__module__}:{reference.__qualname__}", lambda device: None)]
    if triton is not None:
        offers.append(Implementation("triton", triton, refuse))
    declared = Operator(name, reference, tuple(offers))
    OPERATORS[name] = declared
    return declared


def _choose(op: Operator[..., Any], device: torch.device) -> Choice:
    mode = env.get("DSV4_OPS")
    refusals: list[str] = []
    for offer in reversed(op.offers):
        refusal = _refuse_by_mode(offer, mode, device, has_kernel=len(op.offers) > 1) or offer.refuse(device)
        if refusal is None:
            module, _, function = offer.target.partition(":")
            reason = "; ".join(refusals) or "preferred"
            return _choice(op, offer.name, reason, getattr(importlib.import_module(module), function))
        refusals.append(f"{offer.name}: {refusal}")
    raise OpUnavailableError(f"{op.name}: nothing runs on {device} with DSV4_OPS={mode} ({'; '.join(refusals)})")


def _choice(op: Operator[..., Any], impl: str, reason: str, function: Callable[..., Any]) -> Choice:
    if check.enabled() and check.applies(op.name, op.reference):
        function, reason = check.guard(op.name, function), f"{reason}; checked"
    return Choice(op.name, impl, reason, function)


def _refuse_by_mode(offer: Implementation, mode: str, device: torch.device, has_kernel: bool) -> str | None:
    is_reference = offer.name == "reference"
    if mode == "reference" and not is_reference:
        return "DSV4_OPS=reference"
    if mode == "triton" and is_reference and has_kernel:
        return "DSV4_OPS=triton"
    if mode == "auto" and device.type == "cpu" and not is_reference:
        return "no accelerator"
    if mode == "auto" and device.type != "cpu" and is_reference and has_kernel:
        return "slow on an accelerator; DSV4_OPS=reference asks for it"
    return None


def report() -> dict[str, dict[str, str]]:
    """What has been chosen so far in this process: {op: {"impl", "reason"}}."""
    return {c.op: {"impl": c.impl, "reason": c.reason} for op in OPERATORS.values() for c in op.choices}


def forget_choices() -> None:
    """Choose anew at the next call (for tests that change DSV4_OPS)."""
    for op in OPERATORS.values():
        op.forget()


def all_kernels(device: torch.device, without: frozenset[str] = frozenset()) -> bool:
    """True when no operator but those in `without` reads device values on the host, as references
    and DSV4_CHECK do."""
    used = (op for name, op in OPERATORS.items() if name not in without)
    return not check.enabled() and all(op.choice(device).impl != "reference" for op in used)
