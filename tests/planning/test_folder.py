# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that dsv4 has no entry for, planned from what their headers hold."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from safetensors import safe_open

from dsv4.errors import PlanError
from dsv4.machine.hardware import find_gpu
from dsv4.model.checkpoint import TensorHeader, read_headers
from dsv4.model.config import V4Config
from dsv4.planning.deployment import find_checkpoint
from dsv4.planning.memory.folder import checkpoint_in, checkpoint_on_hub, tally
from dsv4.planning.memory.weights import inventory
from dsv4.planning.planner import Question, plan
from dsv4.planning.text import describe
from dsv4.reference.tiny import write_tiny

CONFIGS = Path(__file__).parents[2] / "recipes" / "configs"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("models") / "tiny", "flash", num_layers=6)


def _copy(folder: Path, to: Path, **changes: object) -> Path:
    """The folder with other fields in its config.json; None removes one."""
    shutil.copytree(folder, to, dirs_exist_ok=True)
    raw = json.loads((to / "config.json").read_text()) | changes
    (to / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v is not None}))
    return to


@pytest.mark.parametrize("experts", ["fp4", "fp8"])
@pytest.mark.parametrize("draft", ["mtp", "none"])
def test_the_headers_of_a_released_format_give_what_its_config_implies(tmp_path, experts, draft):
    written = write_tiny(tmp_path / "tiny", "pro", num_layers=6, experts=experts, draft=draft)
    checkpoint = checkpoint_in(written)
    assert checkpoint.weights == inventory(V4Config.from_path(written))
    assert checkpoint.unserved == ""


@pytest.mark.parametrize("name", ["flash", "pro-0813"])
def test_a_config_alone_plans_as_the_released_checkpoint(tmp_path, name):
    released = find_checkpoint(name)
    shutil.copy(CONFIGS / f"{released.repo.split('/')[1]}.json", tmp_path / "config.json")
    checkpoint = checkpoint_in(tmp_path)
    assert checkpoint.total_bytes == released.total_bytes
    gpu = find_gpu("h200")
    proofs = [
        plan(Question(checkpoint=c, gpu=gpu, count=8, nodes=1, context=131_072))[0].proof
        for c in (checkpoint, released)
    ]
    assert proofs[0].held_low == proofs[1].held_low


def test_every_format_counts_its_own_bytes_where_its_module_lies(folder):
    config, headers = V4Config.from_path(folder), read_headers(folder)
    before = tally(config, headers, "here")
    name = "layers.1.ffn.experts.0.w1.weight"
    packed = TensorHeader("f", "U8", headers[name].shape)
    nvfp4 = {
        **headers,
        name: packed,
        f"{name}_scale": TensorHeader("f", "F8_E4M3", (8, 16)),
        f"{name}_scale_2": TensorHeader("f", "F32", (1,)),
    }
    assert tally(config, nvfp4, "here").layers[1].experts == before.layers[1].experts + 8 * 16 + 4
    wide = "layers.1.attn.wq_b.weight"
    bf16 = {**headers, wide: replace(headers[wide], dtype="BF16")}
    grown = headers[wide].nbytes
    assert tally(config, bf16, "here").layers[1].sharded == before.layers[1].sharded + grown
    unknown = {**headers, "layers.1.attn.rotation.weight": TensorHeader("f", "F4", (3, 3))}
    assert tally(config, unknown, "here").layers[1].replicated == before.layers[1].replicated + 5
    hf = {f"model.{n}": h for n, h in headers.items()}
    assert tally(config, hf, "here") == before


def test_pruned_experts_and_an_absent_draft_weigh_less(folder):
    config, headers = V4Config.from_path(folder), read_headers(folder)
    pruned = {n: h for n, h in headers.items() if ".experts.0." not in n}
    assert tally(config, pruned, "here").layers[2].experts < tally(config, headers, "here").layers[2].experts
    without = {n: h for n, h in headers.items() if not n.startswith("mtp.")}
    assert tally(config, without, "here").draft.total == 0


def test_nvfp4_is_planned_and_said_not_to_be_served(folder, tmp_path):
    nvfp4 = _copy(folder, tmp_path / "nvfp4", quantization_config={"quant_algo": "NVFP4"})
    checkpoint = checkpoint_in(nvfp4)
    assert "NVFP4" in checkpoint.unserved
    assert checkpoint.weights == checkpoint_in(folder).weights
    for gpu, works in (("h200", True), ("a100", False)):
        question = Question(checkpoint=checkpoint, gpu=find_gpu(gpu), count=1, nodes=1, context=8192)
        found = plan(question)
        assert any(c.works for c in found) is works
        assert "dsv4 does not serve it" in " ".join(describe(question, found, 1).split())


def test_a_folder_that_dsv4_check_refuses_is_planned_with_the_reason(folder, tmp_path):
    other = _copy(folder, tmp_path / "other", expert_dtype="int4")
    assert "expert_dtype is 'int4'" in checkpoint_in(other).unserved


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "deepseek_v41"}, "is DeepSeek-V4.1"),
        ({"architectures": ["LlamaForCausalLM"]}, "is not DeepSeek-V4"),
        ({"hidden_size": None}, "'hidden_size' is missing"),
    ],
)
def test_what_is_no_v4_is_one_line(folder, tmp_path, changes, message):
    with pytest.raises(PlanError, match=message) as e:
        checkpoint_in(_copy(folder, tmp_path / "bad", **changes))
    assert "\n" not in str(e.value)


def test_a_damaged_folder_and_an_unknown_dtype_are_one_line(folder, tmp_path):
    broken = _copy(folder, tmp_path / "broken")
    shard = next(broken.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(PlanError, match="cannot be read") as e:
        checkpoint_in(broken)
    assert "\n" not in str(e.value)
    with pytest.raises(PlanError, match="cannot be read"):
        checkpoint_in(tmp_path)
    config, headers = V4Config.from_path(folder), read_headers(folder)
    with pytest.raises(PlanError, match="dtype Q3"):
        tally(config, {**headers, "embed.weight": TensorHeader("f", "Q3", (1,))}, "here")


def test_a_repository_is_planned_from_its_headers(folder, monkeypatch):
    files = {}
    for shard in folder.glob("*.safetensors"):
        with safe_open(shard, framework="numpy") as f:
            slices = {name: f.get_slice(name) for name in f.keys()}  # noqa: SIM118 - not a dictionary
            tensors = {n: SimpleNamespace(dtype=s.get_dtype(), shape=s.get_shape()) for n, s in slices.items()}
        files[shard.name] = SimpleNamespace(tensors=tensors)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, name: str(folder / name))
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", lambda repo: SimpleNamespace(files_metadata=files))
    checkpoint = checkpoint_on_hub("somebody/V4-repack")
    assert checkpoint.weights == checkpoint_in(folder).weights
    assert (checkpoint.id, checkpoint.repo) == ("V4-repack", "somebody/V4-repack")


def test_a_repository_that_cannot_be_read_is_one_line(monkeypatch):
    def refuse(repo: str, name: str) -> str:
        raise OSError("offline\nmode")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(PlanError, match="give a downloaded folder") as e:
        checkpoint_on_hub("somebody/V4-repack")
    assert "\n" not in str(e.value)
