# SPDX-License-Identifier: Apache-2.0
"""What vLLM decides for V4 on GPUs that are not here, up to the first kernel: see `fake_gpu`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dsv4.model.config import Routing
from dsv4.model.kv_layout import CacheFormats, IndexFormat, KvFormat, StateMapping
from dsv4.planning.deployment import find_checkpoint
from dsv4.planning.memory.vllm import vllm_pool
from dsv4.planning.memory.weights import stage_weights

ROOT = Path(__file__).parents[2]
CONFIGS = {"flash": "DeepSeek-V4-Flash", "pro": "DeepSeek-V4-Pro"}
NEXT = ROOT / ".env" / "vllm-0.33.0"


def build(
    folder: Path, capability: tuple[int, int], name: str, tensors: str, newest: bool = False, **args: Any
) -> dict[str, Any]:
    if newest and not (NEXT / ".unpacked").exists():
        pytest.skip(f"{NEXT} is missing; `make env` unpacks it")
    plan = {"capability": capability, "name": name, "folder": str(folder), "tensors": tensors, "args": args}
    path = os.pathsep.join(str(p) for p in ([NEXT] if newest else []) + [ROOT])
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("DSV4_", "VLLM_", "TRITON_"))}
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.fake_gpu"],
        input=json.dumps(plan), capture_output=True, text=True, timeout=600,
        env=kept | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def released(model: str, tiny: Path, folder: Path) -> Path:
    """A folder with the released config of `model` and a tokenizer, but no weights."""
    shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    shutil.copy(ROOT / "tests" / "golden" / "configs" / f"{CONFIGS[model]}.json", folder / "config.json")
    return folder


@pytest.mark.parametrize(
    ("model", "capability", "name", "newest", "kv_cache_dtype"),
    [
        ("flash", (8, 0), "NVIDIA A100-SXM4-80GB", False, "auto"),
        ("pro", (8, 9), "NVIDIA L40S", True, "bfloat16"),
    ],
)
def test_gpus_that_native_excludes_get_marlin_our_kernels_and_graphs(
    tiny_flash: Path,
    tmp_path: Path,
    model: str,
    capability: tuple[int, int],
    name: str,
    newest: bool,
    kv_cache_dtype: str,
) -> None:
    folder = released(model, tiny_flash, tmp_path / model)
    report = build(folder, capability, name, "meta", newest, max_model_len=65_536, kv_cache_dtype=kv_cache_dtype)
    assert report["class"] == "dsv4_vllm.model.DeepseekV4ForCausalLM"
    assert report["runner_v2"]
    methods = report["methods"]
    assert methods.pop("model.layers.ffn.experts.routed_experts") == "Mxfp4MoEMethod MARLIN"
    assert methods.pop("model.layers.attn.wo_a") == "DequantizedLinearMethod"
    assert set(methods.values()) == {
        "Fp8LinearMethod MarlinFP8ScaledMMLinearKernel", "UnquantizedLinearMethod", "UnquantizedEmbeddingMethod",
    }  # fmt: skip
    assert set(report["ops"].values()) == {"triton"}, report["ops"]
    # Decode steps are captured: what is not made of kernels alone would say NEVER.
    assert report["graph_support"] == ["UNIFORM_BATCH"]
    assert report["graphs"] == "FULL_AND_PIECEWISE"
    # The plugin was imported before vLLM said that it breaks graphs, as in a forked worker.
    layers = find_checkpoint(model).config.num_hidden_layers
    assert report["breaks"] == {"enabled": True, "layers": layers, "breakable": layers}
    assert report["warm_up"] == [[layers, "dsv4"]]
    assert (report["layout"], report["block_size"], report["mapping"]) == ("BLHNC", 256, "summary")

    config, packed = find_checkpoint(model).config, kv_cache_dtype == "auto"
    formats = (
        CacheFormats(KvFormat.FP8_DS_MLA, IndexFormat.FP8, 2)
        if packed
        else CacheFormats(KvFormat.PLAIN, IndexFormat.PLAIN, 2)
    )
    assert report["blocks"] == (20 << 30) // vllm_pool(config, formats, mapping=StateMapping.SUMMARY).block_bytes
    planned = stage_weights(config, tp=1, dp=1, ep=False, pp=1, with_draft=False)[0].total_bytes
    # Held otherwise than in the checkpoint: expert ids of hash layers as int32, wo_a in bf16 and
    # without its scales.
    hashed = (
        sum(layer.routing is Routing.HASH for layer in config.layers)
        * config.vocab_size
        * config.num_experts_per_tok
        * 4
    )
    rows, columns = config.o_groups * config.o_lora_rank, config.heads_per_group * config.head_dim
    plain_wo_a = config.num_hidden_layers * (rows * columns - (rows // 128) * (columns // 128))
    assert report["weight_bytes"] == planned - hashed + plain_wo_a


def test_a_checkpoint_fills_every_parameter_of_the_methods_that_serve_on_a_gpu(tiny_flash: Path) -> None:
    report = build(tiny_flash, (8, 6), "NVIDIA RTX A6000", "loaded", max_model_len=4096)
    assert report["methods"]["model.layers.ffn.experts.routed_experts"] == "Mxfp4MoEMethod MARLIN"
    assert report["parameters"] > 150
    assert report["unloaded"] == {}
