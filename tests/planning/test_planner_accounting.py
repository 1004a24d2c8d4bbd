# SPDX-License-Identifier: Apache-2.0
"""Weights and KV against the released totals and against what public logs print."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4.model.kv_layout import CacheFormats, IndexFormat, KvFormat, StateMapping
from dsv4.model.tensors import tensor_specs
from dsv4.planning.deployment import all_checkpoints, find_checkpoint
from dsv4.planning.memory import overheads
from dsv4.planning.memory.sglang import SglangRequest, sglang_pool
from dsv4.planning.memory.vllm import InFlight, in_flight_tokens, vllm_pool
from dsv4.planning.memory.weights import inventory, pipeline_layers, stage_weights

_spec = importlib.util.spec_from_file_location("memory_table", Path(__file__).parents[1] / "golden" / "memory_table.py")
assert _spec is not None
assert _spec.loader is not None
memory_table = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(memory_table)

GIB = 1 << 30
POINTS = yaml.safe_load((Path(__file__).parents[1] / "golden" / "memory_points.yaml").read_text())
FP8 = CacheFormats(KvFormat.FP8_DS_MLA, IndexFormat.FP8)
CHECKPOINTS = [c.id for c in all_checkpoints()]


# Weights
# ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_inventory_equals_the_released_total_to_the_byte(name):
    checkpoint = find_checkpoint(name)
    assert inventory(checkpoint.config).total == checkpoint.total_bytes


@pytest.mark.parametrize("name", ["flash", "pro-0813"])
def test_counting_one_layer_of_each_kind_equals_counting_every_tensor(name):
    config = find_checkpoint(name).config
    specs = tensor_specs(config).values()
    inv = inventory(config)
    assert inv.draft.total == sum(s.nbytes for s in specs if s.is_draft)
    assert inv.layers[5].total == sum(s.nbytes for s in specs if s.name.startswith("layers.5."))
    assert inv.layers[0].total == sum(s.nbytes for s in specs if s.name.startswith("layers.0."))


def test_flash_at_tp8_weighs_what_a_log_prints_within_2_percent():
    (rank,) = stage_weights(find_checkpoint("flash").config, tp=8, dp=1, ep=False, pp=1, with_draft=True)
    assert rank.total_bytes / GIB == pytest.approx(20.06, rel=0.02)


def test_flash_at_tp2_with_wo_a_in_bf16_weighs_what_a_log_prints_within_half_a_percent():
    (rank,) = stage_weights(find_checkpoint("flash").config, tp=2, dp=1, ep=False, pp=1, with_draft=True)
    assert (rank.total_bytes + rank.wo_a_bytes) / GIB == pytest.approx(75.62, rel=0.005)


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize("pp", [1, 2, 4])
def test_one_rank_per_stage_holds_everything_exactly_once(name, pp):
    checkpoint = find_checkpoint(name)
    stages = stage_weights(checkpoint.config, tp=1, dp=1, ep=False, pp=pp, with_draft=True)
    assert sum(s.total_bytes for s in stages) == checkpoint.total_bytes


def test_pipeline_stages_are_cut_as_vllm_cuts_them():
    assert [len(s) for s in pipeline_layers(61, 2)] == [31, 30]
    assert [len(s) for s in pipeline_layers(43, 4)] == [11, 11, 11, 10]


# vLLM
# ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("point", POINTS["need"], ids=lambda p: p["what"])
def test_kv_needed_for_one_request_equals_the_printed_figure(point):
    need = memory_table.pool(point).request_bytes(point["max_model_len"], point["in_flight_tokens"]) / GIB
    assert need == pytest.approx(point["printed_gib"], rel=0.005)


@pytest.mark.parametrize("point", POINTS["estimated_max_len"], ids=lambda p: p["what"])
def test_estimated_length_lies_between_those_of_the_unrounded_memory(point):
    def longest(gib: float) -> int:
        # These versions did not set the null block aside.
        pool = memory_table.pool(point)
        return pool.max_model_len(int(gib * GIB) + pool.block_bytes, InFlight(point["in_flight_tokens"]), 1 << 20)

    assert longest(point["available_gib"] - 0.005) <= point["printed_tokens"] <= longest(point["available_gib"] + 0.005)


@pytest.mark.parametrize("point", POINTS["groups"], ids=lambda p: p["what"])
def test_groups_equal_the_instrumented_ones(point):
    pool = vllm_pool(find_checkpoint(point["model"]).config, FP8)
    assert sorted([g.page_tokens, len(g.caches), g.page_bytes] for g in pool.groups) == sorted(point["groups"])


@pytest.mark.parametrize("point", POINTS["vllm_budget"], ids=lambda p: p["what"])
def test_budget_arithmetic_gives_the_available_memory_of_a_log(point):
    available = point["fraction"] * point["total_gib"] - point["loaded_gib"] - point["activation_gib"]
    assert available == pytest.approx(point["printed_available_gib"], rel=0.05)


@pytest.mark.parametrize("point", POINTS["vllm_loaded"], ids=lambda p: p["what"])
def test_loaded_memory_of_a_log_lies_in_the_predicted_range(point):
    stage = stage_weights(
        find_checkpoint(point["model"]).config, tp=point["tp"], dp=1, ep=False, pp=point["pp"], with_draft=False
    )[0]
    outside = overheads.non_torch(point["tp"])
    low, high = stage.total_bytes + outside.low, stage.total_bytes + stage.wo_a_bytes + outside.high
    assert low / GIB <= point["printed_gib"] <= high / GIB
    assert low / GIB == pytest.approx(point["printed_gib"], rel=0.05)


def test_a_logs_weights_with_a_dspark_draft_lie_in_the_predicted_range():
    (point,) = POINTS["vllm_loaded_with_draft"]
    config = find_checkpoint(point["model"]).config
    (rank,) = stage_weights(config, tp=point["tp"], dp=1, ep=False, pp=1, with_draft=True)
    built = overheads.load_overhead(rank.wo_a_bytes).high + overheads.draft_load_overhead(config).high
    assert rank.total_bytes / GIB < point["printed_gib"] < (rank.total_bytes + built) / GIB


@pytest.mark.parametrize("point", POINTS["vllm_concurrency"], ids=lambda p: p["what"])
def test_concurrency_on_8_b200_lies_in_the_predicted_range(point):
    low, high = memory_table.concurrency(point)
    assert low <= point["printed_concurrency"] <= high
    assert (low + high) / 2 == pytest.approx(point["printed_concurrency"], rel=0.05)


@pytest.mark.parametrize("point", POINTS["vllm_concurrency_of_pool"], ids=lambda p: p["what"])
def test_the_start_up_line_follows_from_the_pool_of_its_log_to_the_printed_digit(point):
    assert memory_table.printed_concurrency(point) == pytest.approx(point["printed"], rel=0.001)


def test_the_docs_table_is_the_computed_one():
    page = memory_table.PAGE.read_text()
    assert page == memory_table.page(page), "run python tests/golden/memory_table.py"


@pytest.mark.parametrize(("asynchronous", "pp", "batches"), [(False, 1, 1), (True, 1, 2), (False, 2, 2), (True, 2, 3)])
def test_in_flight_tokens_count_concurrent_batches(asynchronous, pp, batches):
    assert in_flight_tokens(4096, asynchronous, pp) == batches * 4096


def test_800k_needs_4_6_gib_at_512_tokens_and_86k_needs_18_3_at_16384_async():
    pool = vllm_pool(find_checkpoint("pro").config, FP8)
    assert pool.request_bytes(819_200, 512) / GIB == pytest.approx(4.6, abs=0.05)
    assert pool.request_bytes(86_016, 2 * 16_384) / GIB == pytest.approx(18.3, abs=0.05)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(CHECKPOINTS),
    index=st.sampled_from(list(IndexFormat)),
    length=st.integers(1, 1 << 20),
    flight=st.integers(1, 1 << 16),
    gib=st.integers(0, 200),
)
def test_longest_context_fits_and_one_more_token_does_not(name, index, length, flight, gib):
    pool = vllm_pool(find_checkpoint(name).config, CacheFormats(KvFormat.FP8_DS_MLA, index))
    budget = gib * GIB
    longest = pool.max_model_len(budget, InFlight(flight), length)

    def fits(max_model_len: int) -> bool:  # one request beside the null block
        return pool.request_bytes(max_model_len, flight) <= budget - pool.block_bytes

    assert longest == 0 or fits(longest)
    assert longest == length or not fits(longest + 1)


@settings(max_examples=60, deadline=None)
@given(length=st.integers(1, (1 << 20) - 1), flight=st.integers(1, 1 << 16), drafts=st.sampled_from([0, 1, 3]))
def test_more_tokens_never_need_less(length, flight, drafts):
    pool = vllm_pool(find_checkpoint("flash-0731").config, FP8, drafts)
    need = pool.request_bytes(length, flight)
    assert need <= pool.request_bytes(length + 1, flight)
    assert need <= pool.request_bytes(length, flight + 1)


# SGLang
# ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("point", POINTS["sglang_bytes_per_full_token"], ids=lambda p: p["source"])
def test_bytes_per_full_token_equal_the_printed_figure(point):
    got = memory_table.historic_bytes_per_full_token(
        find_checkpoint(point["model"]).config,
        point["swa_full_tokens_ratio"],
        point["speculative"],
        point["extra_layers"],
        point["hca_state_in_window"],
    )
    assert round(got, 2) == pytest.approx(point["printed"], abs=0.01)


@pytest.mark.parametrize("point", POINTS["sglang_pool"], ids=lambda p: p["source"])
def test_pool_tokens_follow_from_the_printed_bytes(point):
    pool = sglang_pool(
        find_checkpoint("pro").config,
        FP8,
        SglangRequest(max_running_requests=256, chunked_prefill_tokens=8192, swa_full_tokens_ratio=0.15),
    )
    like = replace(pool, bytes_per_full_token=point["bytes_per_full_token"], fixed_bytes=point["fixed_gib"] * GIB)
    assert like.full_tokens(point["pool_gib"] * GIB) == pytest.approx(point["printed_tokens"], rel=0.005)


def test_minimum_fraction_is_what_loading_takes():
    (point,) = POINTS["sglang_minimum_fraction"]
    assert 1 - point["left_gib"] / (point["loaded_gib"] + point["left_gib"]) == pytest.approx(
        point["printed"], abs=0.0005
    )


def test_smaller_request_cap_leaves_more_tokens():
    config = find_checkpoint("flash").config
    pools = [
        sglang_pool(config, FP8, SglangRequest(max_running_requests=n, chunked_prefill_tokens=4096))
        for n in (8, 64, 256)
    ]
    tokens = [p.full_tokens(40 * GIB) for p in pools]
    assert tokens == sorted(tokens, reverse=True)


@pytest.mark.parametrize("name", ["flash", "pro"])
def test_a_requests_state_takes_the_blocks_that_the_document_says(name):
    config, blocks = find_checkpoint(name).config, []
    for drafted in range(8):
        pool = vllm_pool(config, FP8, min(drafted, 1), mapping=StateMapping.SUMMARY, drafted=drafted)
        blocks.append(sum(g.request_blocks(4096, 1) for g in pool.groups if g.per_request))
    assert blocks == [1, 1, 1, 2, 2, 2, 3, 3]
    page = " ".join((Path(__file__).parents[2] / "docs" / "kv-mapping.md").read_text().split())
    assert "with k up to 2, all pages of a request fit into one block; k = 3 to 5 takes two, 6 and 7 three" in page
