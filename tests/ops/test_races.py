# SPDX-License-Identifier: Apache-2.0
"""No launch depends on the order of its programs, reads what another program writes, or leaves its
arguments."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from dsv4.model.kv_layout import IndexFormat, KvFormat
from dsv4.ops.attention.triton import sparse_attention
from dsv4.ops.compressor import paged as compressor
from dsv4.ops.compressor import summary
from dsv4.ops.compressor.paged import PagedState
from dsv4.ops.compressor.projected import EntryStep, Projected
from dsv4.ops.indexer.topk_triton import merge, topk
from dsv4.ops.kernels import KERNEL_MODULES, launched_kernels
from dsv4.ops.pages import BatchView, Selection, SlotMapping, load_rows
from dsv4.ops.rope import cos_sin
from tests.support.kernel_cases import assert_bytes_equal, make_pages
from tests.support.races import ORDERS, watched

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
FREQ = 1.6e5 ** (-torch.arange(0, 64, 2) / 64)


def plans() -> list[Any]:
    sys.path.insert(0, str(BENCHMARKS))
    import op_cases

    return op_cases.plans("cpu", small=True)


def bits(result: Any) -> list[Tensor]:
    """What a call returned, so that NaN equals itself."""
    tensors = [result] if isinstance(result, Tensor) else [x for x in result if isinstance(x, Tensor)]
    return [x.contiguous().view(torch.uint8) for x in tensors]


def run(plan: Any, order: str) -> tuple[list[Tensor], list[str], set[str]]:
    """The results of a case with its programs in this order, what was found, and the kernels
    launched."""
    torch.manual_seed(0)
    case = plan.build()
    with watched(order) as watch:
        result = bits(case.read(case.kernel()))
    return result, watch.findings, set(watch.launches)


@pytest.mark.parametrize("plan", plans(), ids=str)
def test_any_order_of_programs_gives_the_same_bits(plan: Any) -> None:
    expected, findings, _ = run(plan, "forward")
    assert findings == []
    for order in ORDERS[1:]:
        result, findings, _ = run(plan, order)
        assert findings == []
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True)), order


def top_k_of_long_rows() -> Tensor:
    """Two launches."""
    return topk(torch.randn(2, 8200), torch.tensor([8200, 3], dtype=torch.int32), 16)


def merged_long_rows() -> Tensor:
    return merge(torch.randn(2, 8200), torch.arange(8200, dtype=torch.int32).expand(2, -1).contiguous(), 16)


def split_attention() -> Tensor:
    """Three parts of each token's keys, some of them empty, and joining them."""
    pages = make_pages(KvFormat.PLAIN, 3, 64, 512)
    pages.data.copy_(torch.randn(pages.data.shape))
    slots = torch.randint(0, 192, (3, 70), dtype=torch.int32)
    window = Selection(pages, slots, torch.tensor([70, 0, 33], dtype=torch.int32))
    q = torch.randn(3, 20, 512).bfloat16()
    return sparse_attention(q, window, None, torch.randn(20), torch.randn(3, 64), num_splits=3)[0]


@pytest.mark.parametrize(
    ("call", "launches"),
    [
        (top_k_of_long_rows, ["topk", "topk"]),
        (merged_long_rows, ["topk", "topk"]),
        (split_attention, ["attend", "combine"]),
    ],
)
def test_what_takes_two_launches_is_the_same_in_any_order(call: Callable[[], Tensor], launches: list[str]) -> None:
    found = []
    for order in ORDERS:
        torch.manual_seed(0)
        with watched(order) as watch:
            found.append(call())
        assert watch.findings == []
        assert watch.launches == launches
    assert all(torch.equal(result, found[0]) for result in found)


def test_a_short_row_is_copied_by_the_last_launch_of_a_graph_that_was_captured_for_a_million_tokens() -> None:
    """Up to 8192 entries, a chunk, the first launch has found them: 32,768 tokens of context."""
    k, read = 512, []
    for n in (600, 8192, 8193):
        with watched() as watch:
            topk(torch.randn(1, 262_144), torch.tensor([n], dtype=torch.int32), k)
        assert watch.launches == ["topk", "topk"]
        read.append(watch.bytes_read[1])
    lens = indices = scores = 4
    assert read[:2] == [lens + k * indices] * 2
    assert read[2] == lens + (k + 1) * scores + k * indices  # the last chunk has one entry


