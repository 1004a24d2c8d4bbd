# SPDX-License-Identifier: Apache-2.0
"""Weights replaced under a running server: as a fresh server has them, or refused in time.

SGLang asks its loaders to undo what processing made of weights; a wrong tensor in a request ends
its scheduler. On a CPU every parameter of ours is loaded a second time as it was the first. On a
GPU SGLang's own methods repack weights for their kernels and cannot undo it, so that every update
is refused there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from dsv4.errors import DeploymentError, Dsv4Error
from dsv4.loading import RELOAD_FORMATS, checkpoint_folder
from dsv4.model.checkpoint import validate_again

_RUNNER = "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater"
_SCHEDULER = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"


def install() -> None:
    """Register the hooks. See `hooks.install`."""
    HookRegistry.register(f"{_RUNNER}.update_weights_from_disk", from_disk, HookType.AROUND)
    for name in ("update_weights_from_tensor", "load_weights_from_distributed"):
        HookRegistry.register(f"{_RUNNER}.{name}", in_pieces, HookType.AROUND)
    HookRegistry.register(f"{_SCHEDULER}.begin_weight_update", begin, HookType.AROUND)
    HookRegistry.register(f"{_SCHEDULER}.end_weight_update", end, HookType.AROUND)


def _is_ours(model: Any) -> bool:
    from dsv4_sglang.model import DeepseekV4PluginForCausalLM

    return isinstance(model, DeepseekV4PluginForCausalLM)


def from_disk(
    original: Callable[..., tuple[bool, str]],
    updater: Any,
    model_path: str,
    load_format: str,
    *args: Any,
    **kwargs: Any,
) -> tuple[bool, str]:
    """Look at the checkpoint before SGLang reads a tensor of it."""
    model = updater.get_model()
    if _is_ours(model):
        try:
            if load_format not in RELOAD_FORMATS:
                raise DeploymentError(f"load_format {load_format}: use one of {', '.join(RELOAD_FORMATS)}")
            validate_again(checkpoint_folder(model_path), model.v4_config)
            model.released.waiting.clear()  # of an update that was given up
        except Dsv4Error as error:
            return False, f"no weight was touched: {error}"
    return original(updater, model_path, load_format, *args, **kwargs)


def in_pieces(
    original: Callable[..., tuple[bool, str]], updater: Any, named_tensors: Any, load_format: str | None = None
) -> tuple[bool, str]:
    """Answer what our loader refuses, which it does before it touches a weight."""
    arguments = {} if load_format is None else {"load_format": load_format}
    if not _is_ours(updater.get_model()):
        return original(updater, named_tensors, **arguments)
    try:
        if load_format not in (None, "flattened_bucket"):
            raise DeploymentError(f"load_format {load_format}: released tensors alone are loaded; leave it out")
        return original(updater, named_tensors, **arguments)
    except Dsv4Error as error:
        return False, f"no weight of this request was touched: {error}"


def begin(original: Callable[..., Any], manager: Any, request: Any) -> Any:
    """Refuse a session where nothing may be loaded: ending it would process weights twice."""
    from sglang.srt.managers.io_struct import BeginWeightUpdateReqOutput

    model = manager.tp_worker.model_runner.model
    reason = getattr(model, "_derived_weight_cache_error", None)
    if _is_ours(model) and reason is not None:
        return BeginWeightUpdateReqOutput(success=False, message=reason)
    if _is_ours(model) and model.released is not None:
        model.released.waiting.clear()  # of an update that was given up
    return original(manager, request)


def end(original: Callable[..., Any], manager: Any, request: Any) -> Any:
    """Keep the session open while a weight waits for its scale."""
    from sglang.srt.managers.io_struct import EndWeightUpdateReqOutput

    model = manager.tp_worker.model_runner.model
    if _is_ours(model) and model.released is not None:
        try:
            model.released.refuse_halves()
        except Dsv4Error as error:
            return EndWeightUpdateReqOutput(success=False, message=f"{error}; send them, then end the session")
    return original(manager, request)
