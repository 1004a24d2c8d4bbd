# SPDX-License-Identifier: Apache-2.0
"""DSV4_CHECK=1 names the request and layer that held a bad slot, length or id, whoever serves the
operator."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch

from dsv4.errors import CheckImpossibleError, NotFiniteError, OpInputError
from dsv4.model.kv_layout import IndexFormat, KvFormat
from dsv4.ops import attention, check, indexer, moe, registry
from dsv4.ops.compressor import paged as compressor
from dsv4.ops.compressor import summary
from dsv4.ops.compressor.projected import EntryStep, Projected
from dsv4.ops.pages import BatchView, Pages, PageTable, Selection, SlotMapping
from tests.support.kernel_cases import fill_pages, make_pages

CPU = torch.device("cpu")
Ints = tuple[Any, ...]
LAYER = "model.layers.7.attn"
# Arguments that index memory; a new operator that takes one needs a rule.
INDEXING = ("slots", "slot_mapping", "lens", "input_ids", "state_page")


def ints(*values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.fixture(params=["triton", "reference"])
def checked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The mode is on, in a layer of a step whose first two tokens are of request 4 and whose third
    is of request 5."""
    monkeypatch.setenv("DSV4_CHECK", "1")
    monkeypatch.setenv("DSV4_OPS", request.param)
    monkeypatch.setattr(check, "_place", None)
    check.enabled.cache_clear()
    registry.forget_choices()
    check.enter_layer(LAYER, ints(4, 4, 5))
    yield
    check.enabled.cache_clear()


def window() -> Pages:
    pages = make_pages(KvFormat.FP8_DS_MLA, 1, 64, 512)
    fill_pages(pages, torch.arange(64), torch.randn(64, 512), 64)
    return pages


def norm_rope_store(slots: Ints = (0, -1, 63)) -> None:
    q, kv = torch.randn(3, 8, 512).bfloat16(), torch.randn(3, 512).bfloat16()
    attention.norm_rope_store(q, kv, torch.ones(512), 1e-6, torch.zeros(3, 64), SlotMapping(window(), ints(*slots)))


def sparse(
    slots: Ints = ((0, 63, 1 << 20), (1, -1, 2), (0, 0, 0)),
    lens: Ints = (2, 3, 0),
    entry_slots: Ints = ((0, 64), (5, -1)),
    entry_row: Ints = (0, 1, 1),
    entry_lens: Ints = (1, 2, 2),
) -> None:
    pages = window()
    q = torch.randn(3, 8, 512).bfloat16()
    entries = Selection(pages, ints(*entry_slots), ints(*entry_lens), ints(*entry_row))
    attention.sparse_attention(q, Selection(pages, ints(*slots), ints(*lens)), entries, torch.zeros(8))


def state_and_cache() -> tuple[Pages, Pages]:
    state = make_pages(KvFormat.PLAIN, 4, 4, 4 * 512, torch.float32)
    fill_pages(state, torch.arange(16), torch.randn(16, 4 * 512), 0)
    return state, make_pages(KvFormat.FP8_DS_MLA, 1, 64, 512)


def projected() -> Projected:
    kv = torch.randn(3, 1024)
    return Projected(kv, kv, torch.randn(4, 1024), torch.ones(512))


def entry_step(requests: Ints, positions: Ints) -> EntryStep:
    return EntryStep(
        positions=torch.tensor(positions),
        request_of_token=ints(*requests),
        ratio=4,
        overlap=2,
        eps=1e-6,
        entry_cos_sin=torch.zeros(3, 64),
    )


def save_state(slots: Ints = (0, -1, 15)) -> None:
    compressor.save_state(projected(), torch.tensor([1, 2, 3]), SlotMapping(state_and_cache()[0], ints(*slots)))


def compress_store(slots: Ints = (-1, -1, 63)) -> None:
    state, cache = state_and_cache()
    rows, entries = SlotMapping(state, ints(0, 1, 15)), SlotMapping(cache, ints(*slots))
    paged = compressor.PagedState(projected(), rows, ints([0, 1], [2, 3]), entries)
    compressor.compress_store([paged], entry_step((1, 1, 0), (2, 3, 3)))


def update(state_slots: Ints = (0, 1, 15), slots: Ints = (-1, -1, 63)) -> None:
    state, cache = state_and_cache()
    rows, entries = SlotMapping(state, ints(*state_slots)), SlotMapping(cache, ints(*slots))
    paged = compressor.PagedState(projected(), rows, ints([0, 1], [2, 3]), entries)
    compressor.update([paged], entry_step((1, 1, 0), (2, 3, 3)))


