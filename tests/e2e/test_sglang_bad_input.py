# SPDX-License-Identifier: Apache-2.0
"""What cannot be served is refused in the first process, with one clear message, before anything is started."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bad_checkpoints import bad_checkpoints, copy, remove_shard
from comparison import request
from served import sglang_serve
from sglang_engine import engine_args, environment, start

import dsv4_sglang

# Resolves the engine's arguments, as `sglang serve` and Engine do first, for every line of JSON; prints what was raised.
CONFIGURE = """
import json, sys
out = sys.stdout; sys.stdout = sys.stderr
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.server_args import ServerArgs
for line in sys.stdin:
    try:
        args = ServerArgs(device="cpu", skip_tokenizer_init=True, **json.loads(line))
        args.resolve_once()
        print(json.dumps(["", ""]), file=out, flush=True)
    except Exception as e:
        print(json.dumps([type(e).__name__, str(e)]), file=out, flush=True)
"""


def configure(*cases: dict, env: dict[str, str] | None = None) -> list[tuple[str, str]]:
    """(exception type, message) of each case; ("", "") where it would have started."""
    lines = "".join(json.dumps({"dtype": "float32", "context_length": 512} | case) + "\n" for case in cases)
    # Not from the checkout: the working directory would come before PYTHONPATH.
    done = subprocess.run(
        [sys.executable, "-c", CONFIGURE], input=lines, capture_output=True, text=True, env=environment(**(env or {})), cwd="/", timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


OPTIONS: list[tuple[dict, list[str]]] = [
    ({"tp_size": 4}, ["--tp-size 4", "o_groups 2"]),
    ({"kv_cache_dtype": "fp8_e5m2"}, ["--kv-cache-dtype fp8_e5m2", "fp8_e4m3"]),
    ({"chunked_prefill_size": 48}, ["--chunked-prefill-size 48", "256"]),
    ({"attention_backend": "triton"}, ["--attention-backend triton", "dsv4_plugin"]),
    ({"speculative_algorithm": "EAGLE"}, ["--speculative-algorithm"]),
    ({"disaggregation_mode": "prefill"}, ["--disaggregation-mode"]),
    ({"enable_hierarchical_cache": True}, ["--enable-hierarchical-cache"]),
    ({"attn_cp_size": 2, "tp_size": 2}, ["--attn-cp-size"]),
    ({"enable_dp_attention": True, "dp_size": 2, "tp_size": 2}, ["--enable-dp-attention"]),
    ({"pp_size": 2}, ["--pp-size"]),
    ({"enable_lora": True, "max_lora_rank": 8, "lora_target_modules": ["all"]}, ["--enable-lora"]),
    ({"dtype": "float16"}, ["--dtype float16"]),
]


def test_each_bad_checkpoint_or_option_gets_its_own_message(tiny_flash: Path, tiny_pro: Path, tmp_path: Path) -> None:
    folders = bad_checkpoints(tiny_flash, tiny_pro)
    cases = [{"model_path": str(copy(tiny_flash, tmp_path / name, change))} for name, (change, _) in folders.items()]
    cases += [{"model_path": str(tiny_flash)} | option for option, _ in OPTIONS]
    found = configure(*cases, {"model_path": str(tiny_flash)})
    wanted = [words for _, words in folders.values()] + [words for _, words in OPTIONS]
    wrong = []
    for case, (kind, message), words in zip(cases, found, wanted, strict=False):
        if not kind or not all(word in message for word in words):
            wrong.append((case, kind, message, words))
    assert not wrong, "\n".join(map(str, wrong))
    assert found[-1] == ("", "")


def test_an_unknown_variable_refuses_v4(tiny_flash: Path) -> None:
    kind, message = configure({"model_path": str(tiny_flash)}, env={"DSV4_MOED": "on"})[0]
    assert kind == "RefusedError"
    assert "DSV4_MOED" in message
    assert "DSV4_MODE" in message


def test_an_unsupported_engine_version_refuses_v4(tiny_flash: Path, tmp_path: Path) -> None:
    info = tmp_path / "sglang-0.6.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sglang\nVersion: 0.6.0\n")
    kind, message = configure({"model_path": str(tiny_flash)}, env={"PYTHONPATH": str(tmp_path)})[0]
    assert kind == "RefusedError"
    assert "0.6.0" in message
    assert ">=0.5.22,<0.5.24" in message


@pytest.fixture
def broken_plugin(tmp_path: Path) -> dict[str, str]:
    """An environment in which dsv4_sglang.model does not import."""
    package = tmp_path / "broken" / "dsv4_sglang"
    shutil.copytree(Path(dsv4_sglang.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    model = package / "model.py"
    model.write_text(model.read_text().replace("import torch\n", "import torch\nimport a_module_that_is_not_there\n", 1))
    return {"PYTHONPATH": str(package.parent)}


def test_a_broken_plugin_refuses_v4_and_serves_a_llama(tiny_flash: Path, broken_plugin: dict[str, str], tmp_path: Path) -> None:
    kind, message = configure({"model_path": str(tiny_flash)}, env=broken_plugin)[0]
    assert kind == "RefusedError"
    assert "a_module_that_is_not_there" in message
    _assert_serves_a_llama(tmp_path, broken_plugin)


def test_a_llama_is_served_by_sglang_itself(tmp_path: Path) -> None:
    _assert_serves_a_llama(tmp_path, {})


def _assert_serves_a_llama(tmp_path: Path, env: dict[str, str]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    llama = LlamaForCausalLM(config).eval()
    folder = tmp_path / "llama"
    llama.save_pretrained(folder)
    prompts = [[3, 5, 8, 13, 21], list(range(40, 150))]
    engine = {"model_path": str(folder), "dtype": "float32", "device": "cpu", "context_length": 256, "max_total_tokens": 2048}
    done = start(engine, [[request(p, 12, prompt_logprobs=False) for p in prompts]], env)
    assert done.returncode == 0, done.stderr[-4000:]
    for prompt, output in zip(prompts, json.loads(done.stdout)["phases"][0], strict=True):
        with torch.inference_mode():
            want = llama.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert output["tokens"] == want[0, len(prompt) :].tolist()


def test_a_hook_that_did_not_apply_is_noticed(tiny_flash: Path) -> None:
    """SGLang only logs it; the attention backend finds a pool that is not ours."""
    from dsv4_sglang.hooks import POOL

    done = start(engine_args(tiny_flash), [[request([5, 6, 7])]], skip_hook=POOL)
    assert done.returncode != 0
    assert "dsv4's hook on SGLang's KV pool did not apply" in done.stderr


def test_sglang_serve_ends_with_the_message_and_a_nonzero_exit(tiny_flash: Path, tmp_path: Path) -> None:
    folder = copy(tiny_flash, tmp_path / "missing", remove_shard)
    done = subprocess.run(sglang_serve(folder), capture_output=True, text=True, env=environment(), timeout=200)
    assert done.returncode != 0
    assert "dsv4.errors.CheckpointError" in done.stderr[-3000:], done.stderr[-3000:]
    assert "model-0000" in done.stderr[-3000:]


def test_mode_off_leaves_sglangs_own_model_in_place() -> None:
    """Its own V4 is not ours to test; that ours stepped aside is."""
    code = (
        "from sglang.srt.plugins import load_plugins; load_plugins();"
        "from sglang.srt.plugins.hook_registry import HookRegistry; print(sorted(HookRegistry._patched))"
    )
    hooks = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(DSV4_MODE=mode), timeout=200).stdout
        for mode in ("off", "auto")
    ]
    assert "HfModelConfigParser" not in hooks[0]
    assert "HfModelConfigParser" in hooks[1]
