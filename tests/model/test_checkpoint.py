# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dsv4.errors import CheckpointError, ConfigError
from dsv4.model.checkpoint import INDEX_FILE, read_headers, validate
from dsv4.model.config import V4Config
from dsv4.model.tensors import TensorSpec, tensor_specs
from dsv4.reference.tiny import write_tiny

GOLDEN = Path(__file__).parents[1] / "golden"


def config_of(name: str) -> V4Config:
    return V4Config.from_path(GOLDEN / "configs" / f"{name}.json")


def first_layers(config: V4Config, num_layers: int) -> V4Config:
    """The same model cut to its first `num_layers` layers and no draft."""
    return replace(config, layers=config.layers[:num_layers], draft="none", num_draft_layers=0)


# --------------------------------------------------------------------------------------------
# Validation


@pytest.fixture
def copy(tiny_flash: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_flash, tmp_path / "copy"))


def edit(folder: Path, name: str, tensor: torch.Tensor | None, new_name: str | None = None) -> None:
    """Replace, rename or delete one tensor and keep the index true."""
    index_file = folder / INDEX_FILE
    index = json.loads(index_file.read_text())
    shard = index["weight_map"].pop(name, None) or sorted(set(index["weight_map"].values()))[0]
    with safe_open(folder / shard, framework="pt") as f:
        tensors = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118 - no mapping
    old = tensors.pop(name, None)
    tensor = old if new_name else tensor
    if tensor is not None:
        tensors[new_name or name] = tensor
        index["weight_map"][new_name or name] = shard
    save_file(tensors, folder / shard)
    index_file.write_text(json.dumps(index))


def error_of(folder: Path, **options) -> str:
    with pytest.raises(CheckpointError) as caught:
        validate(folder, **options)
    return str(caught.value)


@pytest.mark.parametrize("experts", ["fp4", "fp8"])
@pytest.mark.parametrize("draft", ["mtp", "dspark", "none"])
def test_a_complete_checkpoint_passes(tmp_path, experts, draft):
    report = validate(write_tiny(tmp_path / "t", num_layers=2, experts=experts, draft=draft))
    assert (report.draft, report.config.expert_dtype) == (draft, experts)
    assert report.total_bytes == sum(spec.nbytes for spec in tensor_specs(report.config).values())


def test_base_checkpoints_may_have_fp32_block_scales(tmp_path):
    report = validate(write_tiny(tmp_path / "t", num_layers=1, experts="fp8", fp8_scale_dtype="F32"))
    assert report.expert_scale_dtype == "F32"


def test_released_checkpoints_must_have_e8m0_block_scales(copy):
    edit(copy, "layers.0.attn.wkv.scale", torch.ones(4, 2))
    assert "layers.0.attn.wkv.scale has dtype F32, expected F8_E8M0" in error_of(copy)


def test_tid2eid_may_be_int32(copy):
    name = "layers.0.ffn.gate.tid2eid"
    edit(copy, name, torch.zeros(512, 2, dtype=torch.int32))
    assert validate(copy).headers[name].dtype == "I32"


def test_missing_tensor_is_named(copy):
    edit(copy, "layers.3.attn.wq_b.weight", None)
    message = error_of(copy)
    assert message.splitlines()[0].startswith(f"{copy}: 1 missing, 0 extra, 0 misshapen, 0 mis-typed of 585 tensors")
    assert "layers.3.attn.wq_b.weight is missing" in message


def test_extra_tensor_is_named(copy):
    edit(copy, "layers.3.attn.stray", torch.zeros(3))
    assert "layers.3.attn.stray is not a tensor of this model" in error_of(copy)


def test_misshapen_tensor_is_named_with_both_shapes(copy):
    edit(copy, "layers.3.attn.attn_sink", torch.zeros(9))
    assert "layers.3.attn.attn_sink has shape [9], config.json implies [8]" in error_of(copy)


def test_mistyped_tensor_is_named_with_both_dtypes(copy):
    edit(copy, "layers.0.attn.attn_sink", torch.zeros(8, dtype=torch.bfloat16))
    assert "layers.0.attn.attn_sink has dtype BF16, expected F32" in error_of(copy)


def test_every_problem_is_named_in_one_error(copy):
    edit(copy, "norm.weight", None)
    edit(copy, "layers.1.attn.kv_norm.weight", torch.zeros(7))
    edit(copy, "layers.2.ffn.gate.weight", None, new_name="layers.2.ffn.gate.wait")
    message = error_of(copy)
    assert "2 missing, 1 extra, 1 misshapen, 1 mis-typed" in message
    for name in (
        "norm.weight is missing",
        "layers.1.attn.kv_norm.weight has",
        "layers.2.ffn.gate.weight is",
        "layers.2.ffn.gate.wait is",
    ):
        assert name in message


def test_many_problems_of_one_pattern_share_a_line_that_covers_exactly_them(copy):
    for expert in range(8):
        for linear in ("w1", "w3") if expert != 5 else ("w1",):
            edit(copy, f"layers.1.ffn.experts.{expert}.{linear}.weight", None)
        edit(copy, f"layers.4.ffn.experts.{expert}.w3.weight", None)
    message = error_of(copy)
    assert "layers.1.ffn.experts.{0-4,6-7}.w3.weight is missing" in message
    assert "layers.4.ffn.experts.{0-7}.w3.weight is missing" in message
    assert "layers.1.ffn.experts.5.w1.weight is missing" in message


