# SPDX-License-Identifier: Apache-2.0
"""What vLLM cannot serve is refused, and what it can is served whatever happened."""

from __future__ import annotations

from itertools import combinations, pairwise
from pathlib import Path

import pytest
from served import VLLM

import dsv4_vllm
from dsv4.model.config import V4Config
from tests.support import vllm_engine
from tests.support.refusal_checks import RefusalChecks


class TestVllm(RefusalChecks):
    engine = VLLM
    harness = vllm_engine
    plugin = dsv4_vllm
    configure = """
from vllm.engine.arg_utils import EngineArgs
def configure(args):
    EngineArgs(enforce_eager=True, skip_tokenizer_init=True, max_model_len=512, **args).create_engine_config()
"""
    folder = "model"
    options = (
        ({"tensor_parallel_size": 4}, ["--tensor-parallel-size 4", "o_groups 2"]),
        ({"kv_cache_dtype": "fp8_e5m2"}, ["--kv-cache-dtype fp8_e5m2", "fp8_ds_mla"]),
        (
            {"speculative_config": {"method": "mtp", "num_speculative_tokens": 9}},
            ["num_speculative_tokens 9; use 1 to 7"],
        ),
        ({"enable_lora": True}, ["--enable-lora"]),
        ({"data_parallel_size": 2}, ["--data-parallel-size", "one server per replica"]),
        ({"kv_offloading_size": 1.0}, ["--kv-offloading-size"]),
        ({"cpu_offload_gb": 4}, ["--cpu-offload-gb"]),
        ({"enable_return_routed_experts": True}, ["routed"]),
        ({"kv_cache_dtype_skip_layers": ["0"], "kv_cache_dtype": "fp8"}, ["--kv-cache-dtype-skip-layers"]),
        ({"load_format": "sharded_state"}, ["--load-format sharded_state", "safetensors"]),
        ({"load_format": "tensorizer"}, ["tensorizer"]),
        ({"enable_prompt_embeds": True}, ["--enable-prompt-embeds", "token id"]),
        ({"weight_transfer_config": {"backend": "nccl"}}, ["--weight-transfer-config", "reload_weights"]),
    )
    unsupported = ("0.40.0", ">=0.32,<0.34")
    registered = (
        "import dsv4_vllm; dsv4_vllm.register(); from vllm import ModelRegistry; print(ModelRegistry.models['DeepseekV4ForCausalLM'])",
        "dsv4_vllm.model",
    )

    def test_cuts_into_stages_that_cannot_run_are_refused(
        self, tiny_flash: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """All 31 of six layers: 0 and 1 have a window alone, 2 and 4 are CSA, 3 and 5 HCA; windows
        lie in three groups. What is not refused is served by test_vllm_paths."""
        from dsv4.errors import DeploymentError
        from dsv4_vllm.support import check_stages
        from tests.plugins.test_vllm_refusals import deployment

        config = V4Config.from_path(tiny_flash)
        taken = set()
        for cuts in (cuts for n in range(1, 6) for cuts in combinations(range(1, 6), n)):
            sizes = [b - a for a, b in pairwise((0, *cuts, 6))]
            monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", ",".join(map(str, sizes)))
            try:
                check_stages(config, deployment(tiny_flash, pipeline_parallel_size=len(sizes)))
                taken.add(tuple(sizes))
            except DeploymentError as error:
                assert "whose caches vLLM keeps in one group" in str(error)  # noqa: PT017
        assert taken == {(3, 3)}
