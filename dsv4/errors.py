# SPDX-License-Identifier: Apache-2.0
"""The error types of dsv4: each message says what, where, what was found and what to do.

Messages name values and fields. A command adds the option that a value came from, a recipe its
file.
"""

from __future__ import annotations

from collections.abc import Iterable


def nearest(name: str, known: Iterable[str], n: int = 3, cutoff: float = 0.4) -> list[str]:
    """Up to `n` of `known` that `name` may have meant, the likeliest first. cutoff: least likeness,
    0 to 1.
    """
    import difflib  # here, because most commands make no mistake

    return difflib.get_close_matches(name, known, n=n, cutoff=cutoff)


class Dsv4Error(Exception):
    """Base of every error a user can cause; the CLI prints it on one line and exits 2."""


class ConfigError(Dsv4Error):
    """config.json is malformed or contradicts itself."""


class UnsupportedCheckpointError(ConfigError):
    """A well-formed checkpoint of a family that dsv4 does not serve."""


class CheckpointError(Dsv4Error):
    """Tensors on disk do not match config.json."""


class RecipeError(Dsv4Error):
    """A recipe or a data file beside it cannot be used."""


class HardwareError(Dsv4Error):
    """A GPU is unknown, or this machine holds none that dsv4 knows."""


class UnsupportedDeviceError(Dsv4Error):
    """No V4, neither dsv4's nor native, runs on the device."""


class PlanError(Dsv4Error):
    """What was asked of the planner cannot be answered: an impossible count, context or version.

    field: the field of the question whose value is refused, None where no single one is; reason:
    the message without it.
    """

    def __init__(self, reason: str, field: str | None = None) -> None:
        super().__init__(f"{field} {reason}" if field else reason)
        self.field, self.reason = field, reason


class DeploymentError(Dsv4Error):
    """An engine's option that dsv4 cannot serve."""


class EnvError(Dsv4Error):
    """A DSV4_* variable is unknown or has a bad value."""


class CompatError(Dsv4Error):
    """An engine's version or structure is outside what dsv4 was tested with."""


class OpUnavailableError(Dsv4Error):
    """No implementation of an operator runs on the device."""


class OpInputError(Dsv4Error):
    """An operator was given slots, lengths or ids outside what they index."""


class NotFiniteError(Dsv4Error):
    """A sublayer or the logits hold NaN or an infinity."""


class CheckImpossibleError(Dsv4Error):
    """DSV4_CHECK=1 where values cannot be read."""


class StatusError(Dsv4Error):
    """A server's status is not what this dsv4 reads."""
