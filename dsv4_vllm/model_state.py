# SPDX-License-Identifier: Apache-2.0
"""Where vLLM's model runner V2 prepares a step for all groups of caches at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from dsv4_vllm.metadata import PlannedStep, V4MetadataBuilder


class V4ModelState(DefaultModelState):
    """vLLM's own, but that our builders get one plan between them.

    vLLM calls each group's builder by itself, with nothing that tells one step from the next; this
    call is one step, and has all their block tables.
    """

    def prepare_attn(
        self,
        input_batch: Any,
        cudagraph_mode: Any,
        block_tables: tuple[Tensor, ...],
        slot_mappings: Tensor,
        attn_groups: Sequence[Sequence[Any]],
        *args: Any,
        ubatch_idx: int = 0,
        **kwargs: Any,
    ) -> dict[str, Any]:
        tables = [
            (builder, table)
            for groups, table in zip(attn_groups, block_tables, strict=True)
            for builder in (group.get_metadata_builder(ubatch_idx) for group in groups)
            if isinstance(builder, V4MetadataBuilder)
        ]
        self.model.kernel_warm_up.plan = tables
        with one_plan(tables):
            metadata: dict[str, Any] = super().prepare_attn(
                input_batch,
                cudagraph_mode,
                block_tables,
                slot_mappings,
                attn_groups,
                *args,
                ubatch_idx=ubatch_idx,
                **kwargs,
            )
        return metadata


@contextmanager
def one_plan(tables: Sequence[tuple[V4MetadataBuilder, Tensor]]) -> Iterator[None]:
    """While it lasts, the builders build one step."""
    step = PlannedStep(tables)
    for builder, _ in tables:
        builder.planned_step = step
    try:
        yield
    finally:
        for builder, _ in tables:
            builder.planned_step = None
