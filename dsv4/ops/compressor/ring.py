# SPDX-License-Identifier: Apache-2.0
"""Compressor state in rings: only the open windows are kept, not a row per cached token.

A ring has `windows` pages of `ratio` rows: the two windows that a CSA entry pools, or the one of an
HCA entry. Whoever owns a ring (a window page, a request) finds it by `owner_table`. A step of one
token per request pools straight from the rings. A longer step would overwrite rows that its own
entries still need, so its rows, and the open windows before them, go through scratch memory, and
only the windows that stay open are written back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from dsv4.ops.compressor.paged import PagedState, save_state, update
from dsv4.ops.compressor.projected import EntryStep, Projected
from dsv4.ops.pages import Pages, SlotMapping
from dsv4.ops.plan import RingPlan


@dataclass(frozen=True)
class RingState:
    """Raw rows of the open windows alone, in rings.

    rings: fp32 rows [P, ratio, 2 * overlap * D]
    scratch: at least plan.num_pages pages of that shape; None when the plan needs none
    entries: where the entry that each token completes goes
    """

    projected: Projected
    rings: Pages
    scratch: Pages | None
    entries: SlotMapping


def compress_step(states: Sequence[RingState], plan: RingPlan, step: EntryStep) -> None:
    """Save the step's rows, pool the entries that it completes, and keep what later steps need.

    states: all caches of a layer
    """
    update([_paged(state, plan) for state in states], replace(step, positions=plan.positions))
    if plan.keep_slot_mapping is not None:
        for state in states:
            save_state(state.projected, plan.positions, SlotMapping(state.rings, plan.keep_slot_mapping))


def _paged(state: RingState, plan: RingPlan) -> PagedState:
    """What entries are pooled from: the rings, or scratch that the rows they need are copied to."""
    pages = state.rings
    if plan.keep_slot_mapping is not None:
        assert state.scratch is not None
        pages = state.scratch
        pages.data.flatten(0, 1)[plan.carry_to] = state.rings.data.flatten(0, 1)[plan.carry_from]
    return PagedState(state.projected, SlotMapping(pages, plan.slot_mapping), plan.block_table, state.entries)
