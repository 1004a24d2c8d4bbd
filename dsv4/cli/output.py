# SPDX-License-Identifier: Apache-2.0
"""What every command prints with, and ends with."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import click

from dsv4.errors import HardwareError, PlanError

if TYPE_CHECKING:
    from rich.console import Console

CHECK_FAILED = 1
BAD_INPUT = 2
SCHEMA_VERSION = 1  # of what --json prints; raised when a field goes or changes its meaning
T = TypeVar("T")


def json_option(f: Callable[..., T]) -> Callable[..., T]:
    """The option --json, which every command has, as argument `as_json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(f)


def print_json(facts: Mapping[str, Any]) -> None:
    """Print `facts` as one object that says its schema_version first."""
    click.echo(json.dumps({"schema_version": SCHEMA_VERSION, **facts}, indent=2))


def console() -> Console:
    """Console for human output: no markup surprises in paths, no wrapping when piped."""
    from rich.console import Console

    return Console(highlight=False, markup=False, soft_wrap=True)


@contextmanager
def named(option: str | None = None) -> Iterator[None]:
    """Put before an error's message the option whose value it refuses: `option`, or that of the
    error's own field.
    """
    try:
        yield
    except HardwareError as e:
        raise HardwareError(f"{option} {e}") from e
    except PlanError as e:
        found = f"--{e.field.replace('_', '-')}" if e.field else option
        raise PlanError(f"{found} {e.reason}" if found else e.reason) from e
