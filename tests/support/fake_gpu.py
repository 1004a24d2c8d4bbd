# SPDX-License-Identifier: Apache-2.0
"""What vLLM would build for V4 on a GPU that is not here. Run as a program: a JSON plan on stdin, a
JSON report on stdout.

vLLM's CUDA platform runs with an invented card under it, and everything up to the first kernel is
vLLM's own decision: its config, the methods that serve linears and experts, the loading of weights,
the KV layout, CUDA graph support. The compiled extensions are absent, so nothing can be computed.
plan: capability, name, folder, tensors ("meta" or "loaded"); or launches, command lines of
`vllm serve` whose configs are reported, each with its id, argv, folder and card (capability, name,
memory_bytes).
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

# The card, as torch describes it; a program that resolves for several changes it.
CARD = SimpleNamespace(
    major=8, minor=0, name="", total_memory=80 << 30, multi_processor_count=108, gcnArchName=""
)  # fmt: skip
# The least compute capability for which vLLM's compiled extension answers yes.
ANSWERS = {
    "cutlass_scaled_mm_supports_fp8": 89,
    "cutlass_scaled_mm_supports_block_fp8": 90,
    "cutlass_group_gemm_supported": 90,
}
EXTENSIONS = (
    "_C_stable_libtorch",
    "_moe_C_stable_libtorch",
    "vllm_flash_attn._vllm_fa2_C",
    "vllm_flash_attn._vllm_fa3_C",
)


def put_under_torch() -> None:
    """Eight of CARD, as torch.cuda describes them."""
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 8
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_name = lambda device=None: CARD.name
    torch.cuda.get_device_capability = lambda device=None: (CARD.major, CARD.minor)
    torch.cuda.get_device_properties = lambda device=None: CARD


def install(capability: tuple[int, int], name: str) -> None:
    """Put a card under torch and vLLM."""
    insert(capability, name)
    put_under_torch()
    for extension in EXTENSIONS:
        sys.modules[f"vllm.{extension}"] = ModuleType(extension)
    library = torch.library.Library("_C", "FRAGMENT")
    for op, least in ANSWERS.items():
        library.define(f"{op}(int capability) -> bool")
        library.impl(op, lambda capability, least=least: capability >= least, "CompositeExplicitAutograd")
    globals()["_library"] = library  # its operators live as long as it does

    import vllm.platforms
    from vllm.platforms.cuda import NonNvmlCudaPlatform

    class Platform(NonNvmlCudaPlatform):
        @classmethod
        def import_kernels(cls) -> None:
            pass

        @classmethod
        def device_count(cls) -> int:
            return 8

    vllm.platforms._current_platform = Platform()
    from vllm.model_executor.layers.fused_moe.runner import shared_experts

    shared_experts.aux_stream = lambda: None


def insert(capability: tuple[int, int], name: str, memory_bytes: int = 80 << 30) -> None:
    """Change the card."""
    (CARD.major, CARD.minor), CARD.name, CARD.total_memory = capability, name, memory_bytes


def resolve(launch: dict[str, Any]) -> dict[str, Any]:
    """What vLLM makes of one command line in the first process, where a device would be touched
    next."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.model_executor.model_loader import get_model_cls
    from vllm.platforms import current_platform
    from vllm.usage.usage_lib import UsageContext

    from dsv4.probe.vllm import VllmProbe
    from dsv4_vllm.options import cache_formats, state_mapping

    card = launch["card"]
    insert(card["capability"], card["name"], card["memory_bytes"])
    type(current_platform).get_device_capability.__func__.cache_clear()
    argv = launch["argv"][2:]  # behind `vllm serve`
    args = VllmProbe().parser.parse_args(argv)
    # `vllm serve` takes the model from its first argument; there are no weights here.
    args.model, args.load_format = launch["folder"], "dummy"
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("dsv4_vllm.options")
    logger.setLevel(logging.INFO)  # whatever vLLM's own logger has here
    logger.addHandler(handler)
    config = AsyncEngineArgs.from_cli_args(args).create_engine_config(UsageContext.OPENAI_API_SERVER)
    logger.removeHandler(handler)
    formats, compilation, parallel = cache_formats(config), config.compilation_config, config.parallel_config
    return {
        "id": launch["id"],
        "architecture": config.model_config.architecture,
        "class": get_model_cls(config.model_config).__module__,
        "runner_v2": config.use_v2_model_runner,
        "kv": [config.cache_config.cache_dtype, formats.kv.value, formats.index.value],
        "block_size": config.cache_config.block_size,
        "mapping": state_mapping(config).value,
        "in_workers": state_mapping(pickle.loads(pickle.dumps(config))).value,
        "said": said,
        "graphs": str(compilation.cudagraph_mode).rpartition(".")[2],
        "graph_sizes": list(compilation.cudagraph_capture_sizes or ()),
        "largest_graph": compilation.max_cudagraph_capture_size,
        "breakable": os.environ.get("VLLM_USE_BREAKABLE_CUDAGRAPH") == "1",
        "tp": parallel.tensor_parallel_size,
        "pp": parallel.pipeline_parallel_size,
        "ep": parallel.enable_expert_parallel,
        "executor": str(parallel.distributed_executor_backend),
        "max_model_len": config.model_config.max_model_len,
        "step_tokens": config.scheduler_config.max_num_batched_tokens,
        "max_num_seqs": config.scheduler_config.max_num_seqs,
        "async_scheduling": config.scheduler_config.async_scheduling,
        "moe_backend": str(config.kernel_config.moe_backend),
        "quantisation": config.model_config.quantization,
        "memory": config.cache_config.gpu_memory_utilization,
    }


