# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest

from dsv4.model.config import V4Config
from dsv4.model.tensors import Component, tensor_specs

GOLDEN = Path(__file__).parents[1] / "golden"
# name: (tensors, bytes); published totals of the real checkpoints, see the spec's sections 1.3 and
# 2.4
TOTALS = {
    "DeepSeek-V4-Flash": (69_187, 159_609_485_896),
    "DeepSeek-V4-Pro": (145_116, 864_704_792_696),
    "DeepSeek-V4-Flash-0731": (72_317, 166_878_536_440),
    "DeepSeek-V4-Pro-0813": (149_782, 892_727_580_904),
}


def config_of(name: str) -> V4Config:
    return V4Config.from_path(GOLDEN / "configs" / f"{name}.json")


@pytest.mark.parametrize("name", TOTALS)
def test_totals_equal_the_published_checkpoint(name):
    specs = tensor_specs(config_of(name))
    assert (len(specs), sum(spec.nbytes for spec in specs.values())) == TOTALS[name]


@pytest.mark.parametrize("name", TOTALS)
def test_names_shapes_and_dtypes_equal_the_golden_inventory(name):
    golden = (GOLDEN / "tensors" / f"{name}.tsv").read_text()
    assert inventory(config_of(name)) == golden


def inventory(config: V4Config) -> str:
    """Every tensor but the experts after expert 0. Rows: name, shape, dtype, tensor-parallel axis,
    layers that have it."""
    layers: dict[str, list[str]] = {}
    for spec in tensor_specs(config).values():
        if ".experts." in spec.name and ".experts.0." not in spec.name:
            continue
        group, layer, rest = re.match(r"(?:(layers|mtp)\.(\d+)\.)?(.*)", spec.name).groups(default="")
        name = f"{group}.*.{rest}" if group else rest
        axis = "-" if spec.shard_axis is None else spec.shard_axis
        layers.setdefault(f"{name}\t{list(spec.shape)}\t{spec.dtype}\t{axis}", []).append(layer)
    return "".join(f"{row}\t{','.join(where)}\n" for row, where in layers.items())


def bytes_by_component(config: V4Config) -> dict[Component, int]:
    total: dict[Component, int] = defaultdict(int)
    for spec in tensor_specs(config).values():
        total[spec.component] += spec.nbytes
    return total


def test_bytes_by_component_equal_the_published_breakdown():
    assert {c.value: n for c, n in bytes_by_component(config_of("DeepSeek-V4-Flash")).items()} == {
        "routed_experts": 147_169_738_752,
        "attention": 4_599_346_048,
        "mtp": 3_593_787_756,
        "shared_experts": 1_082_196_480,
        "embed": 1_059_061_760,
        "head": 1_059_061_760,
        "compressor": 525_680_640,
        "indexer": 275_347_968,
        "mhc": 135_537_756,
        "router": 90_218_496,
        "tid2eid": 18_616_320,
        "norm": 892_160,
    }


def test_base_experts_are_fp8_and_reproduce_the_published_size():
    base = replace(config_of("DeepSeek-V4-Flash"), expert_dtype="fp8")
    e8m0 = sum(spec.nbytes for spec in tensor_specs(base).values())
    f32 = sum(spec.nbytes for spec in tensor_specs(base, "F32").values())
    assert (round(e8m0 / 1e9, 2), round(f32 / 1e9, 2)) == (292.50, 292.56)


@pytest.mark.parametrize("name", TOTALS)
@pytest.mark.parametrize("tp", [2, 8])
def test_every_shard_axis_divides_and_scales_split_with_their_weights(name, tp):
    specs = tensor_specs(config_of(name))
    for spec in specs.values():
        if spec.shard_axis is not None:
            assert spec.shape[spec.shard_axis] % tp == 0, spec
        if spec.name.endswith(".scale"):
            assert spec.shard_axis == specs[spec.name.removesuffix("scale") + "weight"].shard_axis


def test_draft_specs_can_be_left_out():
    config = config_of("DeepSeek-V4-Flash-0731")
    assert not any(spec.is_draft for spec in tensor_specs(config, include_draft=False).values())
    assert {s.component for s in tensor_specs(config).values() if s.is_draft} == {Component.MTP}
