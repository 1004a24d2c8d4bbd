# SPDX-License-Identifier: Apache-2.0
"""Asks an installed engine, in a process of its own, whether it parses a command line and what KV it would allocate.

Run as `python -m dsv4.probe.__main__` with a JSON question on stdin; the answer is one JSON line on stdout. Engines are
imported by name and only here, so that no dsv4 module depends on one. Everything runs on a CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import io
import json
import os
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any, NoReturn, get_args

FOREIGN_ENV = ("NCCL_", "CUDA_", "GLOO_", "HF_", "OMP_", "PYTORCH_", "TORCH_", "UCX_", "NVSHMEM_", "FLASHINFER_", "DSV4_")


class _Absent(types.ModuleType):
    """Stands in for torchvision, which SGLang imports for image processors that a text model never touches."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _AnyAttribute(name, (), {})


class _AnyAttribute(type):
    """A class all of whose attributes exist (InterpolationMode.NEAREST is read while importing)."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _AbsentFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] == "torchvision" else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = _Absent(spec.name)
        module.__path__ = []
        module.__version__ = "0.0.0"  # type: ignore[attr-defined]
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


class _RefusedError(Exception):
    """The engine's parser called error()."""


def main() -> None:
    """Answer the question on stdin; engines print to stdout while importing, so that goes to stderr meanwhile."""
    question = json.load(sys.stdin)
    answer_to = os.dup(1)
    os.dup2(2, 1)
    # Without a GPU vLLM cannot even build its parser unless told that this is a CPU.
    os.environ.setdefault("VLLM_TARGET_DEVICE", "cpu")
    engine = _Vllm() if question["engine"] == "vllm" else _Sglang()
    answers = {case["id"]: engine.answer(case) for case in question["cases"]}
    with os.fdopen(answer_to, "w") as out:
        out.write(json.dumps({"version": engine.version, "cases": answers}) + "\n")


def _symbol(path: str) -> Any:
    """`a.b:c.d`, or the first of several such paths separated by spaces that exists (engines move things)."""
    errors = []
    for one in path.split():
        module, _, name = one.partition(":")
        try:
            found: Any = importlib.import_module(module)
            for part in name.split(".") if name else ():
                found = getattr(found, part)
            return found
        except (ImportError, AttributeError) as e:
            errors.append(f"{one}: {e}")
    raise ImportError("; ".join(errors))


def _literals(t: Any) -> Iterator[str]:
    for arg in get_args(t):
        if isinstance(arg, str):
            yield arg
        else:
            yield from _literals(arg)


def _value(args: list[str], flag: str) -> str | None:
    return args[args.index(flag) + 1] if flag in args else None


class _Engine:
    version = ""
    parser: argparse.ArgumentParser
    env_names: frozenset[str]
    env_prefixes: tuple[str, ...]

    def answer(self, case: Mapping[str, Any]) -> dict[str, Any]:
        errors = [e for args in case["argvs"] for e in (*self._parse(args), *self._registries(args))]
        errors = [*dict.fromkeys(errors), *self._env(case["env"])]
        kv, kv_error = None, None
        if case.get("kv"):
            try:
                kv = self.kv(case["kv"])
            except Exception as e:
                kv_error = f"{type(e).__name__}: {e}"
        return {"errors": errors, "kv": kv, "kv_error": kv_error}

    def _registries(self, args: list[str]) -> list[str]:
        raise NotImplementedError

    def kv(self, q: Mapping[str, Any]) -> dict[str, Any]:
        raise NotImplementedError

    def _parse(self, args: list[str]) -> Iterator[str]:
        for arg in args:
            if arg.startswith("--"):
                action = self.parser._option_string_actions.get(arg.split("=")[0].split(".")[0])
                if action is None:
                    yield f"{arg}: no such option"
                elif "deprecated" in (action.help or "").lower()[:40] or "Deprecated" in type(action).__name__:
                    yield f"{arg}: deprecated ({' '.join((action.help or '').split())[:80]})"
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                self.parser.parse_args(args)
        except (_RefusedError, SystemExit, ValueError) as e:
            yield " ".join(str(e).split())[:300]

    def _env(self, names: Iterable[str]) -> Iterator[str]:
        for name in names:
            if name not in self.env_names and not name.startswith(FOREIGN_ENV):
                yield f"environment variable {name}: unknown to this version, it would be ignored"

    def _one_of(self, args: list[str], flag: str, known: Iterable[str], what: str) -> list[str]:
        value = _value(args, flag)
        options = sorted(set(known))
        return [] if value is None or value in options else [f"{flag} {value}: not among {what} ({', '.join(options)[:200]})"]


def _refuse(self: argparse.ArgumentParser, message: str) -> NoReturn:
    raise _RefusedError(message)


