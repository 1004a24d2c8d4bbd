# SPDX-License-Identifier: Apache-2.0
"""What SGLang cannot serve is refused, and what it can is served whatever happened."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from served import SGLANG

import dsv4_sglang
from tests.support import sglang_engine
from tests.support.comparison import ENV_DIR, ROOT, request
from tests.support.refusal_checks import RefusalChecks

PREVIOUS = ENV_DIR / "sglang-0.5.22"


def toolkit(folder: Path) -> dict[str, str]:
    """An environment with the compilers that SGLang needs on a GPU."""
    (folder / "bin").mkdir()
    for program in ("nvcc", "ninja"):
        (folder / "bin" / program).write_text("#!/bin/sh\n")
        (folder / "bin" / program).chmod(0o755)
    return {"CUDA_HOME": str(folder), "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}


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
        ({"speculative_algorithm": "DSPARK"}, ["--speculative-algorithm DSPARK", "an MTP block", "use NEXTN"]),
        ({"speculative_algorithm": "NGRAM"}, ["--speculative-algorithm NGRAM", "use NEXTN"]),
        ({"speculative_algorithm": "EAGLE3"}, ["--speculative-algorithm EAGLE3", "use NEXTN"]),
        ({"speculative_algorithm": "NEXTN", "speculative_num_steps": 8}, ["--speculative-num-steps 8", "1 to 7"]),
        (
            {"speculative_algorithm": "EAGLE", "speculative_num_steps": 2, "speculative_eagle_topk": 2},
            ["--speculative-eagle-topk 2", "use 1"],
        ),
        (
            {"speculative_algorithm": "EAGLE", "speculative_num_steps": 2, "speculative_num_draft_tokens": 4},
            ["--speculative-num-draft-tokens 4", "use 3"],
        ),
        (
            {"speculative_algorithm": "EAGLE", "speculative_draft_model_path": "/elsewhere"},
            ["--speculative-draft-model-path /elsewhere", "leave it out"],
        ),
        (
            {"speculative_algorithm": "EAGLE", "speculative_accept_threshold_acc": 0.5},
            ["--speculative-accept-threshold-acc 0.5", "leave it out"],
        ),
        ({"disaggregation_mode": "prefill"}, ["--disaggregation-mode"]),
        ({"enable_hierarchical_cache": True}, ["--enable-hierarchical-cache"]),
        ({"attn_cp_size": 2, "tp_size": 2}, ["--attn-cp-size"]),
        ({"enable_dp_attention": True, "dp_size": 2, "tp_size": 2}, ["--enable-dp-attention"]),
        ({"pp_size": 2}, ["--pp-size"]),
        ({"dp_size": 2}, ["--dp-size 2", "one server per replica"]),
        ({"enable_return_routed_experts": True}, ["--enable-return-routed-experts", "zeros"]),
        ({"expert_distribution_recorder_mode": "stat"}, ["--expert-distribution-recorder-mode"]),
        ({"enable_deterministic_inference": True}, ["--enable-deterministic-inference"]),
        ({"enable_memory_saver": True}, ["--enable-memory-saver"]),
        ({"cpu_offload_gb": 4}, ["--cpu-offload-gb"]),
        ({"offload_group_size": 2}, ["--offload-group-size"]),
        ({"disable_hybrid_swa_memory": True}, ["--disable-hybrid-swa-memory"]),
        ({"load_format": "sharded_state"}, ["--load-format sharded_state", "safetensors"]),
        ({"moe_a2a_backend": "deepep", "tp_size": 2}, ["--moe-a2a-backend deepep"]),
        ({"ep_num_redundant_experts": 2, "tp_size": 2, "ep_size": 2}, ["--ep-num-redundant-experts"]),
        ({"init_expert_location": "{}"}, ["--init-expert-location"]),
        ({"moe_runner_backend": "triton"}, ["--moe-runner-backend triton", "marlin"]),
        ({"enable_lora": True, "max_lora_rank": 8, "lora_target_modules": ["all"]}, ["--enable-lora"]),
        ({"cuda_graph_backend_prefill": "breakable"}, ["--cuda-graph-backend-prefill breakable"]),
        ({"dtype": "float16"}, ["--dtype float16"]),
        ({"load_format": "sharded_state"}, ["--load-format sharded_state"]),
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

    @pytest.mark.parametrize(
        ("variables", "decode"),
        [({}, "full"), ({"DSV4_OPS": "reference"}, "disabled"), ({"DSV4_CHECK": "1"}, "disabled")],
        ids=["default", "references", "checked"],
    )
    @pytest.mark.parametrize("version", [None, PREVIOUS], ids=["installed", "previous"])
    def test_what_is_chosen_on_a_gpu(
        self, tiny_flash: Path, tmp_path: Path, version: Path | None, variables: dict[str, str], decode: str
    ) -> None:
        """Marlin for FP4 experts, decode steps captured when kernels serve, prefill eager: as the
        graph runners read it.

        SGLang decides graphs by `is_cuda`, which is false on this machine, so it is told otherwise.
        """
        if version is not None and not (version / ".unpacked").exists():
            pytest.skip(f"{version} is missing; `make env` unpacks it")
        code = f"""
import json
import sglang.srt.utils
from sglang.srt.plugins import load_plugins
load_plugins()
sglang.srt.utils.is_cuda = lambda: True
from sglang.srt.arg_groups.overrides import resolved_view
from sglang.srt.server_args import ServerArgs
args = ServerArgs(model_path={str(tiny_flash)!r}, device="cuda", context_length=512, skip_tokenizer_init=True)
args.resolve_once()
view = resolved_view(args)
graphs = view.cuda_graph_config
print(json.dumps([view.moe_runner_backend, view.attention_backend, view.page_size, graphs.decode.backend, graphs.prefill.backend]))
"""
        path = {} if version is None else {"PYTHONPATH": f"{version}:{ROOT}"}
        got = json.loads(self._python(code, env=path | variables | toolkit(tmp_path)).splitlines()[-1])
        assert got == ["marlin", "dsv4_plugin", 256, decode, "disabled"]

    def test_a_hook_that_did_not_apply_is_noticed(self, tiny_flash: Path) -> None:
        """SGLang only logs it; the attention backend finds a pool that is not ours."""
        from dsv4_sglang.hooks import POOL

        done = sglang_engine.start(sglang_engine.engine_args(tiny_flash), [[request([5, 6, 7])]], skip_hook=POOL)
        assert done.returncode != 0
        assert "dsv4's hook on SGLang's KV pool did not apply" in done.stderr
