# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4.errors import PlanError
from dsv4.machine.hardware import all_gpus, find_gpu
from dsv4.model.kv_layout import StateMapping
from dsv4.planning.deployment import MAX_CONTEXT, find_checkpoint, parse_context
from dsv4.planning.memory.account import weights_of
from dsv4.planning.memory.proof import Verdict, prove
from dsv4.planning.memory.weights import inventory
from dsv4.planning.planner import Candidate, Question, candidate, plan, step_limit
from dsv4.planning.recipe.schema import shipped_recipes
from dsv4.planning.text import describe

GIB = 1 << 30
ROOT = Path(__file__).parents[2]


def _question(model: str, gpu: str, count: int, **options) -> Question:
    """On as few nodes as the GPUs need, unless options name a number."""
    card = find_gpu(gpu)
    return Question(
        **{"checkpoint": find_checkpoint(model), "gpu": card, "count": count, "nodes": card.nodes_for(count)} | options
    )


def _plan(model: str, gpu: str, count: int, **options) -> list[Candidate]:
    return plan(_question(model, gpu, count, **options))


def _find(found: list[Candidate], engine: str, shape: str, draft: str = "none") -> Candidate:
    (one,) = [
        c
        for c in found
        if (c.deployment.engine, c.deployment.shape, c.deployment.speculation.method) == (engine, shape, draft)
    ]
    return one


def test_pro_on_8_h200_serves_800k_and_says_where_the_step_stops_fitting():
    c = _find(_plan("pro", "h200", 8, context=819_200), "vllm", "TP8")
    assert c.proof.verdict is Verdict.FITS
    limit = c.step_limit
    assert 4096 < limit < 16_384
    fits = prove(replace(c.deployment, max_num_batched_tokens=limit))
    stops = prove(replace(c.deployment, max_num_batched_tokens=limit + 256))
    assert (fits.verdict is Verdict.FITS, stops.verdict is Verdict.FITS) == (True, False)


def test_the_default_step_of_vllm_does_not_fit_and_the_knob_is_the_step():
    c = _find(_plan("pro", "h200", 8, context=819_200, max_num_batched_tokens=16_384, engine="vllm"), "vllm", "TP8")
    assert c.proof.verdict is not Verdict.FITS
    knob = c.knobs[0]
    assert knob.fits
    assert knob.text.startswith("lower max_num_batched_tokens to ")
    lower = int(knob.text.rsplit(" ", 1)[1])
    fixed = prove(
        replace(c.deployment, max_num_batched_tokens=lower, max_num_seqs=min(c.deployment.max_num_seqs, lower))
    )
    assert fixed.verdict is Verdict.FITS


def test_a_knob_frees_what_it_says():
    c = _find(_plan("pro", "h200", 8, max_num_batched_tokens=16_384, engine="vllm"), "vllm", "TP8")
    (knob,) = [k for k in c.knobs if k.text == "turn async scheduling off"]
    after = prove(replace(c.deployment, async_scheduling=False))
    assert knob.frees_bytes == c.proof.need_bytes - after.need_bytes


def test_cards_that_only_the_plugin_serves_are_planned_with_the_state_that_holds_more_requests():
    for context, step in ((MAX_CONTEXT, 4096), (65_536, 4096), (32_768, 16_384)):
        options = {"engine": "vllm", "context": context, "max_num_batched_tokens": step}
        auto, summary, paged = (
            _find(_plan("flash", "a100", 8, state=state, **options), "vllm", "TP8")
            for state in (None, StateMapping.SUMMARY, StateMapping.PAGED)
        )
        assert auto.proof.held_low == max(summary.proof.held_low, paged.proof.held_low)
        more = summary if summary.proof.held_low >= paged.proof.held_low else paged
        assert auto.deployment.state is more.deployment.state
    a100 = _find(_plan("flash", "a100", 8, engine="vllm", context=8192), "vllm", "TP8")
    assert a100.deployment.state is StateMapping.SUMMARY
    assert "DSV4_" not in describe(_question("flash", "a100", 8, engine="vllm"), [a100], 1)
    paged = _find(_plan("flash", "a100", 8, engine="vllm", context=MAX_CONTEXT), "vllm", "TP8")
    assert paged.deployment.state is StateMapping.PAGED
    assert paged.proof.start_bytes > a100.proof.start_bytes
    assert "DSV4_STATE=paged vllm serve" in describe(_question("flash", "a100", 8, engine="vllm"), [paged], 1)


