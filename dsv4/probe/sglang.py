# SPDX-License-Identifier: Apache-2.0
"""SGLang's parser, names and pool configurator, asked by name so that no dsv4 module imports
SGLang.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from dsv4.model.kv_layout import IndexFormat
from dsv4.planning.recipe.question import KvQuestion, TokenPools, TokenStage
from dsv4.probe import torchvision
from dsv4.probe.engine import EngineProbe, refuse_by_exception, symbol, value_of


class SglangProbe(EngineProbe):
    """SGLang."""

    def __init__(self) -> None:
        self.version = str(symbol("importlib.metadata:version")("sglang"))
        torchvision.allow_absent()
        parser = argparse.ArgumentParser(prog="sglang serve")
        symbol("sglang.srt.server_args:ServerArgs").add_cli_args(parser)
        self.parser = refuse_by_exception(parser)
        envs = symbol("sglang.srt.environ:envs")
        self.env_names = frozenset(n for n in {*vars(type(envs)), *dir(envs)} if n.isupper())

    def _registries(self, args: Sequence[str]) -> list[str]:
        reasoning = symbol("sglang.srt.parser.reasoning_parser:ReasoningParser").DetectorMap
        tools = symbol("sglang.srt.function_call.function_call_parser:FunctionCallParser").ToolCallParserEnum
        checks = [
            ("--reasoning-parser", reasoning, "reasoning parsers"),
            ("--tool-call-parser", tools, "tool parsers"),
            ("--speculative-algorithm", ("EAGLE", "DSPARK"), "algorithms that the V4 hook accepts"),
        ]
        errors = [e for flag, known, what in checks for e in self._one_of(args, flag, known, what)]
        if value_of(args, "--speculative-algorithm") == "EAGLE" and value_of(args, "--speculative-eagle-topk") != "1":
            errors.append("--speculative-eagle-topk: the V4 hook accepts 1 only")
        return errors

    def kv(self, q: KvQuestion) -> TokenPools:
        """DSV4PoolConfigurator's own arithmetic on stand-in configuration bags."""
        module = symbol("sglang.srt.model_executor.pool_configurator")
        pool_module = symbol("sglang.srt.mem_cache.deepseek_v4_memory_pool")
        sizing = symbol("sglang.srt.mem_cache.allocation_sizing")
        draft = q.draft_tokens or None
        method = {"none": None, "mtp": "EAGLE", "dspark": "DSPARK"}[q.speculative]
        bags = {
            "get_exec": SimpleNamespace(
                kernel=SimpleNamespace(
                    dsv4_attn_backend="flashmla", enable_deepseek_v4_fp4_indexer=q.index_dtype is IndexFormat.MXFP4
                ),
                features=SimpleNamespace(enable_encoder_swa_bounded_replay=False, enable_hisparse=False),
            ),
            "get_spec": SimpleNamespace(
                speculative_algorithm=method,
                speculative_num_draft_tokens=draft,
                speculative_num_steps=(draft or 1) - 1 or None,
                speculative_eagle_topk=1 if method else None,
            ),
            "get_schedule": SimpleNamespace(
                max_running_requests=q.max_num_seqs * q.dp,
                chunked_prefill_size=q.max_num_batched_tokens,
                swa_prefix_tails=None,
                swa_full_tokens_ratio=q.swa_full_tokens_ratio,
                _swa_full_tokens_ratio_explicitly_set=q.swa_full_tokens_ratio is not None,
                disable_overlap_schedule=not q.async_scheduling,
            ),
            "get_memory": SimpleNamespace(enable_hisparse=False, disable_radix_cache=False),
            "get_disagg": SimpleNamespace(disaggregation_mode="null", disaggregation_decode_extra_slots=0),
        }
        for target in (module, pool_module, sizing):
            for name, bag in bags.items():
                if hasattr(target, name):
                    setattr(target, name, lambda bag=bag: bag)
            if hasattr(target, "max_speculative_num_draft_tokens"):
                target.max_speculative_num_draft_tokens = lambda: draft
            if hasattr(target, "get_alloc_page_size"):
                target.get_alloc_page_size = lambda: 256
        algorithm = symbol("sglang.srt.speculative.spec_info:SpeculativeAlgorithm").from_string(method)
        return TokenPools(stages=tuple(self._stage(module, q, algorithm, number) for number in range(len(q.stages))))

    def _stage(self, module: Any, q: KvQuestion, algorithm: Any, number: int) -> TokenStage:
        first, last = q.stages[number]
        ratios = [0 if r == 1 else r for r in q.compress_ratios]
        kvc = SimpleNamespace(
            kv_cache_dtype_str="fp8_e4m3",
            model_config=SimpleNamespace(
                qk_nope_head_dim=q.head_dim - q.rope_dim,
                qk_rope_head_dim=q.rope_dim,
                index_head_dim=q.index_head_dim,
                context_len=q.max_model_len,
                compress_ratios=ratios,
                window_size=q.sliding_window,
                hf_config=SimpleNamespace(kv_source_layer_ids=()),
            ),
            layer_info=SimpleNamespace(start_layer=first, end_layer=min(last, len(ratios))),
            pp_size=len(q.stages),
            pp_group=SimpleNamespace(rank_in_group=number),
            sliding_window_size=q.sliding_window,
            page_size=256,
            attn_dp_size=q.dp,
            spec_algorithm=algorithm,
            spec_aux_config=None,
        )
        configurator = module.DSV4PoolConfigurator(kvc)
        sizes = configurator.calculate_pool_sizes(q.pool_bytes[number], 256)
        fixed = configurator._get_c128_state_fixed_bytes(q.max_num_seqs) + configurator._get_swa_fixed_bytes()
        return TokenStage(
            bytes_per_full_token=configurator.bytes_per_full_token,
            fixed_bytes=fixed,
            full_tokens=sizes.full_max_total_num_tokens,
        )
