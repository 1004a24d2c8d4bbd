# SPDX-License-Identifier: Apache-2.0
"""Ranks that hold the same index keys share the work of choosing: each scores some of a step's
tokens, and all are told every choice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

from torch import Tensor

from dsv4.machine import env

# Where sharing is quicker, if scoring and choosing cost 0.07 ns a token and entry on an A100, and
# telling a choice 0.1 us a token over PCIe 4.0 and 0.1 ms a step: guesses, of which none was
# measured. Two ranks then break even at 2,900 entries, and at 2.9 million tokens times entries.
LEAST_ENTRIES = 4096
LEAST_SCORES = 1 << 22
# No step that vLLM captures into a graph is longer: the host bound of one is the longest context
# that it may ever meet, not that of its requests.
MOST_CAPTURED_TOKENS = 512


@dataclass(frozen=True)
class Ranks:
    """This rank among those of its tensor-parallel group.

    gather: [n, k] int32 of each rank to [size * n, k], in the order of ranks
    when: auto: in steps where it pays
    """

    rank: int
    size: int
    gather: Callable[[Tensor], Tensor]
    when: Literal["auto", "on", "off"] = "auto"

    @staticmethod
    def of(rank: int, size: int, gather: Callable[[Tensor], Tensor]) -> Ranks | None:
        """As DSV4_SHARE_INDEX says; None for a rank that has no others."""
        return Ranks(rank, size, gather, cast(Any, env.get("DSV4_SHARE_INDEX"))) if size > 1 else None

    def share(self, num_tokens: int, max_entries: int) -> bool:
        """Whether to, in a step of so many tokens: the same on every rank."""
        if self.when != "auto":
            return self.when == "on"
        return (
            num_tokens > MOST_CAPTURED_TOKENS
            and max_entries >= LEAST_ENTRIES
            and num_tokens * max_entries >= LEAST_SCORES
        )
