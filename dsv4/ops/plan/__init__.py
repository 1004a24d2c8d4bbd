# SPDX-License-Identifier: Apache-2.0
"""What a step's batch and block tables mean for the operators: slots, lengths and rotary tables,
made once for all layers.

A step's plan lies in memory that is new (`Room`), or as old as the engine (`GraphBuffers`), so that
captured CUDA graphs read the values of the step being replayed.
"""

from __future__ import annotations

from collections.abc import Sequence

from dsv4.ops.pages import BatchView
from dsv4.ops.plan import reference
from dsv4.ops.plan.caches import BlockCache, EntryCache, EntryPlan, RowCache, WindowCache, WindowPlan
from dsv4.ops.plan.reference import Cache, CachePlan, RopeTables, StepPlan
from dsv4.ops.plan.rings import RingPlan, Rings, plan_many
from dsv4.ops.plan.room import GraphBuffers, Room
from dsv4.ops.plan.tokens import Homes, TokenPlan, plan_tokens
from dsv4.ops.registry import operator

step = operator("plan.step", reference.step, triton="dsv4.ops.plan.triton:step")
page_tables = operator("plan.page_tables", reference.page_tables, triton="dsv4.ops.plan.triton:page_tables")
rope_tables = operator("plan.rope_tables", reference.rope_tables, triton="dsv4.ops.plan.triton:rope_tables")


def planned(batch: BatchView, caches: Sequence[Cache], homes: Homes | None = None) -> StepPlan:
    """The plan of a step in memory of its own, in one launch."""
    room = Room(batch)
    plan = StepPlan(TokenPlan.empty(room), tuple(cache.empty(batch, room) for cache in caches))
    step(batch, caches, plan, homes)
    return plan


__all__ = [
    "BlockCache",
    "Cache",
    "CachePlan",
    "EntryCache",
    "EntryPlan",
    "GraphBuffers",
    "Homes",
    "RingPlan",
    "Rings",
    "RopeTables",
    "Room",
    "RowCache",
    "StepPlan",
    "TokenPlan",
    "WindowCache",
    "WindowPlan",
    "page_tables",
    "plan_many",
    "plan_tokens",
    "planned",
    "rope_tables",
    "step",
]
