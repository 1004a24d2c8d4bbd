# SPDX-License-Identifier: Apache-2.0
"""How SGLang's EAGLE worker comes to draft with our MTP block: what it does by name for its own V4,
done for ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from dsv4_sglang.names import ARCHITECTURE, DRAFT_ARCHITECTURE

_MODEL_CONFIG = "sglang.srt.configs.model_config"
_BACKENDS = "sglang.srt.speculative.draft_utils.DraftBackendFactory"


def install() -> None:
    """Register the hooks. See `hooks.install`."""
    HookRegistry.register(f"{_MODEL_CONFIG}.ModelConfig._config_draft_model", config_draft, HookType.AROUND)
    HookRegistry.register(f"{_MODEL_CONFIG}.resolve_spec_hidden_size", streams_width, HookType.AROUND)
    HookRegistry.register(f"{_BACKENDS}.create_decode_backend", decode_backend, HookType.AROUND)
    HookRegistry.register(f"{_BACKENDS}.create_draft_extend_backend", extend_backend, HookType.AROUND)


def resolved(args: Any) -> dict[str, Any]:
    """What of the arguments follows from a choice to draft that `check_draft` has let through."""
    from dsv4_sglang.support import drafted_steps

    if args.speculative_algorithm is None:
        return {}
    k = drafted_steps(args)
    return {
        "speculative_num_steps": k,
        "speculative_eagle_topk": 1,
        "speculative_num_draft_tokens": k + 1,
        "speculative_draft_model_path": args.model_path,
        "speculative_draft_model_revision": args.revision,
    }


def config_draft(original: Callable[..., None], config: Any) -> None:
    """Let the checkpoint's second reading be of its draft."""
    hf_config = config.hf_config
    if config.is_draft_model and list(hf_config.architectures) == [ARCHITECTURE]:
        hf_config.architectures = [DRAFT_ARCHITECTURE]
        hf_config.num_nextn_predict_layers = 1
        hf_config.hybrid_layer_pattern = [1] * len(hf_config.hybrid_layer_pattern)
    original(config)


def streams_width(original: Callable[..., Any], hf_config: Any, hidden_size: int, hc_mult: int) -> Any:
    """What a draft is given of each token, twice: all streams of the backbone."""
    if list(hf_config.architectures or ()) not in ([ARCHITECTURE], [DRAFT_ARCHITECTURE]):
        return original(hf_config, hidden_size, hc_mult)
    return hidden_size * hc_mult, hidden_size * hc_mult


def _is_ours(factory: Any) -> bool:
    return list(factory.draft_model_runner.model_config.hf_config.architectures) == [DRAFT_ARCHITECTURE]


def decode_backend(original: Callable[..., Any], factory: Any) -> Any:
    """Of the steps behind the first draft, if there are any."""
    if not _is_ours(factory):
        return original(factory)
    from dsv4_sglang.metadata import V4DraftBackend

    steps = factory.speculative_num_steps
    return V4DraftBackend(factory.draft_model_runner, steps) if steps > 1 else None


def extend_backend(original: Callable[..., Any], factory: Any) -> Any:
    """None: the draft's runner has a backend that plans these steps."""
    return None if _is_ours(factory) else original(factory)
