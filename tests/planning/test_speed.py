# SPDX-License-Identifier: Apache-2.0
"""Estimates of speed: the arithmetic against published figures of the model, the fit against its
own script, the ranges against the points they were drawn from, and what a user may ask.
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from dsv4.errors import HardwareError, PlanError
from dsv4.machine.hardware import describe_gpu, find_gpu
from dsv4.planning.deployment import Deployment, find_checkpoint
from dsv4.planning.planner import Question, plan
from dsv4.planning.speed.estimate import (
    ACCEPTED,
    Range,
    can_estimate,
    errors,
    estimate,
    level,
    prefill_seconds,
    token_seconds,
)
from dsv4.planning.speed.objective import Keeps, Objective, frontier, load_kept, parse_objective, parse_prices
from dsv4.planning.speed.points import Point, all_points
from dsv4.planning.speed.work import Traffic, _active, decode_work, prefill_work

ROOT = Path(__file__).parents[2]


def deployment(model: str = "flash", gpu: str = "h200", count: int = 8, shape: str = "TP8") -> Deployment:
    question = Question(checkpoint=find_checkpoint(model), gpu=find_gpu(gpu), count=count, nodes=1, context=131_072)
    found = [c.deployment for c in plan(question) if c.deployment.shape == shape and not c.deployment.has_draft]
    assert found, f"no {shape} for {model} on {count} x {gpu}"
    return found[0]


def short(**changes: float) -> Traffic:
    return replace(Traffic(input_tokens=8192, output_tokens=1024), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(("model", "active"), [("flash", 13e9), ("pro", 49e9)])
def test_active_parameters_are_the_published_ones(model, active):
    assert sum(_active(find_checkpoint(model).config)) == pytest.approx(active, rel=0.03)


@pytest.mark.parametrize(
    ("model", "tp", "bytes_read"),
    # A reading of the engine's modules: batch 1, short context, wo_a widened to bf16.
    [("flash", 8, 2.71e9), ("flash", 4, 4.13e9), ("pro", 8, 8.56e9)],
)
def test_a_decode_step_reads_what_the_modules_read(model, tp, bytes_read):
    from dsv4.planning.memory.weights import stage_weights

    d = replace(deployment(), checkpoint=find_checkpoint(model), tp=tp, count=tp)
    widened = stage_weights(d.config, tp=tp, dp=1, ep=False, pp=1, with_draft=False)[0].wo_a_bytes
    read = decode_work(d, Traffic(input_tokens=1024, output_tokens=16), 1)["memory"] * d.gpu.mem_bw_tb_s * 1e12
    assert read + widened == pytest.approx(bytes_read, rel=0.015)


def test_an_index_scan_costs_what_the_pairs_cost():
    # 8,192 tokens at a depth of 131,072: 92 TFLOP a rank at their start, more at their end.
    d, depth = deployment(), 131_072
    chunk = Traffic(input_tokens=depth + 8192, output_tokens=1, cached=depth / (depth + 8192))
    flops = prefill_work(d, chunk)["index"] * (d.gpu.bf16_tflops or 0)
    assert 92 <= flops <= 98


def test_the_coefficients_are_those_of_the_script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import fit_speed

    written, now = yaml.safe_load(fit_speed.FILE.read_text()), yaml.safe_load(fit_speed.page(*fit_speed.sides()))
    for part in ("decode", "prefill"):
        assert written[part] == pytest.approx(now[part], rel=2e-3)  # four digits, from least squares of another BLAS
        lowest = {"decode": fit_speed.LOWEST_DECODE, "prefill": fit_speed.LOWEST_PREFILL}[part]
        assert all(written[part][name] >= least * 0.999 for name, least in lowest.items())
    for kind, levels in written["errors"].items():
        for load, figures in levels.items():
            assert figures == pytest.approx(now["errors"][kind][load], rel=0.02), (kind, load)
    sys.modules.pop("fit_speed")


def test_ranges_hold_nine_of_ten_points():
    """With the batch that ran, by the fit that has seen them: no worse than on unseen cards."""
    timed = [p for p in all_points() if p.tpot_s]
    outside = [p for p in timed if not _within(p)]
    assert len(timed) >= 90
    assert len(outside) / len(timed) <= 0.1, [(_name(p), p.tpot_s) for p in outside]


def _within(p: Point) -> bool:
    factor = errors(p.deployment.gpu)[level(p.traffic.concurrency)]["tpot"]
    tpot = token_seconds(p.deployment, p.traffic, p.batch)
    return tpot / factor <= (p.tpot_s or 0) <= tpot * factor


def _name(p: Point) -> str:
    return f"{p.deployment.checkpoint.id} {p.deployment.gpu.id} {p.deployment.shape} x{p.traffic.concurrency}"


def test_what_must_slow_a_request_slows_it():
    d = deployment()
    one, many = estimate(d, short()), estimate(d, short(concurrency=64))
    assert many.tpot_s.low > one.tpot_s.low
    assert many.gpu_tok_s.low > one.gpu_tok_s.low
    assert prefill_seconds(d, replace(short(), input_tokens=65_536)) > 4 * prefill_seconds(d, short())
    assert prefill_seconds(d, short(cached=0.9)) < prefill_seconds(d, short())
    assert token_seconds(replace(d, gpu=find_gpu("h100")), short(), 32) > token_seconds(d, short(), 32)
    assert token_seconds(d, replace(short(), input_tokens=900_000), 1) > token_seconds(d, short(), 1)


def test_engines_behind_a_router_share_the_traffic():
    two, one = deployment(shape="2x TP4"), deployment(count=4, shape="TP4")
    both, half = estimate(two, short(concurrency=64)), estimate(one, short(concurrency=32))
    assert both.output_tok_s.high == pytest.approx(2 * half.output_tok_s.high)
    assert both.tpot_s == half.tpot_s


def test_pcie_costs_what_nvlink_does_not():
    a100, l40s = (decode_work(deployment("flash", gpu, 8), short(), 1) for gpu in ("a100-80g", "l40s"))
    assert (a100["reduces_pcie"], l40s["reduces_pcie"]) == (0, 86)


def test_requests_without_a_place_wait():
    d = replace(deployment(), max_num_seqs=16)
    e = estimate(d, short(concurrency=64))
    assert (e.waits, e.running) == (True, 16)
    assert Objective(ttft_s=100).kept_by(e) is Keeps.NO
    assert not estimate(d, short(concurrency=16)).waits


def test_far_from_any_point_is_said():
    assert estimate(deployment(), short()).extrapolated == ""
    assert "h20" in estimate(deployment(gpu="h20-141g"), short()).extrapolated


def test_a_card_without_peaks_has_no_estimate():
    card = describe_gpu(40, "8.6")
    assert not can_estimate(card)
    with pytest.raises(PlanError, match="no speed can be estimated"):
        estimate(replace(deployment(), gpu=card), short())


def test_objectives():
    assert parse_objective("ttft=2s, tpot=30ms") == Objective(ttft_s=2, tpot_s=0.03)
    assert parse_objective("tps=50").tpot_s == pytest.approx(0.02)
    for wrong in ("ttft=2", "tpot=0ms", "latency=2s", "", "ttft=2s;tpot=3ms"):
        with pytest.raises(PlanError, match="write ttft=2s"):
            parse_objective(wrong)


def test_the_load_that_keeps_an_objective_is_the_largest():
    d, goal = deployment(), Objective(tpot_s=0.02)
    sure, maybe = load_kept(d, short(), goal)
    assert 1 <= sure < maybe
    assert goal.kept_by(estimate(d, short(concurrency=sure))) is Keeps.YES
    assert goal.kept_by(estimate(d, short(concurrency=sure + 1))) is not Keeps.YES
    assert goal.kept_by(estimate(d, short(concurrency=maybe + 1))) is Keeps.NO
    assert load_kept(d, short(), Objective(tpot_s=1e-6)) == (0, 0)


def test_prices():
    assert parse_prices("2.5", "h200") == {"h200": 2.5}
    assert parse_prices("h200=2.5,B200=4", "h200") == {"h200": 2.5, "b200": 4.0}
    with pytest.raises(PlanError, match="dollars per GPU"):
        parse_prices("two", "h200")
    with pytest.raises(HardwareError, match="unknown GPU"):
        parse_prices("h2000=2", "h200")
    e = estimate(deployment(), short())
    cost = e.dollars_per_million(8, 2.5)
    assert cost.low == pytest.approx(8 * 2.5 / 3600 / e.output_tok_s.high * 1e6)
    assert isinstance(cost, Range)
    assert cost.low < cost.high


def test_a_frontier_trades_users_for_machines():
    found = frontier(deployment(), short())
    users, gpus = [u.low for _, u, _ in found], [math.sqrt(g.low * g.high) for _, _, g in found]  # as drawn
    assert users == sorted(users, reverse=True)
    assert gpus == sorted(gpus)
    assert len(found) >= 6


@pytest.mark.parametrize("wrong", [{"input_tokens": 0}, {"output_tokens": 0}, {"cached": 1.0}, {"cached": -0.1}])
def test_traffic_that_cannot_be(wrong):
    with pytest.raises(PlanError):
        replace(short(), **wrong)


def test_the_page_has_the_written_figures():
    page = (ROOT / "docs" / "planner.md").read_text()
    errors = yaml.safe_load((ROOT / "recipes" / "speed.yaml").read_text())["errors"]
    rows = [
        errors["native"]["single"],
        errors["native"]["batch"],
        errors["native"]["saturated"],
        errors["other"]["single"],
    ]
    for row in rows:
        assert f"| x{row['tpot']:.2f} | x{row['tpot_half']:.2f} | {row['tpot_points']} |" in page
    native, other = errors["native"]["single"], errors["other"]["single"]
    said = " ".join(page.split())
    assert f"within x{native['ttft']:.2f} (native, {native['ttft_points']} points)" in said
    assert f"x{other['ttft']:.2f} (forks, {other['ttft_points']} points)" in said
    assert f"<!-- points -->{len(all_points())}<!-- -->" in page
    mtp, dspark = ACCEPTED["mtp"], ACCEPTED["dspark"]
    assert f"{mtp[0]} to {mtp[1]} tokens a step with MTP, {dspark[0]} to {dspark[1]} with DSpark" in said