@pytest.mark.parametrize(("value", "words"), [(8, "from 0 to 8"), (-1, "from -1 to 7")])
def test_a_hash_table_that_names_no_expert_is_refused(copy, value, words):
    table = torch.arange(1024).view(512, 2) % 8
    table[511, 1] = value
    edit(copy, "layers.0.ffn.gate.tid2eid", table)
    assert f"layers.0.ffn.gate.tid2eid holds expert ids {words}, config.json has experts 0 to 7" in error_of(copy)


def test_flash_weights_with_a_pro_config_are_recognised(tmp_path):
    flash = first_layers(config_of("DeepSeek-V4-Flash"), 1)
    assert (flash.num_hidden_layers, flash.draft, flash.num_draft_layers) == (1, "none", 0)
    folder = stub_checkpoint(tmp_path / "flash", [s for s in tensor_specs(flash).values() if ".experts." not in s.name])
    message = error_of(folder, config=config_of("DeepSeek-V4-Pro"))
    assert "is this a Flash checkpoint with a Pro config?" in message.splitlines()[0]
    assert len(message) < 40_000


def stub_checkpoint(folder: Path, specs: list[TensorSpec]) -> Path:
    """Headers of `specs` over a sparse file: any size, no disk."""
    folder.mkdir()
    header, offset = {}, 0
    for spec in specs:
        header[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    return folder


def test_absent_draft_is_accepted_unless_required(tiny_flash, tmp_path):
    specs = tensor_specs(V4Config.from_path(tiny_flash), include_draft=False)
    folder = stub_checkpoint(tmp_path / "no-draft", list(specs.values()))
    shutil.copy(tiny_flash / "config.json", folder)
    assert validate(folder).draft == "none"
    assert "mtp.0.e_proj.weight is missing" in error_of(folder, require_draft=True)


def test_incomplete_draft_is_refused(copy):
    edit(copy, "mtp.0.e_proj.weight", None)
    assert "the mtp draft is incomplete" in error_of(copy)


def test_undeclared_draft_is_reported_as_ignored(copy):
    raw = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(raw | {"num_nextn_predict_layers": 0}))
    report = validate(copy)
    assert report.draft == "none"
    assert "mtp.0.e_proj.weight" in report.ignored


def test_requiring_a_draft_that_config_lacks_is_refused(tmp_path):
    folder = write_tiny(tmp_path / "t", num_layers=1, draft="none")
    assert "declares no draft" in error_of(folder, require_draft=True)


def test_wrong_expert_dtype_in_config_is_explained(tmp_path):
    folder = write_tiny(tmp_path / "t", num_layers=1, experts="fp8")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"expert_dtype": "fp4"}))
    assert 'set "expert_dtype" to "fp8"' in error_of(folder)


# --------------------------------------------------------------------------------------------
# Damaged folders


def test_truncated_shards_are_all_named(copy):
    shards = sorted(copy.glob("*.safetensors"))
    for shard in shards[:2]:
        with shard.open("r+b") as file:
            file.truncate(shard.stat().st_size - 1)
    message = error_of(copy)
    assert "2 of 3 shards cannot be read" in message
    assert all(f"{shard.name}: truncated" in message for shard in shards[:2])


@pytest.mark.parametrize("content", [b"", b"abc", b"\xff" * 64, b"<html>not found</html>" * 100])
def test_a_shard_that_is_no_safetensors_is_named(copy, content):
    shard = sorted(copy.glob("*.safetensors"))[1]
    shard.write_bytes(content)
    assert f"{shard.name}: truncated or not safetensors" in error_of(copy)


def test_missing_shards_are_all_named(copy):
    for shard in sorted(copy.glob("*.safetensors"))[1:]:
        shard.unlink()
    message = error_of(copy)
    assert "2 of 3 shards" in message
    assert "model-00002-of-00003.safetensors" in message
    assert "model-00003-of-00003.safetensors" in message


def test_index_that_names_a_tensor_no_shard_holds_is_refused(copy):
    index = json.loads((copy / INDEX_FILE).read_text())
    index["weight_map"]["layers.9.ghost"] = "model-00001-of-00003.safetensors"
    (copy / INDEX_FILE).write_text(json.dumps(index))
    assert "layers.9.ghost: not in model-00001-of-00003.safetensors" in error_of(copy)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": 3}', "\x00"])
def test_index_that_is_no_index_is_refused(copy, content):
    (copy / INDEX_FILE).write_text(content)
    assert "is no index with a weight_map" in error_of(copy)


def test_folder_without_weights_is_refused(tmp_path):
    assert "is the download complete?" in error_of(tmp_path)


def test_absent_folder_is_refused(tmp_path):
    assert "no such folder" in error_of(tmp_path / "absent")


def test_folder_without_config_is_refused(copy):
    (copy / "config.json").unlink()
    with pytest.raises(ConfigError, match="is this a checkpoint folder"):
        validate(copy)


def test_shards_without_an_index_are_read(copy):
    (copy / INDEX_FILE).unlink()
    assert len(read_headers(copy)) == 585
