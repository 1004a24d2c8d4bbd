# SPDX-License-Identifier: Apache-2.0
"""Weights replaced under a running server: as a fresh server has them, or refused in time.

vLLM takes every layer apart before it reads the first tensor of a reload, so that whatever is wrong
with a later one leaves a model that cannot run. What is to be loaded is therefore looked at before.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from dsv4.errors import DeploymentError
from dsv4.loading import RELOAD_FORMATS, checkpoint_folder
from dsv4.model.checkpoint import validate_again

_RUNNERS = ("vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.model_runner")


def install() -> None:
    """Put the look in front of vLLM's function, wherever it has been imported already."""
    from vllm.model_executor.model_loader.reload import inplace

    original = inplace.reload_weights
    if not hasattr(original, "__wrapped__"):
        for module in (inplace, *(sys.modules[name] for name in _RUNNERS if name in sys.modules)):
            module.reload_weights = _checked(original)


def _checked(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def reload_weights(
        vllm_config: Any,
        model: Any,
        weights_iterator: Iterable[tuple[str, Tensor]] | None,
        weights_path: str | None,
        is_checkpoint_format: bool,
    ) -> None:
        from dsv4_vllm.model import DeepseekV4ForCausalLM

        if isinstance(model, DeepseekV4ForCausalLM):
            _check(vllm_config, model, weights_iterator, weights_path, is_checkpoint_format)
            model.may_load = True
        original(
            vllm_config,
            model,
            weights_iterator=weights_iterator,
            weights_path=weights_path,
            is_checkpoint_format=is_checkpoint_format,
        )

    return reload_weights


def _check(
    vllm_config: Any, model: Any, weights: Iterable[tuple[str, Tensor]] | None, path: str | None, released: bool
) -> None:
    """Raise Dsv4Error for weights that would not make the model that is served."""
    if not released:
        raise DeploymentError("is_checkpoint_format=False: released tensors alone are loaded; leave it out")
    if weights is not None:
        if not isinstance(weights, list):
            raise DeploymentError(
                "weights_iterator: give a list, which can be looked at before a weight is touched, or weights_path"
            )
        loader = model.loader()
        loader.check(weights)
        loader.finish("weights_iterator")
        return
    if vllm_config.load_config.load_format not in RELOAD_FORMATS:
        raise DeploymentError(
            f"--load-format {vllm_config.load_config.load_format}: weights can be loaded again with one of"
            f" {', '.join(RELOAD_FORMATS)}"
        )
    validate_again(checkpoint_folder(path or vllm_config.model_config.model), model.v4_config)
