# SPDX-License-Identifier: Apache-2.0
"""vLLM's parser, names and KV planner, asked by name so that no dsv4 module imports vLLM."""

from __future__ import annotations

import json
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from dsv4.model.kv_layout import CacheFormats, IndexFormat, KvFormat, StateMapping, model_caches
from dsv4.planning.deployment import find_checkpoint
from dsv4.planning.recipe.question import BlockPools, BlockStage, KvQuestion
from dsv4.probe.engine import EngineProbe, literals, refuse_by_exception, symbol, value_of


class VllmProbe(EngineProbe):
    """vLLM. Without a GPU it cannot even build its parser unless told that this is a CPU
    (VLLM_TARGET_DEVICE).
    """

    def __init__(self) -> None:
        self.version = str(symbol("importlib.metadata:version")("vllm"))
        make = symbol(
            "vllm.entrypoints.openai.common.cli_args:make_arg_parser vllm.entrypoints.common.cli_args:make_arg_parser"
            " vllm.entrypoints.launchers.cli_args:make_arg_parser vllm.entrypoints.openai.cli_args:make_arg_parser"
        )
        parser = symbol("vllm.utils.argparse_utils:FlexibleArgumentParser")(prog="vllm serve")
        self.parser = refuse_by_exception(make(parser))
        self.env_names = frozenset(symbol("vllm.envs:environment_variables"))

    def _registries(self, args: Sequence[str]) -> list[str]:
        reasoning = symbol("vllm.reasoning:ReasoningParserManager")
        tools = symbol("vllm.tool_parsers:ToolParserManager vllm.entrypoints.openai.tool_parsers:ToolParserManager")
        modes = symbol(
            "vllm.tokenizers.registry:_VLLM_TOKENIZERS vllm.tokenizers.registry:TokenizerRegistry.tokenizers"
        )
        checks = [
            ("--tokenizer-mode", modes, "tokenizer modes"),
            ("--reasoning-parser", reasoning.list_registered(), "reasoning parsers"),
            ("--tool-call-parser", tools.list_registered(), "tool parsers"),
            ("--kv-cache-dtype", literals(symbol("vllm.config.cache:CacheDType")), "cache dtypes"),
            ("--moe-backend", literals(symbol("vllm.config.kernel:MoEBackend")), "MoE backends"),
            ("--all2all-backend", literals(symbol("vllm.config.parallel:All2AllBackend")), "all-to-all backends"),
            (
                "--attention-backend",
                symbol("vllm.v1.attention.backends.registry:AttentionBackendEnum").__members__,
                "attention backends",
            ),
            (
                "--attention-config.indexer_kv_dtype",
                literals(symbol("vllm.config.attention:IndexerKVDType")),
                "index key dtypes",
            ),
        ]
        errors = [e for flag, known, what in checks for e in self._one_of(args, flag, known, what)]
        speculative = value_of(args, "--speculative-config")
        if speculative is not None:
            method = json.loads(speculative)["method"]
            if method not in set(literals(symbol("vllm.config.speculative:SpeculativeMethod"))):
                errors.append(f"--speculative-config method {method}: not among speculative methods")
        compilation = value_of(args, "--compilation-config")
        if compilation is not None:
            try:
                symbol("vllm.config:CompilationConfig")(**json.loads(compilation))
            except Exception as e:
                errors.append(f"--compilation-config: {' '.join(str(e).split())[:200]}")
        return errors

    def kv(self, q: KvQuestion) -> BlockPools:
        """vLLM's own planner over all pipeline stages."""
        planning = symbol("vllm.v1.core.kv_cache_planning vllm.v1.core.kv_cache_utils")
        utils = symbol("vllm.v1.core.kv_cache_utils")
        config = self._config(q)
        lead = self._leading_arguments(config)
        stages = [
            {name: spec for name, spec in self._specs(q).items() if int(name.split(".")[1]) in range(*stage)}
            for stage in q.stages
        ]
        merged = {name: spec for stage in stages for name, spec in stage.items()}
        groups = (
            planning.get_global_kv_cache_groups(config, stages)
            if lead[1:]
            else planning.get_kv_cache_groups(config, dict(merged))
        )
        own = [planning._project_kv_cache_groups_to_worker(groups, specs) for specs in stages]
        configs = planning.get_kv_cache_configs(config, stages, list(q.pool_bytes), *([groups] if lead[1:] else []))
        return BlockPools(
            in_flight_tokens=config.max_in_flight_tokens,
            stages=tuple(
                BlockStage(
                    block_bytes=planning._pool_bytes_per_block(config, groups_of_stage),
                    request_bytes=planning._max_memory_usage_bytes_from_groups(*lead, groups_of_stage),
                )
                for groups_of_stage in own
            ),
            num_blocks=configs[0].num_blocks,
            concurrency=utils.get_max_concurrency_for_kv_cache_config(config, configs[0]),
        )

    def _leading_arguments(self, config: Any) -> tuple[Any, ...]:
        """0.33 moved planning behind a builder that comes before the config."""
        try:
            builder = symbol("vllm.v1.core.kv_cache_config_builder:get_kv_cache_config_builder")
        except ImportError:
            return (config,)
        return (builder(config), config)

    def _config(self, q: KvQuestion) -> Any:
        """The part of VllmConfig that KV planning reads; its own properties compute the in-flight
        tokens.
        """
        cls = symbol("vllm.config.vllm:VllmConfig")
        layout = symbol(
            "vllm.v1.kv_cache_interface:KVCacheLayout vllm.v1.attention.backend:KVCacheLayout vllm.v1.attention.backends.utils:KVCacheLayout"
        )

        class Config(SimpleNamespace):
            max_concurrent_batches = cls.max_concurrent_batches
            max_in_flight_tokens = cls.max_in_flight_tokens

        return Config(
            cache_config=SimpleNamespace(
                get_resolved_kv_cache_layout=lambda: layout.BLHNC,
                num_gpu_blocks_override=None,
                prefix_cache_retention_interval=None,
                block_size=256,
            ),
            model_config=SimpleNamespace(
                max_model_len=q.max_model_len, original_max_model_len=q.max_model_len, supports_kv_cache_grouping=False
            ),
            parallel_config=SimpleNamespace(
                pipeline_parallel_size=len(q.stages),
                tensor_parallel_size=1,
                decode_context_parallel_size=1,
                prefill_context_parallel_size=1,
            ),
            scheduler_config=SimpleNamespace(
                async_scheduling=q.async_scheduling,
                max_num_batched_tokens=q.max_num_batched_tokens,
                disable_hybrid_kv_cache_manager=False,
            ),
            attention_config=SimpleNamespace(hisparse_config=None),
            use_v2_model_runner=True,
            speculative_config=None,
            num_prefill_lookahead_tokens=1 if q.num_draft_layers else 0,
            kv_transfer_config=None,
        )

    def _specs(self, q: KvQuestion) -> dict[str, Any]:
        """Cache specs as whoever serves declares them."""
        return self._plugin_specs(q) if q.state is StateMapping.SUMMARY else self._native_specs(q)

    def _plugin_specs(self, q: KvQuestion) -> dict[str, Any]:
        """As dsv4's own layers do: the plugin is asked by name, like an engine."""
        import torch

        kv_cache_spec = symbol("dsv4_vllm.caches:kv_cache_spec")
        config = find_checkpoint(q.checkpoint).config
        formats = CacheFormats(q.kv_dtype, q.index_dtype)
        return {
            f"layers.{cache.layers[0]}.attn.{cache.spec.role.value}": kv_cache_spec(cache.spec, formats, torch.bfloat16)
            for cache in model_caches(config, formats, q.num_draft_layers, q.state, max(q.draft_tokens - 1, 0))
        }

    def _native_specs(self, q: KvQuestion) -> dict[str, Any]:
        """As the native V4 layers do (models/deepseek_v4: attention.py, compressor.py;
        sparse_swa.py).
        """
        import torch

        interface = symbol("vllm.v1.kv_cache_interface")
        fp8 = q.kv_dtype is KvFormat.FP8_DS_MLA
        align = 576 if fp8 else 512
        row = {"dtype": torch.uint8 if fp8 else torch.bfloat16, "state_content_bytes": 584 if fp8 else None}
        index_width = {IndexFormat.FP8: 132, IndexFormat.MXFP4: 68, IndexFormat.PLAIN: q.index_head_dim}[q.index_dtype]
        index_dtype = torch.bfloat16 if q.index_dtype is IndexFormat.PLAIN else torch.uint8
        mla = {"block_size": 256, "num_kv_heads": 1, "max_tp_shards": 1, "alignment": align}

        def state(block: int, window: int, width: int) -> Any:
            return interface.SlidingWindowMLASpec(
                block_size=block,
                num_kv_heads=1,
                max_tp_shards=1,
                head_size=width,
                dtype=torch.float32,
                sliding_window=window,
                alignment=align,
            )

        specs: dict[str, Any] = {}
        ratios = [*q.compress_ratios, *([0] * q.num_draft_layers)]
        for i, ratio in enumerate(ratios):
            p = f"layers.{i}.attn"
            specs[f"{p}.swa"] = interface.SlidingWindowMLASpec(
                block_size=64, num_kv_heads=1, max_tp_shards=1, head_size=q.head_dim, sliding_window=q.sliding_window,
                cache_dtype_str=q.kv_dtype.value, alignment=align, model_version="deepseek_v4", **row,
            )  # fmt: skip
            if ratio > 1:
                specs[f"{p}.mla"] = interface.MLAAttentionSpec(
                    head_size=q.head_dim,
                    tokens_per_state=ratio,
                    cache_dtype_str=q.kv_dtype.value,
                    model_version="deepseek_v4",
                    **mla,
                    **row,
                )
                specs[f"{p}.state"] = state(4, 8, 2 * 2 * q.head_dim) if ratio == 4 else state(8, 128, 2 * q.head_dim)
            if ratio == 4:
                specs[f"{p}.index"] = interface.MLAAttentionSpec(
                    head_size=index_width, dtype=index_dtype, tokens_per_state=4, **mla
                )
                specs[f"{p}.index_state"] = state(4, 8, 2 * 2 * q.index_head_dim)
        return specs
