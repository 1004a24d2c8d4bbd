# SPDX-License-Identifier: Apache-2.0
"""Ranks that hold the same index keys share the work of choosing: each scores some of a step's
tokens, and all are told every choice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

# Where sharing is quicker, by the estimates in docs/kernels.md: scoring and choosing cost 0.12 ns a
# token and entry on an A100, telling a choice 0.1 us a token over PCIe 4.0 and 0.1 ms a step. Two
# ranks break even at 1,750 entries, and at 1.7 million tokens times entries; here it is twice both.
LEAST_ENTRIES = 4096
LEAST_SCORES = 1 << 22
# No step that an engine captures into a graph is longer: its host bound is the longest context that
# it may ever meet, not that of its requests.
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

    def share(self, num_tokens: int, max_entries: int) -> bool:
        """Whether to, in a step of so many tokens: the same on every rank."""
        if self.when != "auto":
            return self.when == "on"
        return (
            num_tokens > MOST_CAPTURED_TOKENS
            and max_entries >= LEAST_ENTRIES
            and num_tokens * max_entries >= LEAST_SCORES
        )
