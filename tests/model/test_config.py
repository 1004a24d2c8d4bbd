# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from dsv4.errors import ConfigError, UnsupportedCheckpointError
from dsv4.model.config import LayerKind, Routing, V4Config

CONFIGS = Path(__file__).parents[1] / "golden" / "configs"
FLASH = json.loads((CONFIGS / "DeepSeek-V4-Flash.json").read_text())
PRO = json.loads((CONFIGS / "DeepSeek-V4-Pro.json").read_text())
HF_SHAPE = {  # what HF transformers keeps of FLASH, and how it spells it
    "layer_types": ["sliding_attention"] * 2
    + ["compressed_sparse_attention", "heavily_compressed_attention"] * 20
    + ["compressed_sparse_attention"],
    "mlp_layer_types": ["hash_moe"] * 3 + ["moe"] * 40,
    "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 128},
    "partial_rotary_factor": 64 / 512,
    "rope_parameters": {
        "main": {"rope_type": "default", "rope_theta": 10000.0},
        "compress": {**FLASH["rope_scaling"], "rope_type": "yarn", "rope_theta": 160000.0},
    },
}


def hf_shape() -> dict:
    gone = ("compress_ratios", "num_hash_layers", "qk_rope_head_dim", "rope_scaling", "torch_dtype")
    return {**{k: v for k, v in FLASH.items() if k not in gone}, **HF_SHAPE, "dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("name", "swa", "csa", "hca", "draft", "stages"),
    [
        ("DeepSeek-V4-Flash", 2, 21, 20, "mtp", 1),
        ("DeepSeek-V4-Pro", 0, 30, 31, "mtp", 1),
        ("DeepSeek-V4-Flash-0731", 2, 21, 20, "dspark", 3),
        ("DeepSeek-V4-Pro-0813", 0, 30, 31, "dspark", 3),
    ],
)
def test_layers_and_draft_of_the_released_checkpoints(name, swa, csa, hca, draft, stages):
    c = V4Config.from_path(CONFIGS / f"{name}.json")
    assert [c.count(kind) for kind in (LayerKind.SWA, LayerKind.CSA, LayerKind.HCA)] == [swa, csa, hca]
    assert (c.draft, c.num_draft_layers) == (draft, stages)
    assert [layer.routing for layer in c.layers[:4]] == [Routing.HASH] * 3 + [Routing.TOPK]


def test_both_shapes_give_the_same_config():
    assert V4Config.from_dict(hf_shape()) == V4Config.from_dict(FLASH)


def test_transformers_own_config_is_read():
    from transformers import DeepseekV4Config

    raw = copy.deepcopy(FLASH)
    raw["compress_ratios"] = raw["compress_ratios"][:43]
    ours = V4Config.from_dict(DeepseekV4Config(**raw).to_dict())
    assert ours == V4Config.from_dict(FLASH)


def test_a_config_without_expert_dtype_has_fp4_experts():
    assert V4Config.from_dict({k: v for k, v in PRO.items() if k != "expert_dtype"}).expert_dtype == "fp4"


def test_base_checkpoints_have_fp8_experts():
    assert V4Config.from_dict({**FLASH, "expert_dtype": "fp8"}).expert_dtype == "fp8"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "deepseek_v41", "architectures": ["DeepseekV41ForCausalLM"]},
            "DeepSeek-V4.1, another architecture",
        ),
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM .* is not DeepSeek-V4"),
        ({"vision_n_layers": 32}, "Vision-Exp checkpoint"),
        (
            {"quantization_config": {**FLASH["quantization_config"], "moe_quant_algo": "NVFP4"}},
            "routed experts are NVFP4",
        ),
        (
            {"quantization_config": {**FLASH["quantization_config"], "weight_block_size": [32, 32]}},
            r"weight_block_size \[32, 32\]",
        ),
        ({"quantization_config": {"quant_method": "awq"}}, "'awq'"),
    ],
)
def test_other_families_are_refused_by_name(change, message):
    with pytest.raises(UnsupportedCheckpointError, match=message):
        V4Config.from_dict({**FLASH, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"compress_ratios": [0, 0, 8, *FLASH["compress_ratios"][3:]]},
            r"compress_ratios\[2\] is 8; dsv4 knows 0 \(window\), 4 \(CSA\) and 128 \(HCA\)",
        ),
        ({"compress_ratios": FLASH["compress_ratios"][:40]}, "compress_ratios has 40 entries for num_hidden_layers=43"),
        ({"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid'"),
        ({"o_groups": 7}, "64 is not a multiple of o_groups 7"),
        ({"qk_rope_head_dim": 512}, "must be even and below head_dim 512"),
        ({"hidden_size": -1}, "'hidden_size' is -1, expected a positive number"),
        ({"hidden_size": None}, "'hidden_size' is missing"),
        ({"expert_dtype": "int4"}, "'int4'; dsv4 knows fp4 and fp8"),
        ({"rope_scaling": {**FLASH["rope_scaling"], "type": "llama3"}}, "'llama3'; dsv4 knows yarn"),
    ],
)
def test_contradictions_are_refused_with_the_field(change, message):
    with pytest.raises(ConfigError, match=message):
        V4Config.from_dict({**FLASH, **change}, "here/config.json")


JUNK = [None, True, 0, -1, 1.5, float("nan"), float("inf"), 10**30, "", "junk", [], ["junk"], [None], {}, {"junk": 1}]


@pytest.mark.parametrize("shape", [FLASH, hf_shape()], ids=["flat", "hf"])
def test_junk_in_any_field_is_a_config_error_or_harmless(shape):
    for key in shape:
        for junk in JUNK:
            raw = copy.deepcopy(shape)
            raw[key] = junk
            try:
                V4Config.from_dict(raw)
            except ConfigError as e:
                assert str(e).startswith("config.json: ")  # noqa: PT017 - harmless junk does not raise
            except Exception as e:
                raise AssertionError(f"{key}={junk!r}: {e!r}") from e


@pytest.mark.parametrize(
    ("shape", "key"),
    [
        (FLASH, "quantization_config"),
        (FLASH, "rope_scaling"),
        (hf_shape(), "rope_parameters"),
        (hf_shape(), "compress_rates"),
    ],
)
def test_junk_inside_nested_objects_is_a_config_error_or_harmless(shape, key):
    for inner in shape[key]:
        for junk in JUNK:
            try:
                V4Config.from_dict({**shape, key: {**shape[key], inner: junk}})
            except ConfigError:
                pass
            except Exception as e:
                raise AssertionError(f"{key}.{inner}={junk!r}: {e!r}") from e


def test_every_required_field_is_named_when_missing():
    for key in (
        "num_hidden_layers",
        "hidden_size",
        "index_topk",
        "rope_theta",
        "hc_mult",
        "num_hash_layers",
        "head_dim",
    ):
        with pytest.raises(ConfigError, match=f"field '{key}' is missing"):
            V4Config.from_dict({k: v for k, v in FLASH.items() if k != key})


@pytest.mark.parametrize("content", ["", "[]", "3", "{", '"x"', "\x00"])
def test_a_file_that_holds_no_object_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"config\.json: (not JSON|is a)"):
        V4Config.from_path(tmp_path)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ConfigError, match="not JSON"):
        V4Config.from_path(tmp_path)


def test_absent_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        V4Config.from_path(tmp_path)
