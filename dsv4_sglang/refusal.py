# SPDX-License-Identifier: Apache-2.0
"""What stands in for V4 when dsv4 cannot serve it: an error when V4 is asked for, nothing for any
other model."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

logger = logging.getLogger(__name__)

PARSE = "sglang.srt.utils.hf_transformers.config.HfModelConfigParser.parse"
MODEL_TYPE = "deepseek_v4"


class RefusedError(RuntimeError):
    """DeepSeek-V4 was asked for and dsv4 cannot serve it."""


def refuse(reason: str) -> None:
    """Make SGLang stop with `reason` as soon as it reads a V4 config, before any process or memory
    is taken."""
    message = (
        f"dsv4 cannot serve DeepSeek-V4 here: {reason}. Run `dsv4 doctor`, or set DSV4_MODE=off for SGLang's own model."
    )
    logger.warning("%s Other models are not affected.", message)

    def parse(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        config = original(*args, **kwargs)
        if getattr(config, "model_type", None) == MODEL_TYPE:
            raise RefusedError(message)
        return config

    # Errors raised while registering are swallowed; what a hook raises when the engine calls it is
    # not.
    HookRegistry.register(PARSE, parse, HookType.AROUND)