def test_the_plugins_state_doubles_the_step_that_docs_name():
    recipe = next(r for r in shipped_recipes() if r.id == "a100-80g-x4-flash-vllm-context")
    d, n = recipe.deployment(), recipe.lengths.concurrency
    limits = [step_limit(replace(d, state=state), n) for state in (StateMapping.PAGED, StateMapping.SUMMARY)]
    page = " ".join((ROOT / "docs" / "planner.md").read_text().split())
    assert "from {:,} to {:,} tokens".format(*limits) in page


def test_recipes_name_the_step_where_they_stop_fitting():
    named = 0
    for recipe in shipped_recipes():
        for reason in recipe.why_not:
            if match := re.fullmatch(r"max_num_batched_tokens above (\d+)", reason.what):
                named += 1
                assert int(match[1]) == step_limit(recipe.deployment(), recipe.lengths.concurrency), recipe.id
    assert named > 90


def test_cards_that_native_serves_are_planned_as_native_keeps_state():
    h200 = _find(_plan("flash", "h200", 8, engine="vllm"), "vllm", "TP8")
    assert h200.deployment.state is StateMapping.PAGED
    ours = _find(_plan("flash", "h200", 8, engine="vllm", state=StateMapping.SUMMARY), "vllm", "TP8")
    assert "DSV4_MODE=on vllm serve" in describe(_question("flash", "h200", 8, engine="vllm"), [ours], 1)


def test_many_requests_are_not_refused_for_the_reserve_of_one():
    found = _plan("flash", "h100", 8, engine="vllm", context=65_536, concurrency=64)
    tp8 = _find(found, "vllm", "TP8")
    assert tp8.proof.verdict is Verdict.FITS
    assert tp8.proof.printed_high < 64 < tp8.proof.held_low
    assert tp8.deployment.max_num_seqs >= 64


def test_a_published_deployment_of_8_requests_is_not_refused():
    d = _find(
        _plan("pro", "h200", 8, engine="vllm", context=86_016, concurrency=8, max_num_batched_tokens=16_384),
        "vllm",
        "TP8",
    )
    assert d.works
    assert d.proof.held_high >= 8 > d.proof.printed_high