class _Vllm(_Engine):
    def __init__(self) -> None:
        self.version = str(_symbol("importlib.metadata:version")("vllm"))
        make = _symbol(
            "vllm.entrypoints.openai.common.cli_args:make_arg_parser vllm.entrypoints.common.cli_args:make_arg_parser"
            " vllm.entrypoints.launchers.cli_args:make_arg_parser vllm.entrypoints.openai.cli_args:make_arg_parser"
        )
        parser = _symbol("vllm.utils.argparse_utils:FlexibleArgumentParser")(prog="vllm serve")
        self.parser = make(parser)
        self.parser.error = types.MethodType(_refuse, self.parser)  # type: ignore[method-assign]
        self.env_names = frozenset(_symbol("vllm.envs:environment_variables"))

    def _registries(self, args: list[str]) -> list[str]:
        reasoning = _symbol("vllm.reasoning:ReasoningParserManager")
        tools = _symbol("vllm.tool_parsers:ToolParserManager vllm.entrypoints.openai.tool_parsers:ToolParserManager")
        modes = _symbol("vllm.tokenizers.registry:_VLLM_TOKENIZERS vllm.tokenizers.registry:TokenizerRegistry.tokenizers")
        checks = [
            ("--tokenizer-mode", modes, "tokenizer modes"),
            ("--reasoning-parser", reasoning.list_registered(), "reasoning parsers"),
            ("--tool-call-parser", tools.list_registered(), "tool parsers"),
            ("--kv-cache-dtype", _literals(_symbol("vllm.config.cache:CacheDType")), "cache dtypes"),
            ("--moe-backend", _literals(_symbol("vllm.config.kernel:MoEBackend")), "MoE backends"),
            ("--all2all-backend", _literals(_symbol("vllm.config.parallel:All2AllBackend")), "all-to-all backends"),
            ("--attention-backend", _symbol("vllm.v1.attention.backends.registry:AttentionBackendEnum").__members__, "attention backends"),
            ("--attention-config.indexer_kv_dtype", _literals(_symbol("vllm.config.attention:IndexerKVDType")), "index key dtypes"),
        ]
        errors = [e for flag, known, what in checks for e in self._one_of(args, flag, known, what)]
        speculative = _value(args, "--speculative-config")
        if speculative is not None:
            method = json.loads(speculative)["method"]
            if method not in set(_literals(_symbol("vllm.config.speculative:SpeculativeMethod"))):
                errors.append(f"--speculative-config method {method}: not among speculative methods")
        compilation = _value(args, "--compilation-config")
        if compilation is not None:
            try:
                _symbol("vllm.config:CompilationConfig")(**json.loads(compilation))
            except Exception as e:
                errors.append(f"--compilation-config: {' '.join(str(e).split())[:200]}")
        return errors

    def kv(self, q: Mapping[str, Any]) -> dict[str, Any]:
        """vLLM's own planner over all pipeline stages: groups, bytes per block, one request, concurrency."""
        planning = _symbol("vllm.v1.core.kv_cache_planning vllm.v1.core.kv_cache_utils")
        utils = _symbol("vllm.v1.core.kv_cache_utils")
        config = self._config(q)
        lead = self._leading_arguments(config)
        stages = [
            {name: spec for name, spec in self._specs(q).items() if int(name.split(".")[1]) in range(*stage)} for stage in q["stages"]
        ]
        merged = {name: spec for stage in stages for name, spec in stage.items()}
        groups = planning.get_global_kv_cache_groups(config, stages) if lead[1:] else planning.get_kv_cache_groups(config, dict(merged))
        answer: dict[str, Any] = {
            "in_flight_tokens": config.max_in_flight_tokens,
            "groups": sorted([g.kv_cache_spec.block_size, len(g.layer_names), g.kv_cache_spec.page_size_bytes] for g in groups),
            "stages": [],
        }
        for specs in stages:
            own = planning._project_kv_cache_groups_to_worker(groups, specs)
            answer["stages"].append(
                {
                    "block_bytes": planning._pool_bytes_per_block(config, own),
                    "request_bytes": planning._max_memory_usage_bytes_from_groups(*lead, own),
                }
            )
        if q.get("pool_bytes"):
            configs = planning.get_kv_cache_configs(config, stages, q["pool_bytes"], *([groups] if lead[1:] else []))
            answer["num_blocks"] = configs[0].num_blocks
            answer["concurrency"] = utils.get_max_concurrency_for_kv_cache_config(config, configs[0])
        return answer

    def _leading_arguments(self, config: Any) -> tuple[Any, ...]:
        """0.33 moved planning behind a builder that comes before the config."""
        try:
            builder = _symbol("vllm.v1.core.kv_cache_config_builder:get_kv_cache_config_builder")
        except ImportError:
            return (config,)
        return (builder(config), config)

    def _config(self, q: Mapping[str, Any]) -> Any:
        """The part of VllmConfig that KV planning reads; its own properties compute the in-flight tokens."""
        cls = _symbol("vllm.config.vllm:VllmConfig")
        layout = _symbol(
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
                max_model_len=q["max_model_len"], original_max_model_len=q["max_model_len"], supports_kv_cache_grouping=False
            ),
            parallel_config=SimpleNamespace(
                pipeline_parallel_size=len(q["stages"]),
                tensor_parallel_size=1,
                decode_context_parallel_size=1,
                prefill_context_parallel_size=1,
            ),
            scheduler_config=SimpleNamespace(
                async_scheduling=q["async_scheduling"],
                max_num_batched_tokens=q["max_num_batched_tokens"],
                disable_hybrid_kv_cache_manager=False,
            ),
            attention_config=SimpleNamespace(hisparse_config=None),
            use_v2_model_runner=True,
            speculative_config=None,
            num_prefill_lookahead_tokens=1 if q["num_draft_layers"] else 0,
            kv_transfer_config=None,
        )

    def _specs(self, q: Mapping[str, Any]) -> dict[str, Any]:
        """Cache specs as whoever serves declares them."""
        return self._plugin_specs(q) if q["state"] == "summary" else self._native_specs(q)

    def _plugin_specs(self, q: Mapping[str, Any]) -> dict[str, Any]:
        """As dsv4's own layers do: the plugin is asked by name, like an engine."""
        import torch

        from dsv4.model.kv_layout import CacheFormats, IndexFormat, KvFormat, StateMapping, layer_caches
        from dsv4.planning.deployment import find_checkpoint

        kv_cache_spec = _symbol("dsv4_vllm.caches:kv_cache_spec")
        config = find_checkpoint(q["checkpoint"]).config
        formats = CacheFormats(KvFormat(q["kv_dtype"]), IndexFormat(q["index_dtype"]))
        return {
            f"layers.{layer.index}.attn.{cache.role.value}": kv_cache_spec(cache, formats, torch.bfloat16)
            for layer in config.layers
            for cache in layer_caches(config, layer, formats, StateMapping(q["state"]))
        }

    def _native_specs(self, q: Mapping[str, Any]) -> dict[str, Any]:
        """As the native V4 layers do (models/deepseek_v4: attention.py, compressor.py; sparse_swa.py)."""
        import torch

        interface = _symbol("vllm.v1.kv_cache_interface")
        fp8 = q["kv_dtype"] == "fp8_ds_mla"
        align = 576 if fp8 else 512
        row = {"dtype": torch.uint8 if fp8 else torch.bfloat16, "state_content_bytes": 584 if fp8 else None}
        index_width = {"fp8": 132, "mxfp4": 68, "plain": q["index_head_dim"]}[q["index_dtype"]]
        index_dtype = torch.bfloat16 if q["index_dtype"] == "plain" else torch.uint8
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
        ratios = [*q["compress_ratios"], *([0] * q["num_draft_layers"])]
        for i, ratio in enumerate(ratios):
            p = f"layers.{i}.attn"
            specs[f"{p}.swa"] = interface.SlidingWindowMLASpec(
                block_size=64, num_kv_heads=1, max_tp_shards=1, head_size=q["head_dim"], sliding_window=q["sliding_window"],
                cache_dtype_str=q["kv_dtype"], alignment=align, model_version="deepseek_v4", **row,
            )  # fmt: skip
            if ratio > 1:
                specs[f"{p}.mla"] = interface.MLAAttentionSpec(
                    head_size=q["head_dim"],
                    tokens_per_state=ratio,
                    cache_dtype_str=q["kv_dtype"],
                    model_version="deepseek_v4",
                    **mla,
                    **row,
                )
                specs[f"{p}.state"] = state(4, 8, 2 * 2 * q["head_dim"]) if ratio == 4 else state(8, 128, 2 * q["head_dim"])
            if ratio == 4:
                specs[f"{p}.index"] = interface.MLAAttentionSpec(head_size=index_width, dtype=index_dtype, tokens_per_state=4, **mla)
                specs[f"{p}.index_state"] = state(4, 8, 2 * 2 * q["index_head_dim"])
        return specs