def summarise(state_page: Ints = (1, 0), slots: Ints = (-1, -1, 63)) -> None:
    batch = BatchView(ints(0, 2, 3), ints(2, 4), 3, 2, 4, 2)
    state = summary.SummaryState(
        projected(),
        kept=summary.SummaryPages(torch.zeros(2, 2, 3, 512)),
        state_page=ints(*state_page),
        tail=torch.zeros(2, 3, 512),
        block_table=ints([0], [1]),
        entries=SlotMapping(make_pages(KvFormat.PLAIN, 2, 64, 512, torch.float32), ints(*slots)),
    )
    summary.compress([state], entry_step((0, 0, 1), (0, 1, 3)), batch)


def select(lens: Ints = (64, 0, 3)) -> None:
    keys = make_pages(IndexFormat.FP8, 2, 64, 128)
    fill_pages(keys, torch.arange(128), torch.randn(128, 128), 0)
    query = indexer.prepare_query(
        torch.randn(3, 16, 128).bfloat16(), torch.randn(3, 16), torch.zeros(3, 64), IndexFormat.FP8
    )
    table = PageTable(keys, ints([0], [1]))
    indexer.select(query, table, table, ints(0, 0, 1), ints(*lens), max_entries=64, k=16)


def choose(lens: Ints = (8, 0, 3)) -> None:
    registry.OPERATORS["indexer.topk"].choice(CPU).function(torch.randn(3, 8), ints(*lens), 4)


def route(ids: Ints = (0, 1, 2, 0)) -> None:
    """Four tokens: the last is a graph's padding."""
    moe.route_hash(torch.randn(4, 8), torch.randint(0, 8, (3, 2), dtype=torch.int32), torch.tensor(ids), 1.0)


GOOD = [norm_rope_store, sparse, save_state, compress_store, update, summarise, select, choose, route]
BAD: list[tuple[Callable[..., None], dict[str, Ints], str]] = [
    (
        norm_rope_store,
        {"slots": (0, -1, 64)},
        "attention.norm_rope_store in {}: slot out of range at request 5, token 2, place 0: 64",
    ),
    (
        norm_rope_store,
        {"slots": (0, -2, 63)},
        "request 4, token 1, place 0: -2; allowed: -1 or 0 .. 63 (1 pages of 64 rows)",
    ),
    (
        sparse,
        {"lens": (3, 3, 0)},
        f"attention.sparse in {{}}: slot out of range at request 4, token 0, place 2: {1 << 20}",
    ),
    (sparse, {"lens": (2, 4, 0)}, "length out of range at request 4, token 1, place 0: 4; allowed: 0 .. 3"),
    (sparse, {"lens": (2, 3, -1)}, "length out of range at request 5, token 2, place 0: -1"),
    (sparse, {"entry_lens": (2, 2, 2)}, "slot out of range at request 4, token 0, place 1: 64"),
    (sparse, {"entry_row": (0, 1, 2)}, "row of slots out of range at request 5, token 2, place 0: 2; allowed: 0 .. 1"),
    (
        save_state,
        {"slots": (0, -1, 16)},
        "compressor.save_state in {}: slot out of range at request 5, token 2, place 0: 16",
    ),
    # Given whose tokens they are, an operator says that: a part of a step is counted from its own
    # start.
    (
        compress_store,
        {"slots": (-1, 64, -1)},
        "compressor.compress_store in {}: slot out of range at request 1, token 1, place 0: 64",
    ),
    (
        update,
        {"state_slots": (0, 1, 99)},
        "compressor.update in {}: slot out of range at request 0, token 2, place 0: 99",
    ),
    (update, {"slots": (-1, 64, -1)}, "compressor.update in {}: slot out of range at request 1, token 1, place 0: 64"),
    (
        summarise,
        {"state_page": (1, 2)},
        "summary.compress in {}: state page out of range at request 1, place 0: 2; allowed: 0 .. 1",
    ),
    (
        summarise,
        {"slots": (-1, -1, 128)},
        "summary.compress in {}: slot out of range at request 1, token 2, place 0: 128",
    ),
    (
        select,
        {"lens": (64, 0, 65)},
        "indexer.logits in {}: number of entries out of range at request 1, token 2, place 0: 65",
    ),
    (
        choose,
        {"lens": (9, 0, 3)},
        "indexer.topk in {}: number of entries out of range at request 4, token 0, place 0: 9",
    ),
    (route, {"ids": (0, 3, 1, 0)}, "moe.route_hash in {}: token id out of range at request 4, token 1, place 0: 3"),
    (route, {"ids": (0, 1, 1, -1)}, "token id out of range at token 3, place 0: -1"),
]


@pytest.mark.usefixtures("checked")
@pytest.mark.parametrize("call", GOOD, ids=lambda call: call.__name__)
def test_what_is_in_range_passes(call: Callable[[], None]) -> None:
    call()