def test_parts_that_a_short_context_leaves_empty_are_not_walked() -> None:
    """150 keys are 5 tiles of 32, however many parts a graph was captured with."""
    pages = make_pages(KvFormat.PLAIN, 3, 64, 512)
    pages.data.copy_(torch.randn(pages.data.shape))
    slots = torch.randint(0, 192, (1, 150), dtype=torch.int32)
    window = Selection(pages, slots, torch.tensor([150], dtype=torch.int32))
    q, sink, found, loads = torch.randn(1, 4, 512).bfloat16(), torch.randn(4), [], []
    for num_splits in (5, 64):
        with watched() as watch:
            found.append(sparse_attention(q, window, None, sink, torch.randn(1, 64) * 0, num_splits=num_splits)[0])
        assert watch.launches == ["attend", "combine"]
        loads.append(watch.loads[1])
    assert torch.equal(found[0], found[1])
    assert loads[0] == loads[1]


def entry_step(positions: Tensor, request: Tensor) -> tuple[EntryStep, Tensor]:
    """A step of a CSA layer, and the slot of the entry that each token completes, in one page
    table for all."""
    step = EntryStep(
        positions=positions,
        request_of_token=request,
        ratio=4,
        overlap=2,
        eps=1e-6,
        entry_cos_sin=cos_sin(positions // 4 * 4, FREQ),
    )
    return step, torch.where((positions + 1) % 4 == 0, positions // 4, -1).int()


def shared_pages_step() -> tuple[EntryStep, Tensor]:
    """Request 0 fills pages with positions 0..7; request 1, that hit them in the same step, goes on
    with 8..11."""
    positions = torch.cat([torch.arange(8), torch.arange(8, 12)])
    request = torch.tensor([0] * 8 + [1] * 4, dtype=torch.int32)
    return entry_step(positions, request)


def shared_pages_state(seed: int, dim: int, row_format: KvFormat | IndexFormat) -> PagedState:
    step, entry_slots = shared_pages_step()
    torch.manual_seed(seed)
    pages = make_pages(KvFormat.PLAIN, 4, 4, 4 * dim, torch.float32)
    slots = step.positions.int()  # page p holds positions 4p .. 4p + 3, of both requests
    table = torch.arange(3, dtype=torch.int32).expand(2, -1).contiguous()
    projected = Projected(torch.randn(12, 2 * dim), torch.randn(12, 2 * dim), torch.randn(4, 2 * dim), torch.ones(dim))
    entries = make_pages(row_format, 1, 64, dim)
    return PagedState(projected, SlotMapping(pages, slots), table, SlotMapping(entries, entry_slots))


def pooled_with(order: str, *, shared: bool) -> tuple[list[PagedState], list[str], list[str]]:
    step, _ = shared_pages_step()
    states = [shared_pages_state(0, 512, KvFormat.PLAIN), shared_pages_state(1, 128, IndexFormat.FP8)]
    with watched(order) as watch:
        compressor.update(states, step, shared=shared)
    return states, watch.findings, watch.launches


@pytest.mark.parametrize("order", ORDERS)
def test_a_page_that_another_request_fills_in_the_same_step_is_read_whole(order: str) -> None:
    """vLLM caches a block's hash when it schedules it, so a request may hit a page of this very
    step."""
    step, _ = shared_pages_step()
    states, findings, launches = pooled_with(order, shared=True)
    expected = [shared_pages_state(0, 512, KvFormat.PLAIN), shared_pages_state(1, 128, IndexFormat.FP8)]
    for state in expected:
        compressor.save_state(state.projected, step.positions, state.rows)
        compressor.compress_store([state], step)
    for ours, theirs in zip(states, expected, strict=True):
        assert_bytes_equal(ours.rows.pages, theirs.rows.pages)
        assert_bytes_equal(ours.entries.pages, theirs.entries.pages)
    assert findings == []
    assert launches == ["save_state", "save_state", "compress_store"]


def test_pages_that_nobody_shares_are_filled_and_read_in_one_launch() -> None:
    """On a batch that does share them, that is a race: found in any order, seen in the entries in
    some."""
    (in_order, _), findings, launches = pooled_with("forward", shared=False)
    assert findings == ["compress_store: a program reads what another writes"]
    assert launches == ["compress_store"]
    (in_reverse, _), findings, _ = pooled_with("reverse", shared=False)
    assert findings == ["compress_store: a program reads what another writes"]
    slots = torch.tensor([2], dtype=torch.int32)  # request 1's entry
    a, b = (load_rows(state.entries.pages, slots, 512, 64) for state in (in_order, in_reverse))
    assert not torch.equal(a, b)


def test_a_tail_that_another_request_fills_in_the_same_step_is_read_whole() -> None:
    """The same with summaries: request 0 fills page 0, request 1 goes on behind it."""
    positions = torch.cat([torch.arange(256), torch.arange(256, 264)])
    request = torch.tensor([0] * 256 + [1] * 8, dtype=torch.int32)
    step, entry_slots = entry_step(positions, request)
    starts, lens = torch.tensor([0, 256, 264]).int(), torch.tensor([256, 264]).int()
    found = []
    for order in ORDERS:
        torch.manual_seed(0)
        state = summary.SummaryState(
            Projected(torch.randn(264, 256), torch.randn(264, 256), torch.randn(4, 256), torch.ones(128)),
            kept=summary.SummaryPages(torch.full((2, 2, 3, 128), float("nan"))),
            state_page=torch.arange(2, dtype=torch.int32),
            tail=torch.full((2, 3, 128), float("nan")),
            block_table=torch.arange(2, dtype=torch.int32).expand(2, -1).contiguous(),
            entries=SlotMapping(make_pages(IndexFormat.PLAIN, 2, 64, 128), entry_slots),
        )
        with watched(order) as watch:
            summary.compress([state], step, BatchView(starts, lens, 264, 2, 264, 256))
        assert watch.findings == []
        found.append((state.entries.pages, state.kept.summaries))
    behind_the_tail = torch.tensor([64, 65], dtype=torch.int32)
    for entries, kept in found:
        assert load_rows(entries, behind_the_tail, 128, 0).isfinite().all()
        assert_bytes_equal(entries, found[0][0])
        assert torch.equal(kept, found[0][1])


def test_every_kernel_that_serves_was_watched() -> None:
    served = {kernel.__name__.removesuffix("_kernel") for kernel in launched_kernels(KERNEL_MODULES)}
    seen = set().union(*(run(plan, "forward")[2] for plan in plans()))
    # `save_state` is launched where requests share pages, `combine` where attention is split.
    assert served <= seen | {"save_state", "combine"}


# ---- the detector itself -------------------------------------------------------------------


def interpreted(function: Any) -> Any:
    return InterpretedFunction(function)


def neighbour(x, y, N: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0)
    tl.store(x + at, at.to(tl.float32))
    tl.store(y + at, tl.load(x + (at + 1) % N))


def everyone_writes_the_first(x, y, N: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.store(x, tl.program_id(0).to(tl.float32))


def reads_its_own(x, y, N: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * 4 + tl.arange(0, 4)
    tl.store(x + at, at.to(tl.float32))
    tl.store(y + at, tl.load(x + tl.program_id(0) * 4 + 3 - tl.arange(0, 4)))


def reads_its_own_behind_a_barrier(x, y, N: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * 4 + tl.arange(0, 4)
    tl.store(x + at, at.to(tl.float32))
    tl.debug_barrier()
    tl.store(y + at, tl.load(x + tl.program_id(0) * 4 + 3 - tl.arange(0, 4)))


def turns_in_place(x, y, N: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * 4
    tl.store(x + at + tl.arange(0, 4), tl.load(x + at + 3 - tl.arange(0, 4)))


def writes_twice_at_once(x, y, N: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.store(x + tl.program_id(0) * 4 + tl.arange(0, 4) // 2, 1.0)


def reads_beyond(x, y, N: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.load(x + 16 + tl.program_id(0))


def masked(x, y, N: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.load(x + 16 + tl.program_id(0), mask=tl.program_id(0) < 0)


@pytest.mark.parametrize(
    ("kernel", "found"),
    [
        (neighbour, ["a program reads what another writes"]),
        (everyone_writes_the_first, ["two programs write the same byte"]),
        (reads_its_own, ["a program reads what it wrote, with no barrier between"]),
        (reads_its_own_behind_a_barrier, []),
        (turns_in_place, ["a program writes what it read, with no barrier between"]),
        (writes_twice_at_once, ["one store writes a byte twice"]),
        (reads_beyond, ["a load outside every argument"]),
        (masked, []),
    ],
)
@pytest.mark.parametrize("order", ORDERS)
def test_the_detector_sees_each_kind_of_hazard(kernel: Any, found: list[str], order: str) -> None:
    x, y = torch.zeros(16), torch.zeros(16)
    with watched(order) as watch:
        interpreted(kernel)[(4,)](x, y, N=4)
    assert watch.findings == [f"{kernel.__name__}: {what}" for what in found]
