# SPDX-License-Identifier: Apache-2.0
"""What a run with drafts is held against: the run without them, and the reference's proposals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dsv4.reference.draft import ReferenceDraft
from tests.support.comparison import request

# Two logits of a draft that is within the 2e-4 of every comparison here differ from the reference's
# gap by 4e-4 at most; a choice by less than this may fall the other way.
TIE = 1e-3


def prompts(text: list[int], lengths: tuple[int, ...], new: int) -> list[dict[str, Any]]:
    """Requests of these lengths for `new` tokens each, all ends of `text`."""
    return [request(text[-n:], new, prompt_logprobs=False) for n in lengths]


def tokens(result: dict[str, Any]) -> list[list[int]]:
    return [r["tokens"] for phase in result["phases"] for r in phase]


def whole(result: dict[str, Any]) -> list[list[int]]:
    return [r["prompt"] + r["tokens"] for phase in result["phases"] for r in phase]


@dataclass
class Proposals:
    """Of an engine, against the reference's: how many are the same, a tie of the reference, or
    neither (by the length of the sequence)."""

    same: int
    ties: int
    other: list[int]


def compare_proposals(result: dict[str, Any], reference: ReferenceDraft, k: int) -> Proposals:
    found, served = Proposals(0, 0, []), whole(result)
    for row in result["drafts"]:
        before = row["before"]
        # What ends with a step goes through the next one too, from pages that may be another's.
        if before is None or not any(before == ids[: len(before)] for ids in served):
            continue
        want = reference.propose(row["before"], k)
        gaps = want.logits.topk(2).values.diff(dim=-1).abs()[:, 0]
        if not bool((gaps > TIE).all()):
            found.ties += 1
        elif row["own"] == want.tokens:
            found.same += 1
        else:
            found.other.append(len(row["before"]))
    return found
