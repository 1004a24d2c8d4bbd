# SPDX-License-Identifier: Apache-2.0
"""What cannot be served is refused in the first process, with one clear message, before anything is started."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from served import vllm_serve
from vllm_engine import environment, request, run

import dsv4_vllm
from dsv4.tiny import write_tiny

# Builds the engine's configuration, as `vllm serve` and LLM do first, for every line of JSON; prints what was raised.
CONFIGURE = """
import json, sys
from vllm.engine.arg_utils import EngineArgs
out = sys.stdout; sys.stdout = sys.stderr
for line in sys.stdin:
    try:
        EngineArgs(enforce_eager=True, skip_tokenizer_init=True, **json.loads(line)).create_engine_config()
        print(json.dumps(["", ""]), file=out, flush=True)
    except Exception as e:
        print(json.dumps([type(e).__name__, str(e)]), file=out, flush=True)
"""


def configure(*cases: dict, env: dict[str, str] | None = None) -> list[tuple[str, str]]:
    """(exception type, message) of each case; ("", "") where it would have started."""
    lines = "".join(json.dumps({"dtype": "float32", "max_model_len": 512} | case) + "\n" for case in cases)
    # Not from the checkout: the working directory would come before PYTHONPATH.
    done = subprocess.run(
        [sys.executable, "-c", CONFIGURE], input=lines, capture_output=True, text=True, env=environment(**(env or {})), cwd="/", timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def _copy(folder: Path, to: Path, change: Callable[[Path], None]) -> str:
    shutil.copytree(folder, to)
    change(to)
    return str(to)


def _config(**fields: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    return change


def _tensors(edit: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for file in folder.glob("*.safetensors"):
            tensors = load_file(file)
            if "layers.2.attn.wq_b.weight" in tensors:
                edit(tensors)
                save_file(tensors, file)

    return change


def _truncate(folder: Path) -> None:
    file = max(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1000])


def _remove(folder: Path) -> None:
    max(folder.glob("*.safetensors")).unlink()


def test_each_bad_checkpoint_or_option_gets_its_own_message(tiny_flash: Path, tiny_pro: Path, tmp_path: Path) -> None:
    ratios = json.loads((tiny_flash / "config.json").read_text())["compress_ratios"]
    quant = json.loads((tiny_flash / "config.json").read_text())["quantization_config"]

    def wrong_shape(t: dict[str, torch.Tensor]) -> None:
        t["layers.2.attn.wq_b.weight"] = t["layers.2.attn.wq_b.weight"][:-128].contiguous()

    def wrong_dtype(t: dict[str, torch.Tensor]) -> None:
        t["layers.2.attn.attn_sink"] = t["layers.2.attn.attn_sink"].bfloat16()

    def mismatch(folder: Path) -> None:
        shutil.copy(tiny_pro / "config.json", folder / "config.json")

    folders: dict[str, tuple[Callable[[Path], None], list[str]]] = {
        "truncated": (_truncate, ["truncated", "model-0000"]),
        "missing-shard": (_remove, ["model-0000", "missing"]),
        "shape": (_tensors(wrong_shape), ["layers.2.attn.wq_b.weight", "shape"]),
        "dtype": (_tensors(wrong_dtype), ["layers.2.attn.attn_sink", "BF16"]),
        "mismatch": (mismatch, ["layers.0.attn.compressor", "config.json"]),
        "ratio": (_config(compress_ratios=[7, *ratios[1:]]), ["compress_ratios[0] is 7"]),
        "nvfp4": (_config(quantization_config=quant | {"moe_quant_algo": "NVFP4"}), ["NVFP4"]),
        "vision": (_config(vision_n_layers=32), ["Vision-Exp"]),
    }
    cases = [{"model": _copy(tiny_flash, tmp_path / name, change)} for name, (change, _) in folders.items()]
    options: list[tuple[dict, list[str]]] = [
        ({"tensor_parallel_size": 4}, ["--tensor-parallel-size 4", "o_groups 2"]),
        ({"kv_cache_dtype": "fp8_e5m2"}, ["--kv-cache-dtype fp8_e5m2", "fp8_ds_mla"]),
        ({"speculative_config": {"method": "mtp", "num_speculative_tokens": 1}}, ["--speculative-config"]),
        ({"enable_lora": True}, ["--enable-lora"]),
    ]
    cases += [{"model": str(tiny_flash)} | option for option, _ in options]
    found = configure(*cases, {"model": str(tiny_flash)})
    wanted = [words for _, words in folders.values()] + [words for _, words in options]
    for case, (kind, message), words in zip(cases, found, wanted, strict=False):
        assert kind, f"{case} was accepted"
        assert all(word in message for word in words), (case, kind, message)
    assert found[-1] == ("", "")


def test_an_unknown_variable_refuses_v4(tiny_flash: Path) -> None:
    kind, message = configure({"model": str(tiny_flash)}, env={"DSV4_MOED": "on"})[0]
    assert kind == "RefusedError"
    assert "DSV4_MOED" in message
    assert "DSV4_MODE" in message


def test_an_unsupported_engine_version_refuses_v4(tiny_flash: Path, tmp_path: Path) -> None:
    info = tmp_path / "vllm-0.40.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.40.0\n")
    kind, message = configure({"model": str(tiny_flash)}, env={"PYTHONPATH": str(tmp_path)})[0]
    assert kind == "RefusedError"
    assert "0.40.0" in message
    assert ">=0.32,<0.34" in message


@pytest.fixture
def broken_plugin(tmp_path: Path) -> dict[str, str]:
    """An environment in which dsv4_vllm.model does not import."""
    package = tmp_path / "broken" / "dsv4_vllm"
    shutil.copytree(Path(dsv4_vllm.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    model = package / "model.py"
    model.write_text(model.read_text().replace("import torch\n", "import torch\nimport a_module_that_is_not_there\n", 1))
    return {"PYTHONPATH": str(package.parent)}


def test_a_plugin_that_fails_to_import_refuses_v4(tiny_flash: Path, broken_plugin: dict[str, str]) -> None:
    kind, message = configure({"model": str(tiny_flash)}, env=broken_plugin)[0]
    assert kind == "RefusedError"
    assert "a_module_that_is_not_there" in message


@pytest.mark.parametrize("broken", [False, True], ids=["healthy plugin", "broken plugin"])
def test_a_llama_is_served_whatever_happened_to_the_plugin(broken: bool, broken_plugin: dict[str, str], tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    llama = LlamaForCausalLM(config).eval()
    folder = tmp_path / "llama"
    llama.save_pretrained(folder)
    prompts = [[3, 5, 8, 13, 21], list(range(40, 150))]
    engine = {
        "model": str(folder),
        "dtype": "float32",
        "max_model_len": 256,
        "max_num_batched_tokens": 64,
        "kv_cache_memory_bytes": 32 << 20,
    }
    env = broken_plugin if broken else {}
    result = run(engine, [[request(p, 12, prompt_logprobs=False) for p in prompts]], env=env, status=False)
    for prompt, output in zip(prompts, result["phases"][0], strict=True):
        with torch.inference_mode():
            want = llama.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert output["tokens"] == want[0, len(prompt) :].tolist()


def test_vllm_serve_ends_with_the_message_and_a_nonzero_exit(tiny_flash: Path, tmp_path: Path) -> None:
    folder = _copy(tiny_flash, tmp_path / "missing", _remove)
    done = subprocess.run(vllm_serve(folder), capture_output=True, text=True, env=environment(), timeout=200)
    assert done.returncode != 0
    end = done.stderr.strip().splitlines()[-4:]
    assert any("dsv4.errors.CheckpointError" in line for line in end), end
    assert any("model-0000" in line for line in end)


def test_mode_off_leaves_vllms_own_model_in_place(tiny_flash: Path) -> None:
    """Its own V4 is not ours to test; that ours stepped aside is."""
    code = "import dsv4_vllm; dsv4_vllm.register(); from vllm import ModelRegistry; print(ModelRegistry.models['DeepseekV4ForCausalLM'])"
    served = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(DSV4_MODE=mode), timeout=200).stdout
        for mode in ("off", "auto")
    ]
    assert "dsv4_vllm" not in served[0]
    assert "dsv4_vllm.model" in served[1]


def test_tiny_checkpoints_with_fp8_experts_are_served(tmp_path: Path) -> None:
    """Base checkpoints: experts in block FP8, here with e8m0 scales."""
    from vllm_engine import TIE_MARGIN, Oracle, assert_equal, engine_args

    from hf_oracle import load_hf, prompt_without_ties

    folder = write_tiny(tmp_path / "fp8", "flash", experts="fp8")
    oracle = Oracle(load_hf(folder))
    text = prompt_without_ties(oracle.model, 200, margin=TIE_MARGIN)
    assert_equal(run(engine_args(folder), [[request(text, 4)]]), oracle)
