# SPDX-License-Identifier: Apache-2.0
"""What vLLM's description of a step becomes for the operators."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dsv4.ops import plan
from dsv4_vllm.metadata import EntryBuilder, StateBuilder, SummaryBuilder, V4MetadataBuilder, WindowBuilder
from dsv4_vllm.model_state import one_plan


def builder(kind: type[V4MetadataBuilder], **spec: int) -> Any:
    made: Any = kind.__new__(kind)
    made.buffers, made.token_buffers = plan.GraphBuffers(16, 2), plan.GraphBuffers(16, 2)
    made.kv_cache_spec, made.max_model_len, made.index_topk = SimpleNamespace(**spec), 2048, 16
    return made


def described(starts: list[int], lens: list[int], table: torch.Tensor) -> Any:
    """One group's description of a step of two requests."""
    return SimpleNamespace(
        query_start_loc=torch.tensor(starts, dtype=torch.int32),
        seq_lens=torch.tensor(lens, dtype=torch.int32),
        block_table_tensor=table,
        num_actual_tokens=starts[-1],
        num_reqs=2,
        max_seq_len=max(lens),
        max_query_len=int(torch.tensor(starts).diff().max()),
        causal=True,
    )


def table(columns: int, first: int = 0) -> torch.Tensor:
    return torch.arange(first, first + 2 * columns, dtype=torch.int32).view(2, columns)


@pytest.mark.parametrize(("starts", "shared"), [([0, 1, 2], False), ([0, 1, 3], True), ([0, 8, 12], True)])
def test_rows_may_be_shared_in_every_step_with_more_than_one_token_of_a_request(
    starts: list[int], shared: bool
) -> None:
    """Request 1 of the last batch has hit what request 0 fills in the same step."""
    assert builder(StateBuilder, block_size=4).build(0, described(starts, [8, 12], table(3))).shared is shared


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many caches each launch plans."""
    launches: list[int] = []
    step = plan.step

    def counting(batch: Any, caches: Any, made: Any) -> None:
        launches.append(len(caches))
        step(batch, caches, made)

    with monkeypatch.context() as patch:
        patch.setattr(plan, "step", counting)
        yield launches


def groups() -> list[tuple[Any, torch.Tensor]]:
    """Two groups of windows, both kinds of entries, index keys, and summaries."""
    window = {"block_size": 64, "sliding_window": 128}
    return [
        (builder(WindowBuilder, **window), table(20)),
        (builder(WindowBuilder, **window), table(20, 100)),
        (builder(EntryBuilder, block_size=256, tokens_per_state=4), table(8)),
        (builder(EntryBuilder, block_size=256, tokens_per_state=4), table(8, 50)),
        (builder(EntryBuilder, block_size=256, tokens_per_state=128), table(8, 90)),
        (builder(SummaryBuilder), table(1)),
    ]


def test_all_groups_of_a_step_are_planned_at_once_and_as_each_would_be(monkeypatch: pytest.MonkeyPatch) -> None:
    together, alone = groups(), groups()
    for starts, lens in (([0, 1, 2], [300, 1000]), ([0, 5, 6], [5, 129])):
        steps = [described(starts, lens, tables) for _, tables in together]
        with counted(monkeypatch) as launches, one_plan(together):
            made = [builder.build(0, step) for (builder, _), step in zip(together, steps, strict=True)]
        assert launches == [5]
        with counted(monkeypatch) as launches:
            expected = [builder.build(0, step) for (builder, _), step in zip(alone, steps, strict=True)]
        assert launches == [1] * 5
        for one, two in zip(made, expected, strict=True):
            assert tensors(one)
            assert all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(two), strict=True))


def tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for each in vars(value).values() for t in tensors(each)] if hasattr(value, "__dict__") else []


def test_a_step_ends_with_the_call_that_prepares_it() -> None:
    """Nothing of a step that failed is left for the next."""
    made = groups()

    def failing() -> None:
        with one_plan(made):
            made[0][0].build(0, described([0, 1, 2], [300, 1000], made[0][1]))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    assert all(builder.planned_step is None for builder, _ in made)


def test_buffers_keep_their_place_and_refuse_what_does_not_fit() -> None:
    made = builder(WindowBuilder, block_size=64, sliding_window=128)
    first = made.build(0, described([0, 1, 2], [300, 1000], table(20))).window
    again = made.build(0, described([0, 8, 9], [300, 1000], table(20))).window
    assert first.slots.data_ptr() == again.slots.data_ptr()
    with pytest.raises(ValueError, match="17 rows do not fit the 16 planned for this deployment"):
        made.build(0, described([0, 8, 17], [300, 1000], table(20)))
