# SPDX-License-Identifier: Apache-2.0
"""Plain-PyTorch reference of the plan: what a step's batch and block tables mean for the operators.

Everything is computed on the batch's device without a host synchronisation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from dsv4.model.config import CSA_RATIO, HCA_RATIO
from dsv4.ops.pages import BatchView
from dsv4.ops.plan.caches import BlockCache, EntryCache, EntryPlan, RowCache, WindowCache, WindowPlan
from dsv4.ops.plan.rings import RingPlan, Rings
from dsv4.ops.plan.tokens import Homes, TokenPlan, plan_tokens
from dsv4.ops.rope import cos_sin

Kind = TypeVar("Kind")
Cache = WindowCache | BlockCache | EntryCache | RowCache | Rings
CachePlan = WindowPlan | EntryPlan | RingPlan | Tensor


@dataclass(frozen=True)
class StepPlan:
    """The plan of a step: of its tokens, and of each cache that was asked for."""

    tokens: TokenPlan
    caches: tuple[CachePlan, ...]

    def of(self, kind: type[Kind]) -> list[Kind]:
        """Those of one kind, in their order."""
        return [each for each in self.caches if isinstance(each, kind)]


def step(batch: BatchView, caches: Sequence[Cache], plan: StepPlan, homes: Homes | None = None) -> None:
    """Write the plan of a step into the memory that `plan` is, whose caches are those of `caches`.

    homes: where the engine keeps each token; one that is at home nowhere is padding
    Rings are planned for one token per request, see `rings.plan_many` for more.
    """
    tokens = plan_tokens(batch, homes)
    plan.tokens.fill(tokens)
    for cache, made in zip(caches, plan.caches, strict=True):
        cache.fill(made, tokens)  # type: ignore[arg-type]  # each made its own


def page_tables(
    places: Tensor, requests: Tensor, to_window: Tensor, full: Tensor, window: Tensor, *, page_tokens: int, columns: int
) -> None:
    """The first `columns` of each request's page tables, from where its tokens are.

    places: [N, C] int, where token c of request n is kept; requests: [R] int, rows of it
    to_window: [P] int, the place in the window pool of each place; -1 for none, which is page 0
    full, window: [R, >= columns] int32, pages of either pool; written. Behind a request's last page
    they mean nothing.
    """
    starts = places[requests.long(), : columns * page_tokens : page_tokens].long()
    full[:, :columns] = starts // page_tokens
    window[:, :columns] = to_window[starts].clamp(min=0) // page_tokens


@dataclass(frozen=True)
class RopeTables:
    """cos/sin rows of a step, [T, rope_dim] fp32 each: at the token's position with the frequencies
    of window-only and of compressed layers, and at the first position of the entry that the token
    belongs to, per ratio."""

    window: Tensor
    compressed: Tensor
    entry: dict[int, Tensor]


def rope_tables(positions: Tensor, window_freq: Tensor, compressed_freq: Tensor) -> RopeTables:
    """positions: [T]; window_freq, compressed_freq: [rope_dim / 2] fp32, of the two kinds of
    layers."""
    entry = {m: cos_sin(positions // m * m, compressed_freq) for m in (CSA_RATIO, HCA_RATIO)}
    return RopeTables(cos_sin(positions, window_freq), cos_sin(positions, compressed_freq), entry)
