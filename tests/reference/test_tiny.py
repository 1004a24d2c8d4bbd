# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import dsv4.reference.tiny
from dsv4.errors import CheckpointError, ConfigError
from dsv4.model.checkpoint import validate
from dsv4.model.config import LayerKind, V4Config
from dsv4.reference.tiny import TinyDims, tiny_config, write_tiny


def digest(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def tensor(folder: Path, name: str) -> torch.Tensor:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    with safe_open(folder / index["weight_map"][name], framework="pt") as shard:
        return shard.get_tensor(name)


@pytest.mark.parametrize(
    ("variant", "ratios"), [("flash", [0, 0, 4, 128, 4, 128, 0]), ("pro", [128, 128, 4, 128, 4, 128, 0])]
)
def test_layer_mix_follows_the_released_one(variant, ratios):
    assert tiny_config(variant)["compress_ratios"] == ratios


@pytest.mark.parametrize(
    ("variant", "layers", "real"), [("flash", 43, "DeepSeek-V4-Flash"), ("pro", 61, "DeepSeek-V4-Pro")]
)
def test_layer_mix_at_full_depth_equals_the_released_list(variant, layers, real):
    raw = json.loads((Path(__file__).parents[1] / "golden" / "configs" / f"{real}.json").read_text())
    assert tiny_config(variant, layers)["compress_ratios"] == raw["compress_ratios"]


@pytest.mark.parametrize("variant", ["flash", "pro"])
def test_config_has_exactly_the_released_keys(variant):
    raw = json.loads((Path(__file__).parents[1] / "golden" / "configs" / "DeepSeek-V4-Pro.json").read_text())
    assert set(tiny_config(variant)) == set(raw)


def test_what_makes_v4_what_it_is_keeps_its_true_size(tiny_flash):
    c = V4Config.from_path(tiny_flash)
    assert (c.head_dim, c.qk_rope_head_dim, c.sliding_window, c.index_head_dim, c.hc_mult, c.hc_sinkhorn_iters) == (
        512,
        64,
        128,
        128,
        4,
        20,
    )
    assert (c.max_position_embeddings, c.yarn.factor, c.yarn.original_max_position_embeddings) == (1048576, 16, 65536)
    assert {layer.kind for layer in c.layers} == set(LayerKind)
    assert c.index_n_heads >= 16


def test_folder_is_below_50_mb_sharded_and_valid(tiny_flash, tiny_pro):
    for folder in (tiny_flash, tiny_pro):
        assert sum(file.stat().st_size for file in folder.iterdir()) < 50e6
        report = validate(folder, require_draft=True)
        assert len(report.files) > 1


def test_same_seed_gives_same_bytes_and_another_seed_others(tmp_path):
    a, b, c = (
        digest(write_tiny(tmp_path / name, num_layers=1, seed=seed)) for name, seed in (("a", 7), ("b", 7), ("c", 8))
    )
    assert a == b
    assert a["model.safetensors"] != c["model.safetensors"]


def test_layers_do_not_depend_on_how_many_there_are(tmp_path):
    one, two = write_tiny(tmp_path / "1", num_layers=1), write_tiny(tmp_path / "2", num_layers=2)
    for name in ("layers.0.attn.wq_a.weight", "embed.weight", "mtp.0.ffn.gate.bias"):
        assert torch.equal(tensor_of(one, name).view(torch.uint8), tensor_of(two, name).view(torch.uint8))


def tensor_of(folder: Path, name: str) -> torch.Tensor:
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as shard:
            if name in shard.keys():  # noqa: SIM118 - no mapping
                return shard.get_tensor(name)
    raise KeyError(name)


def test_hash_table_holds_distinct_valid_experts(tiny_flash):
    table = tensor(tiny_flash, "layers.0.ffn.gate.tid2eid")
    assert table.dtype == torch.int64
    assert (table[:, 0] != table[:, 1]).all()
    assert table.min() >= 0
    assert table.max() < 8


def test_every_fp4_code_and_finite_fp8_codes_only(tiny_flash):
    packed = tensor(tiny_flash, "layers.0.ffn.experts.0.w1.weight").view(torch.uint8)
    assert set((packed & 15).unique().tolist()) == set(range(16)) == set((packed >> 4).unique().tolist())
    assert torch.isfinite(tensor(tiny_flash, "layers.0.attn.wq_b.weight").float()).all()


def test_block_scales_differ_so_that_a_misplaced_one_shows(tiny_flash):
    for name in ("layers.0.attn.wq_b.scale", "layers.0.ffn.experts.0.w1.scale"):
        assert len(tensor(tiny_flash, name).view(torch.uint8).unique()) == 3


def test_existing_folder_is_refused_and_untouched(tmp_path):
    (tmp_path / "mine").write_text("keep")
    with pytest.raises(CheckpointError, match="not empty; remove it or give another folder"):
        write_tiny(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]


def test_existing_file_is_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("keep")
    with pytest.raises(CheckpointError, match="already exists"):
        write_tiny(file)
    assert file.read_text() == "keep"


def test_empty_folder_is_filled(tmp_path):
    (tmp_path / "empty").mkdir()
    assert validate(write_tiny(tmp_path / "empty", num_layers=1))


def test_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(dsv4.reference.tiny, "_write_tokenizer", fail)
    with pytest.raises(OSError, match="disk full"):
        write_tiny(tmp_path / "t", num_layers=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "bad",
    [
        {"variant": "flsh"},
        {"num_layers": 0},
        {"experts": "fp16"},
        {"draft": "eagle"},
        {"dims": TinyDims(vocab_size=128)},
    ],
)
def test_bad_choice_is_refused_before_anything_is_written(tmp_path, bad):
    with pytest.raises(ConfigError, match="tiny: "):
        write_tiny(tmp_path / "t", **bad)
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------
# Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_flash):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_flash)


def test_tokenizer_has_v4s_ids_and_adds_no_bos(tokenizer):
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token) == (0, 1, "<｜end▁of▁sentence｜>")
    assert tokenizer.encode("a") == tokenizer.encode("a", add_special_tokens=False)
    assert len(tokenizer) == 512


@pytest.mark.parametrize("text", ["Hello, world!", "é ü 漢字 🙂", "\x00\x7f\n\t", "a" * 1000])
def test_any_text_survives_the_tokenizer_one_token_per_byte(tokenizer, text):
    ids = tokenizer.encode(text)
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text


def test_chat_tokens_are_single_and_survive_skip_special_tokens(tokenizer):
    for token in dsv4.reference.tiny.CHAT_TOKENS:
        ids = tokenizer.encode(token)
        assert len(ids) == 1
        assert tokenizer.decode(ids, skip_special_tokens=True) == token


def test_every_id_decodes_to_text(tokenizer):
    assert all(tokenizer.convert_ids_to_tokens(i) for i in range(512))


@pytest.mark.slow
def test_vllms_v4_tokenizer_mode_renders_a_chat_with_it(tiny_flash):
    pytest.importorskip("vllm")
    from vllm.tokenizers.registry import get_tokenizer

    tokenizer = get_tokenizer(str(tiny_flash), tokenizer_mode="deepseek_v4")
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=True, thinking=False)
    assert tokenizer.decode(ids) == "<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜></think>"
    assert len(ids) == 6