@pytest.mark.usefixtures("checked")
@pytest.mark.parametrize(
    ("call", "bad", "message"),
    BAD,
    ids=[f"{call.__name__}-{'-'.join(bad)}-{i}" for i, (call, bad, _) in enumerate(BAD)],
)
def test_what_is_not_is_reported_with_its_request_and_layer(
    call: Callable[..., None], bad: dict[str, Ints], message: str
) -> None:
    with pytest.raises(OpInputError) as raised:
        call(**bad)
    assert message.format(LAYER) in str(raised.value)


@pytest.mark.usefixtures("checked")
def test_many_bad_slots_are_counted() -> None:
    pages, slots = make_pages(KvFormat.PLAIN, 1, 4, 16, torch.float32), torch.arange(4, 24, dtype=torch.int32)
    kv = torch.randn(20, 8)
    given = Projected(kv, kv, torch.randn(4, 8), torch.ones(8))
    with pytest.raises(OpInputError, match="token 7, place 0: 11 and 12 more"):
        compressor.save_state(given, torch.arange(20), SlotMapping(pages, slots))


@pytest.mark.usefixtures("checked")
def test_a_graph_under_capture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(
        CheckImpossibleError, match=r"indexer\.topk: DSV4_CHECK=1 .* --enforce-eager.*--disable-cuda-graph"
    ):
        choose()


@pytest.mark.usefixtures("checked")
def test_no_graph_is_promised_and_the_choice_says_that_it_is_checked() -> None:
    assert not registry.all_kernels(CPU, frozenset(registry.OPERATORS))
    route()
    assert registry.report()["moe.route_hash"]["reason"].endswith("; checked")


def test_without_the_mode_the_operators_own_functions_are_called() -> None:
    for name, op in registry.OPERATORS.items():
        function = op.choice(CPU).function
        assert function is inspect.unwrap(function), name
    choose((9, 0, 3))


def implementations() -> list[tuple[str, Callable[..., Any]]]:
    return [
        (op, getattr(importlib.import_module(offer.target.partition(":")[0]), offer.target.partition(":")[2]))
        for op, declared in registry.OPERATORS.items()
        for offer in declared.offers
    ]


STATES = {"compressor": compressor.PagedState, "summary": summary.SummaryState}


def arguments(op: str, function: Callable[..., Any]) -> set[str]:
    """Names of the arguments, and of the fields of what a sequence of states holds."""
    names = set(inspect.signature(function).parameters)
    if "states" in names:
        names |= {f.name for f in fields(STATES[op.partition(".")[0]])}
    return names


def rules_of(op: str) -> list[check.Within]:
    rules: list[check.Within] = []
    for rule in check.RULES.get(op, ()):
        rules += rule.rules if isinstance(rule, check.Each) else [rule]
    return rules


def test_every_argument_that_indexes_memory_has_a_rule() -> None:
    for op, function in implementations():
        named = {v for rule in rules_of(op) for v in vars(rule).values()}
        missing = {name for name in arguments(op, function) if name.endswith(INDEXING)} - named
        assert not missing, f"{op}: check.RULES has no rule for {missing}"


def test_rules_name_arguments_that_exist() -> None:
    for op, function in implementations():
        for rule in rules_of(op):
            assert rule.values in arguments(op, function), (op, function)


def test_what_a_type_promises_is_checked_in_lists_and_in_other_types() -> None:
    @dataclass
    class State:
        entries: SlotMapping

    def store(states: Sequence[State], x: torch.Tensor | None = None) -> None: ...

    def read(selection: Selection | None) -> None: ...

    def neither(x: torch.Tensor, pages: Pages) -> None: ...

    assert [check.applies("none", f) for f in (read, neither)] == [True, False]
    states = [State(SlotMapping(window(), ints(0))), State(SlotMapping(window(), ints(64)))]
    with pytest.raises(OpInputError, match=r"none.*: slot out of range at .*token 0, place 0: 64"):
        check.guard("none", store)(states)
    check.guard("none", store)(states[:1])


def test_operators_of_typed_arguments_are_checked_without_a_rule_by_name() -> None:
    typed = {name for name, op in registry.OPERATORS.items() if check.applies(name, op.reference)} - set(check.RULES)
    paged = {"compressor.save_state", "compressor.compress_store", "compressor.update"}
    assert typed == {"attention.norm_rope_store", "attention.sparse", *paged}


@pytest.mark.usefixtures("checked")
def test_values_that_are_not_finite_are_named() -> None:
    values = torch.zeros(3, 2, 2)
    assert check.finite("experts of model.layers.7", values) is values
    values[2, 1, 0] = float("-inf")
    with pytest.raises(NotFiniteError, match=r"^experts of model\.layers\.7: NaN or infinite at request 5, token 2;"):
        check.finite("experts of model.layers.7", values)
    with pytest.raises(NotFiniteError, match=r"^logits: NaN or infinite at request 2;"):
        check.finite("logits", values, of_requests=True)


def test_without_the_mode_nothing_is_looked_at() -> None:
    values = torch.full((1, 1), float("nan"))
    assert check.finite("logits", values) is values
