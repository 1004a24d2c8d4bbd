# SPDX-License-Identifier: Apache-2.0
"""The error types of dsv4: each message says what, where, what was found and what to do."""


class Dsv4Error(Exception):
    """Base of every error a user can cause; the CLI prints it on one line and exits 2."""


class ConfigError(Dsv4Error):
    """config.json is malformed or contradicts itself."""


class UnsupportedCheckpointError(ConfigError):
    """A well-formed checkpoint of a family that dsv4 does not serve."""


class CheckpointError(Dsv4Error):
    """Tensors on disk do not match config.json."""


class EnvError(Dsv4Error):
    """A DSV4_* variable is unknown or has a bad value."""


class CompatError(Dsv4Error):
    """An engine's version or structure is outside what dsv4 was tested with."""


class OpUnavailableError(Dsv4Error):
    """No implementation of an operator runs on the device."""


class OpInputError(Dsv4Error):
    """An operator was given slots, lengths or ids outside what they index."""


class CheckImpossibleError(Dsv4Error):
    """DSV4_CHECK=1 where values cannot be read."""
