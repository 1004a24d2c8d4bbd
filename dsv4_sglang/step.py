# SPDX-License-Identifier: Apache-2.0
"""The plan of one step, as the attention backend makes it and layers and caches read it."""

from __future__ import annotations

from dataclasses import dataclass

from dsv4.ops import plan


@dataclass(frozen=True)
class StepMetadata:
    """One step. entries, rings: by compress ratio, compressed entries and their open windows."""

    tokens: plan.TokenPlan
    window: plan.WindowPlan
    entries: dict[int, plan.EntryPlan]
    rings: dict[int, plan.RingPlan]
