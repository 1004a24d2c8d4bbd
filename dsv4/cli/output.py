# SPDX-License-Identifier: Apache-2.0
"""What every command prints with, and ends with."""

from __future__ import annotations

from rich.console import Console

CHECK_FAILED = 1
BAD_INPUT = 2


def console() -> Console:
    """Console for human output: no markup surprises in paths, no wrapping when piped."""
    return Console(highlight=False, markup=False, soft_wrap=True)
