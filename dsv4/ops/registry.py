# SPDX-License-Identifier: Apache-2.0
"""Which implementation of each operator runs here: chosen once per operator and device, logged once, with the reason."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dsv4.errors import Dsv4Error
from dsv4.machine import env
from dsv4.ops import check

logger = logging.getLogger(__name__)

# Why an implementation cannot run on a device, or None when it can.
Refusal = Callable[[torch.device], str | None]


class OpUnavailableError(Dsv4Error):
    """No implementation of an operator runs on the device."""


@dataclass(frozen=True)
class Implementation:
    """name: reference, triton or vendor-...; target: "module:function", imported when chosen."""

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


_implementations: dict[str, list[Implementation]] = {}
_choices: dict[tuple[str, str], Choice] = {}


def register(op: str, target: str, name: str = "reference", refuse: Refusal = lambda device: None) -> None:
    """Offer an implementation of `op`. Later registrations are preferred; the twin must be the first."""
    offers = _implementations.setdefault(op, [])
    if not offers and name != "reference":
        raise ValueError(f"{op}: kernel {name} has no twin; register the reference first")
    offers.append(Implementation(name, target, refuse))


def resolve(op: str, device: torch.device) -> Callable[..., Any]:
    """The function that serves `op` on `device`. Raises OpUnavailableError, naming every refusal."""
    choice = _choices.get((op, device.type))
    if choice is None:
        choice = _choices[op, device.type] = _choose(op, device)
        logger.info("dsv4: %s on %s is served by %s (%s)", op, device.type, choice.impl, choice.reason)
    return choice.function


def _choose(op: str, device: torch.device) -> Choice:
    mode = env.get("DSV4_OPS")
    refusals: list[str] = []
    offers = _implementations[op]
    for offer in reversed(offers):
        refusal = _refuse_by_mode(offer, mode, device, has_kernel=len(offers) > 1) or offer.refuse(device)
        if refusal is None:
            module, _, function = offer.target.partition(":")
            return _choice(op, offer.name, "; ".join(refusals) or "preferred", getattr(importlib.import_module(module), function))
        refusals.append(f"{offer.name}: {refusal}")
    raise OpUnavailableError(f"{op}: nothing runs on {device} with DSV4_OPS={mode} ({'; '.join(refusals)})")


def _choice(op: str, impl: str, reason: str, function: Callable[..., Any]) -> Choice:
    if check.enabled() and op in check.RULES:
        function, reason = check.guard(op, function), f"{reason}; checked"
    return Choice(op, impl, reason, function)


def _refuse_by_mode(offer: Implementation, mode: str, device: torch.device, has_kernel: bool) -> str | None:
    is_twin = offer.name == "reference"
    if mode == "reference" and not is_twin:
        return "DSV4_OPS=reference"
    if mode == "triton" and is_twin and has_kernel:
        return "DSV4_OPS=triton"
    if mode == "auto" and device.type == "cpu" and not is_twin:
        return "no accelerator"
    if mode == "auto" and device.type != "cpu" and is_twin and has_kernel:
        return "slow on an accelerator; DSV4_OPS=reference asks for it"
    return None


def report() -> dict[str, dict[str, str]]:
    """What has been chosen so far in this process: {op: {"impl", "reason"}}."""
    return {choice.op: {"impl": choice.impl, "reason": choice.reason} for choice in _choices.values()}


def forget_choices() -> None:
    """Choose anew at the next call (for tests that change DSV4_OPS)."""
    _choices.clear()


def is_kernel(op: str, device: torch.device) -> bool:
    """Whether something other than its twin serves `op` on `device`."""
    resolve(op, device)
    return _choices[op, device.type].impl != "reference"


def all_kernels(device: torch.device, without: frozenset[str] = frozenset()) -> bool:
    """True when no operator but those in `without` reads device values on the host, as twins and DSV4_CHECK do."""
    return not check.enabled() and all(is_kernel(op, device) for op in _implementations if op not in without)