def build(plan: dict[str, Any]) -> dict[str, Any]:
    loaded = plan["tensors"] == "loaded"

    def report(model: Any, config: Any, registry: Any) -> dict[str, Any]:
        return {
            "class": f"{type(model).__module__}.{type(model).__qualname__}",
            "runner_v2": config.use_v2_model_runner,
            "graphs": str(config.compilation_config.cudagraph_mode),
            "breaks": breaks(model),
            "methods": methods(model),
            "warm_up": warm_up(registry),
            "weight_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        } | (unloaded(model, config) if loaded else caches(config))

    return on_model(Path(plan["folder"]), plan.get("args", {}), "cpu" if loaded else "meta", report)


def on_model(
    folder: Path, args: dict[str, Any], device: str, use: Callable[[Any, Any, Any], dict[str, Any]]
) -> dict[str, Any]:
    """What `use` makes of the model that vLLM builds on `device`, of its config and of its registry
    of warm-ups. On meta no weights are read."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.model_executor.warmup.jit_warmup import JitWarmupRegistry
    from vllm.utils.torch_utils import set_default_torch_dtype

    load_format = "dummy" if device == "meta" else "auto"
    config = EngineArgs(
        model=str(folder), load_format=load_format, tokenizer_mode="deepseek_v4", **args
    ).create_engine_config()  # fmt: skip
    config.device_config.device = torch.device(device)
    with socket.socket() as free, set_current_vllm_config(config):
        free.bind(("127.0.0.1", 0))
        where = f"tcp://127.0.0.1:{free.getsockname()[1]}"
        free.close()
        init_distributed_environment(world_size=1, rank=0, local_rank=0, distributed_init_method=where, backend="gloo")
        initialize_model_parallel(1, 1)
        registry = JitWarmupRegistry(config)
        with set_default_torch_dtype(config.model_config.dtype), torch.device(device), registry.activate():
            model = initialize_model(vllm_config=config)
        return use(model, config, registry)


def breaks(model: torch.nn.Module) -> dict[str, Any]:
    """Whether vLLM breaks graphs at attention, and how many attention layers it can break at."""
    from vllm.compilation.breakable_cudagraph import is_breakable_cudagraph_enabled

    from dsv4_vllm.model import V4Attention

    layers = [m for m in model.modules() if isinstance(m, V4Attention)]
    return {
        "enabled": is_breakable_cudagraph_enabled(),
        "layers": len(layers),
        "breakable": sum(hasattr(layer.attend, "__wrapped__") for layer in layers),
    }


def warm_up(registry: Any) -> list[list[Any]]:
    """What vLLM's registry has dsv4 compile: for how many layers, and by which keys."""
    from dsv4_vllm.warm_up import KernelWarmUp

    asked: list[list[Any]] = []
    KernelWarmUp.compile_many = lambda self, keys: asked.append([len(self.attentions), *keys])  # type: ignore[method-assign]
    registry.warmup()
    return asked


def methods(model: torch.nn.Module) -> dict[str, str]:
    """The method, and the kernel it chose, of one layer of each name."""
    found = {}
    for name, module in model.named_modules():
        if (method := getattr(module, "quant_method", None)) is not None:
            kernel = getattr(method, "mxfp4_backend", None) or getattr(method, "fp8_linear", None)
            chosen = "" if kernel is None else getattr(kernel, "name", None) or type(kernel).__name__
            found[".".join(part for part in name.split(".") if not part.isdigit())] = (
                f"{type(method).__name__} {chosen}".strip()
            )
    return found


def unloaded(model: torch.nn.Module, config: Any) -> dict[str, Any]:
    """Parameters that the checkpoint did not fill: every byte is 0xAB before, which is NaN in no
    format and 171 nowhere."""
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    for parameter in model.parameters():
        parameter.data.view(torch.uint8).fill_(0xAB)
    DefaultModelLoader(config.load_config).load_weights(model, config.model_config)
    shares = {n: float((p.data.view(torch.uint8) == 0xAB).float().mean()) for n, p in model.named_parameters()}
    return {"unloaded": {name: share for name, share in shares.items() if share > 0.1}, "parameters": len(shares)}


def caches(config: Any) -> dict[str, Any]:
    """The KV pool that vLLM plans, whether it may capture decode steps, and who serves the
    operators."""
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.utils import resolve_kv_cache_layout

    from dsv4.ops import registry
    from dsv4_vllm.options import state_mapping

    current_platform.update_block_size_for_backend(config)
    layers = {
        n: m for n, m in config.compilation_config.static_forward_context.items() if isinstance(m, AttentionLayerBase)
    }
    specs = {name: layer.get_kv_cache_spec(config) for name, layer in layers.items()}
    layouts = [
        [layout.name for layout in layer.get_attn_backend().supported_kv_cache_layouts()] for layer in layers.values()
    ]
    layout = resolve_kv_cache_layout(config, layouts, list(specs.values())).name
    config.cache_config.kv_cache_layout = layout
    pool = plan_pool(config, specs)
    config.device_config.device = torch.device("cuda")
    support = {
        layer.get_attn_backend().get_builder_cls().get_cudagraph_support(config, specs[name]).name
        for name, layer in layers.items()
    }
    return {
        "block_size": config.cache_config.block_size, "layout": layout, "blocks": pool.num_blocks,
        "mapping": state_mapping(config).value, "graph_support": sorted(support),
        "ops": {op: choice["impl"] for op, choice in registry.report().items()},
    }  # fmt: skip


def plan_pool(config: Any, specs: dict[str, Any]) -> Any:
    """vLLM's plan for 20 GiB."""
    try:
        from vllm.v1.core.kv_cache_planning import get_global_kv_cache_groups, get_kv_cache_configs
    except ImportError:  # vLLM 0.32
        from vllm.v1.core.kv_cache_utils import get_kv_cache_configs

        return get_kv_cache_configs(config, [specs], [20 << 30])[0]
    return get_kv_cache_configs(config, [specs], [20 << 30], get_global_kv_cache_groups(config, [specs]))[0]


def main() -> None:
    plan = json.loads(sys.stdin.read())
    answer, sys.stdout = sys.stdout, sys.stderr
    os.environ |= {"VLLM_PLUGINS": "dsv4", "DSV4_CPU_PLATFORM": "off", "CUDA_VISIBLE_DEVICES": ""}
    if "launches" in plan:
        install((8, 0), "")
        json.dump([resolve(launch) for launch in plan["launches"]], answer)
        return
    install(tuple(plan["capability"]), plan["name"])
    json.dump(build(plan), answer)


if __name__ == "__main__":
    main()