def test_max_num_seqs_follows_what_the_pool_holds():
    for context, concurrency in ((65_536, 1), (8192, 1), (MAX_CONTEXT, 1), (8192, 300)):
        for c in _plan("flash", "h200", 8, context=context, concurrency=concurrency):
            d, per_replica = c.deployment, -(-concurrency // c.deployment.num_pools)
            most = 4096 // (1 + d.speculation.num_tokens)
            assert min(max(16, per_replica), most) <= d.max_num_seqs <= most
            assert d.max_num_seqs <= max(16, per_replica, -(-c.proof.held_high // d.num_pools))
    held = _find(_plan("flash", "h200", 8, engine="vllm", context=65_536), "vllm", "TP8")
    assert held.proof.at_once_low > 100


def test_several_engines_hold_what_each_of_them_holds():
    found = _plan("flash", "a100", 8, engine="vllm", context=131_072)
    two, one = (
        _find(found, "vllm", "2x TP4"),
        _find(_plan("flash", "a100", 4, engine="vllm", context=131_072), "vllm", "TP4"),
    )
    assert two.proof.held_low == 2 * one.proof.held_low
    assert not two.violations
    text = describe(_question("flash", "a100", 8, engine="vllm"), [two], 1)
    assert "2 engines behind a router, each on 4 GPUs of its own" in " ".join(text.split())
    assert "--tensor-parallel-size 4" in text
    assert "--nnodes" not in text


def test_cards_without_fast_links_are_planned_with_stages_in_vllm_alone():
    found = _plan("flash", "rtx-4090-48g", 4, context=131_072)
    assert _find(found, "vllm", "PP4").works
    assert "stages in vLLM alone" in _find(found, "sglang", "PP4").violations[0]
    assert not [c for c in _plan("flash", "h200", 8) if c.deployment.pp > 1]


def test_pro_on_8_h100_needs_16():
    found = _plan("pro", "h100", 8)
    assert not any(c.works for c in found)
    assert "use 16 GPUs (TP8 x PP2)" in _find(found, "vllm", "TP8").knobs[0].text


def test_dp_holds_more_1m_requests_than_tp_and_wins_on_8_b200():
    found = _plan("flash", "b200", 8, engine="vllm", concurrency=8)
    tp, dp = (_find(found, "vllm", shape) for shape in ("TP8", "DP8 + EP"))
    assert dp.proof.held_low > 5 * tp.proof.held_low
    assert found.index(dp) < found.index(tp)


def test_experts_are_copied_where_they_do_not_divide_over_the_ranks():
    found = _plan("pro", "gb300", 72)
    wide = _find(found, "vllm", "DP72 + EP")
    assert wide.works
    assert wide.deployment.redundant_experts == 6 * 72 - 384
    text = describe(_question("pro", "gb300", 72), [wide], 1)
    assert "'{\"num_redundant_experts\": 48}'" in text
    experts = sum(layer.experts for layer in inventory(wide.deployment.config).layers)
    assert weights_of(wide.deployment, 0).experts_bytes == pytest.approx(experts * 6 / 384)
    assert not _find(_plan("pro", "h200", 8), "vllm", "DP8 + EP").deployment.redundant_experts


def test_no_advice_has_more_stages_than_layers():
    found = _plan("pro", "rtx-3090", 32, context=123_457)
    assert found
    assert all(c.deployment.pp <= 61 for c in found)


def test_pro_never_gets_tp16():
    assert all(c.deployment.tp < 16 for c in _plan("pro", "h100", 16))


def test_mxfp4_index_keys_are_used_on_compute_capability_10_only():
    for gpu in ("b200", "h200", "rtx-pro-6000"):
        mxfp4 = {c.deployment.index.value for c in _plan("flash", gpu, 4)}
        assert mxfp4 == {"mxfp4" if gpu == "b200" else "fp8"}


def test_a_configuration_with_a_shipped_recipe_names_it():
    assert _find(_plan("flash", "a100", 8), "vllm", "TP8").recipe == "a100-80g-x8-flash-vllm-context"


def test_ranking_puts_what_works_first_and_less_missing_before_more():
    found = _plan("pro", "h200", 8, context=819_200)
    assert [c.works for c in found] == sorted((c.works for c in found), reverse=True)
    missing = [c.proof.shortfall_bytes for c in found if not c.works and not c.violations]
    assert missing == sorted(missing)


def test_nodes_default_to_what_the_gpus_need():
    assert _question("pro", "gb200", 8).nodes == 2


@pytest.mark.parametrize(
    ("gpu", "count", "options", "message"),
    [
        ("h200", 0, {}, "count 0: impossible"),
        ("h200", -1, {}, "impossible"),
        ("h200", 10**9, {}, "impossible"),
        ("h200", 9, {}, "does not divide over 2 nodes"),
        ("h200", 16, {"nodes": 1}, "a h200 node has at most 8 GPUs; 16 need 2 nodes"),
        ("h200", 8, {"nodes": 0}, "does not divide"),
        ("h200", 8, {"nodes": -2}, "does not divide"),
        ("h200", 8, {"context": 1_048_577}, "contexts of 1 to 1,048,576 tokens"),
        ("h200", 8, {"concurrency": 0}, "give 1 to 65536 requests"),
        ("h200", 8, {"max_num_batched_tokens": 1}, "give 256 to 65536"),
    ],
)
def test_impossible_questions_are_one_line(gpu, count, options, message):
    with pytest.raises(PlanError) as e:
        _question("flash", gpu, count, **options)
    assert message in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("800k", 819_200), ("1m", 1_048_576), ("1M", 1_048_576), ("819,200", 819_200), ("0.5m", 524_288), ("4096", 4096)],
)
def test_contexts_are_read_as_people_write_them(text, tokens):
    assert parse_context(text) == tokens


@pytest.mark.parametrize(
    "text", ["", "k", "-1", "0", "1e9", "two", "1.2.3k", "2m", "1048577", "nan", "inf", "٣", "9" * 400]
)
def test_other_contexts_are_refused(text):
    with pytest.raises(PlanError):
        parse_context(text)


@pytest.mark.parametrize("name", ["v4", "flash-0732", "deepseek-ai/DeepSeek-V3", ""])
def test_an_unknown_model_names_the_nearest(name):
    with pytest.raises(PlanError, match="unknown checkpoint; nearest: "):
        find_checkpoint(name)


@settings(max_examples=40, deadline=None)
@given(
    model=st.sampled_from(["flash", "flash-0731", "pro", "pro-0813"]),
    gpu=st.sampled_from([g.id for g in all_gpus()]),
    count=st.sampled_from([1, 2, 3, 4, 6, 8, 16, 32, 72, 576]),
    context=st.integers(1, MAX_CONTEXT),
    concurrency=st.integers(1, 300),
    step=st.sampled_from([256, 1000, 4096, 65_536]),
)
def test_every_question_is_answered_consistently(model, gpu, count, context, concurrency, step):
    try:
        question = _question(model, gpu, count, context=context, concurrency=concurrency, max_num_batched_tokens=step)
    except PlanError:
        return
    found = plan(question)
    text = describe(question, found, 2)
    assert max(len(line) for line in text.splitlines()) <= 80
    for c in found:
        p = c.proof
        assert p.pool_low <= p.pool_high
        assert (p.verdict is Verdict.FITS) == (p.shortfall_bytes == 0)
        if p.verdict is Verdict.FITS and c.deployment.engine == "vllm":
            assert p.printed_low <= p.printed_high
        if p.verdict is Verdict.FITS:
            assert p.starts is Verdict.FITS
            assert p.held_low >= concurrency
            assert p.max_context_low >= context
        assert p.at_once_low <= p.at_once_high
        assert all(t.low <= t.high for t in p.terms)


@settings(max_examples=25, deadline=None)
@given(
    gpu=st.sampled_from(["h200", "a100-80g", "b200"]),
    step=st.sampled_from([512, 4096, 16_384]),
    concurrency=st.integers(1, 16),
)
def test_a_larger_card_never_fits_less(gpu, step, concurrency):
    small = _plan("flash", gpu, 8, engine="vllm", max_num_batched_tokens=step, concurrency=concurrency)[0].deployment
    card = replace(small.gpu, visible_mib=small.gpu.visible_mib + 1024)
    before, after = prove(small, concurrency), prove(replace(small, gpu=card), concurrency)
    assert after.pool_low > before.pool_low
    assert not (before.verdict is Verdict.FITS and after.verdict is not Verdict.FITS)


def test_step_limit_is_zero_when_weights_alone_do_not_fit():
    d = _plan("pro", "h100", 8, engine="vllm")[0].deployment
    assert step_limit(d, 1) == 0
    assert candidate(d, 1).step_limit == 0


def test_latency_puts_wide_tp_with_a_draft_first():
    first = _plan("pro", "h200", 8, context=819_200, engine="vllm", prefer="latency")[0].deployment
    assert (first.shape, first.speculation.method) == ("TP8", "mtp")


def test_the_recipe_named_is_the_one_with_the_nearest_context():
    for context, recipe in ((819_200, "h200-x8-pro-vllm-context-800k"), (MAX_CONTEXT, "h200-x8-pro-vllm-context-1m")):
        assert _find(_plan("pro", "h200", 8, context=context), "vllm", "TP8").recipe == recipe


def test_the_proof_ends_with_the_command_that_starts_it():
    question = _question("pro", "h100", 16, engine="vllm", context=131_072)
    text = describe(question, plan(question), 1)
    assert "start head: vllm serve deepseek-ai/DeepSeek-V4-Pro " in text
    assert "start worker: vllm serve deepseek-ai/DeepSeek-V4-Pro " in text


def test_several_knobs_are_named_where_one_is_not_enough():
    c = _find(_plan("flash", "3090", 8, context=8192), "vllm", "TP8")
    knob = c.knobs[0]
    assert knob.fits
    assert " and " in knob.text
    assert all(not k.fits for k in c.knobs[1:] if not k.text.startswith("use "))
