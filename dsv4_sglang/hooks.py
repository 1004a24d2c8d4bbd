# SPDX-License-Identifier: Apache-2.0
"""Everything dsv4 changes in a running SGLang: three hooks on functions, a provider of defaults,
four on the making of a draft, two for the status, five on updates of weights, one on requests."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from sglang.srt.arg_groups.model_override_base import register_model_override, resolving_view
from sglang.srt.arg_groups.overrides import declare_resolution
from sglang.srt.model_executor.cuda_graph_config import Backend, CudaGraphConfig, Phase, with_phase
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from dsv4.model.config import MODEL_TYPE, LayerKind
from dsv4.model.kv_layout import PAGE_TOKENS
from dsv4_sglang import drafting, released_config, reload, requests, status
from dsv4_sglang.names import ARCHITECTURE, ATTENTION_BACKEND, DRAFT_ARCHITECTURE
from dsv4_sglang.refusal import PARSE

logger = logging.getLogger(__name__)

POOL_SIZES = "sglang.srt.model_executor.pool_configurator.create_memory_pool_configurator"
POOL = "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator._build_token_to_kv_pool"

# Window slots per full token where --swa-full-tokens-ratio is not given: native V4's own default.
WINDOW_RATIO = 0.1
MAX_RUNNING_REQUESTS = 256  # native V4's own default; HCA state is reserved per request


def install() -> None:
    """Register the hooks. SGLang applies them in every process; one that fails to apply is only
    logged, so the attention backend asserts that the pool is ours."""
    HookRegistry.register(PARSE, parse_config, HookType.AROUND)
    HookRegistry.register(POOL_SIZES, pool_configurator, HookType.AROUND)
    HookRegistry.register(POOL, build_pool, HookType.AROUND)
    register_model_override(ARCHITECTURE)(overrides)
    drafting.install()
    status.install()
    reload.install()
    requests.install()


def parse_config(original: Callable[..., Any], parser: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
    """Rename the architecture of V4, so that SGLang takes none of its branches for native V4, and
    name its window layers."""
    from sglang.srt.models.registry import ModelRegistry

    from dsv4_sglang.draft import DeepseekV4PluginForCausalLMNextN
    from dsv4_sglang.model import DeepseekV4PluginForCausalLM

    released_config.check_folder(model)
    config = original(parser, model, *args, **kwargs)
    if getattr(config, "model_type", None) != MODEL_TYPE:
        return config
    v4 = released_config.attach(config, model, kwargs.get("revision"))
    ModelRegistry.models.setdefault(ARCHITECTURE, DeepseekV4PluginForCausalLM)
    ModelRegistry.models.setdefault(DRAFT_ARCHITECTURE, DeepseekV4PluginForCausalLMNextN)
    config.architectures = [ARCHITECTURE]
    config.is_hybrid_swa = True
    config.hybrid_layer_pattern = [int(layer.kind is LayerKind.SWA) for layer in v4.layers]
    return config


def overrides(server_args: Any, hf_config: Any) -> dict[str, Any]:
    """Arguments of a V4 deployment, after refusing what cannot be served; runs before anything is
    started."""
    from dsv4_sglang.support import check_checkpoint, check_deployment

    args = resolving_view(server_args)
    config = released_config.read(hf_config)
    check_deployment(server_args, args, config)
    check_checkpoint(args.model_path, args.load_format, config)
    # Not open to providers; SGLang's own V4 sets them the same way.
    resolved: dict[str, Any] = drafting.resolved(args)
    if args.max_running_requests is None:
        resolved["max_running_requests"] = MAX_RUNNING_REQUESTS
    found: dict[str, Any] = {"attention_backend": ATTENTION_BACKEND, "page_size": PAGE_TOKENS}
    if args.swa_full_tokens_ratio is None:
        found["swa_full_tokens_ratio"] = WINDOW_RATIO
    drafts = args.speculative_algorithm is not None
    if args.device != "cpu" or drafts:  # 0.5.22 wants a draft's graphs on a CPU too
        resolved["cuda_graph_config"] = captured_phases(args.cuda_graph_config, drafts=drafts)
    if args.device != "cpu" and config.expert_dtype == "fp4":
        found["moe_runner_backend"] = "marlin"
    if resolved:
        declare_resolution(server_args, "dsv4", **resolved)
    return found


def captured_phases(config: CudaGraphConfig, *, drafts: bool = False) -> CudaGraphConfig:
    """SGLang's choice of graphs, without the phases that dsv4 cannot capture.

    A prefill graph would keep the metadata of the step that was captured. Decode graphs read
    buffers that keep their address, but only kernels can be captured: references and DSV4_CHECK
    read lengths on the host. The flags --disable-*-cuda-graph are no place to say so, since SGLang
    has read them before it asks its providers.
    """
    from dsv4_sglang.options import has_host_reads

    config = with_phase(config, Phase.PREFILL, backend=Backend.DISABLED)
    logger.info("dsv4: prefill steps are not captured: a graph would keep the metadata of the step it was made from")
    if drafts:
        logger.info("dsv4: with drafts decode steps are not captured: neither verifying nor drafting is tested so")
    if drafts or has_host_reads():
        config = with_phase(config, Phase.DECODE, backend=Backend.DISABLED)
    return config


def is_v4(kvc: Any) -> bool:
    """Whether a pool is being built for our model, or for its draft."""
    return list(kvc.model_config.hf_config.architectures) in ([ARCHITECTURE], [DRAFT_ARCHITECTURE])


def pool_configurator(original: Callable[..., Any], kvc: Any) -> Any:
    if not is_v4(kvc):
        return original(kvc)
    from dsv4_sglang.caches import V4PoolConfigurator

    return V4PoolConfigurator(kvc)


def build_pool(original: Callable[..., Any], kvc: Any, **kwargs: Any) -> Any:
    if not is_v4(kvc):
        return original(kvc, **kwargs)
    from dsv4_sglang import caches

    return caches.build_pool(kvc, kwargs["sizes"], kwargs["req_to_token_pool"])
