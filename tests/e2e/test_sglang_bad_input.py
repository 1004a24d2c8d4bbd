# SPDX-License-Identifier: Apache-2.0
"""What SGLang cannot serve is refused, and what it can is served whatever happened."""

from __future__ import annotations

import json
from pathlib import Path

from served import SGLANG

import dsv4_sglang
from tests.support import sglang_engine
from tests.support.comparison import request
from tests.support.refusal_checks import RefusalChecks


class TestSglang(RefusalChecks):
    engine = SGLANG
    harness = sglang_engine
    plugin = dsv4_sglang
    configure = """
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.server_args import ServerArgs
def configure(args):
    ServerArgs(**{"device": "cpu", "skip_tokenizer_init": True, "context_length": 512} | args).resolve_once()
"""
    folder = "model_path"
    options = (
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
        ({"moe_a2a_backend": "deepep", "tp_size": 2}, ["--moe-a2a-backend deepep"]),
        ({"ep_num_redundant_experts": 2, "tp_size": 2, "ep_size": 2}, ["--ep-num-redundant-experts"]),
        ({"init_expert_location": "{}"}, ["--init-expert-location"]),
        ({"moe_runner_backend": "triton"}, ["--moe-runner-backend triton", "marlin"]),
        ({"enable_lora": True, "max_lora_rank": 8, "lora_target_modules": ["all"]}, ["--enable-lora"]),
        ({"dtype": "float16"}, ["--dtype float16"]),
        ({"device": "cuda", "dtype": "float32"}, ["--dtype float32"]),
        (
            {"enable_deepseek_v4_fp4_indexer": True},
            ["--enable-deepseek-v4-fp4-indexer requires SM100"],
        ),  # SGLang's own words
    )
    unsupported = ("0.6.0", ">=0.5.22,<0.5.24")
    registered = (
        "from sglang.srt.plugins import load_plugins; load_plugins();"
        "from sglang.srt.plugins.hook_registry import HookRegistry; print(sorted(HookRegistry._patched))",
        "HfModelConfigParser",
    )

    def test_what_is_chosen_on_a_gpu(self, tiny_flash: Path) -> None:
        """Arguments are resolved before a GPU is touched: Marlin for FP4 experts, captured decode
        steps, eager prefill."""
        code = f"""
import json
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.arg_groups.overrides import resolved_view
from sglang.srt.server_args import ServerArgs
args = ServerArgs(model_path={str(tiny_flash)!r}, device="cuda", context_length=512, skip_tokenizer_init=True)
args.resolve_once()
view = resolved_view(args)
names = ("moe_runner_backend", "attention_backend", "page_size", "disable_cuda_graph", "disable_prefill_cuda_graph")
print(json.dumps([getattr(view, name) for name in names]))
"""
        assert json.loads(self._python(code).splitlines()[-1]) == ["marlin", "dsv4_plugin", 256, False, True]

    def test_a_hook_that_did_not_apply_is_noticed(self, tiny_flash: Path) -> None:
        """SGLang only logs it; the attention backend finds a pool that is not ours."""
        from dsv4_sglang.hooks import POOL

        done = sglang_engine.start(sglang_engine.engine_args(tiny_flash), [[request([5, 6, 7])]], skip_hook=POOL)
        assert done.returncode != 0
        assert "dsv4's hook on SGLang's KV pool did not apply" in done.stderr