class _Sglang(_Engine):
    def __init__(self) -> None:
        self.version = str(_symbol("importlib.metadata:version")("sglang"))
        if importlib.util.find_spec("torchvision") is None:
            sys.meta_path.append(_AbsentFinder())
        self.parser = argparse.ArgumentParser(prog="sglang serve")
        _symbol("sglang.srt.server_args:ServerArgs").add_cli_args(self.parser)
        self.parser.error = types.MethodType(_refuse, self.parser)  # type: ignore[method-assign]
        envs = _symbol("sglang.srt.environ:envs")
        self.env_names = frozenset(n for n in {*vars(type(envs)), *dir(envs)} if n.isupper())

    def _registries(self, args: list[str]) -> list[str]:
        reasoning = _symbol("sglang.srt.parser.reasoning_parser:ReasoningParser").DetectorMap
        tools = _symbol("sglang.srt.function_call.function_call_parser:FunctionCallParser").ToolCallParserEnum
        checks = [
            ("--reasoning-parser", reasoning, "reasoning parsers"),
            ("--tool-call-parser", tools, "tool parsers"),
            ("--speculative-algorithm", ("EAGLE", "DSPARK"), "algorithms that the V4 hook accepts"),
        ]
        errors = [e for flag, known, what in checks for e in self._one_of(args, flag, known, what)]
        if _value(args, "--speculative-algorithm") == "EAGLE" and _value(args, "--speculative-eagle-topk") != "1":
            errors.append("--speculative-eagle-topk: the V4 hook accepts 1 only")
        return errors

    def kv(self, q: Mapping[str, Any]) -> dict[str, Any]:
        """DSV4PoolConfigurator's own arithmetic on stand-in configuration bags."""
        module = _symbol("sglang.srt.model_executor.pool_configurator")
        pool_module = _symbol("sglang.srt.mem_cache.deepseek_v4_memory_pool")
        sizing = _symbol("sglang.srt.mem_cache.allocation_sizing")
        draft = q["draft_tokens"] or None
        method = {"none": None, "mtp": "EAGLE", "dspark": "DSPARK"}[q["speculative"]]
        bags = {
            "get_exec": SimpleNamespace(
                kernel=SimpleNamespace(dsv4_attn_backend="flashmla", enable_deepseek_v4_fp4_indexer=q["index_dtype"] == "mxfp4"),
                features=SimpleNamespace(enable_encoder_swa_bounded_replay=False, enable_hisparse=False),
            ),
            "get_spec": SimpleNamespace(
                speculative_algorithm=method,
                speculative_num_draft_tokens=draft,
                speculative_num_steps=(draft or 1) - 1 or None,
                speculative_eagle_topk=1 if method else None,
            ),
            "get_schedule": SimpleNamespace(
                max_running_requests=q["max_num_seqs"] * q["dp"],
                chunked_prefill_size=q["max_num_batched_tokens"],
                swa_prefix_tails=None,
                swa_full_tokens_ratio=q["swa_full_tokens_ratio"],
                _swa_full_tokens_ratio_explicitly_set=q["swa_full_tokens_ratio"] is not None,
                disable_overlap_schedule=not q["async_scheduling"],
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
        algorithm = _symbol("sglang.srt.speculative.spec_info:SpeculativeAlgorithm").from_string(method)
        stages = [self._stage(module, q, bags, algorithm, number) for number in range(len(q["stages"]))]
        return {"stages": stages}

    def _stage(self, module: Any, q: Mapping[str, Any], bags: Mapping[str, Any], algorithm: Any, number: int) -> dict[str, Any]:
        first, last = q["stages"][number]
        ratios = [0 if r == 1 else r for r in q["compress_ratios"]]
        kvc = SimpleNamespace(
            kv_cache_dtype_str="fp8_e4m3",
            model_config=SimpleNamespace(
                qk_nope_head_dim=q["head_dim"] - q["rope_dim"],
                qk_rope_head_dim=q["rope_dim"],
                index_head_dim=q["index_head_dim"],
                context_len=q["max_model_len"],
                compress_ratios=ratios,
                window_size=q["sliding_window"],
                hf_config=SimpleNamespace(kv_source_layer_ids=()),
            ),
            layer_info=SimpleNamespace(start_layer=first, end_layer=min(last, len(ratios))),
            pp_size=len(q["stages"]),
            pp_group=SimpleNamespace(rank_in_group=number),
            sliding_window_size=q["sliding_window"],
            page_size=256,
            attn_dp_size=q["dp"],
            spec_algorithm=algorithm,
            spec_aux_config=None,
        )
        configurator = module.DSV4PoolConfigurator(kvc)
        pool_bytes = q["pool_bytes"][number] if q.get("pool_bytes") else 64 << 30
        sizes = configurator.calculate_pool_sizes(pool_bytes, 256)
        fixed = configurator._get_c128_state_fixed_bytes(q["max_num_seqs"]) + configurator._get_swa_fixed_bytes()
        return {
            "bytes_per_full_token": configurator.bytes_per_full_token,
            "fixed_bytes": fixed,
            "full_tokens": sizes.full_max_total_num_tokens,
            "window_tokens": sizes.swa_max_total_num_tokens,
        }


if __name__ == "__main__":
    main()
