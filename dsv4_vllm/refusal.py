# SPDX-License-Identifier: Apache-2.0
"""What stands in for V4 when dsv4 cannot serve it: an error when V4 is asked for, nothing for any
other model."""

from __future__ import annotations

import logging
from typing import Any

from vllm.model_executor.models import config as model_configs

logger = logging.getLogger(__name__)

ARCHITECTURES = (
    "DeepseekV4ForCausalLM",
    "DeepseekV4ForConditionalGeneration",
    "DeepSeekV4MTPModel",
    "DSparkDraftModel",
)


class RefusedError(RuntimeError):
    """DeepSeek-V4 was asked for and dsv4 cannot serve it."""


def refuse(reason: str) -> None:
    """Make vLLM stop with `reason` as soon as it reads a V4 config, before any process or memory is
    taken."""
    message = (
        f"dsv4 cannot serve DeepSeek-V4 here: {reason}. Run `dsv4 doctor`, or set DSV4_MODE=off for vLLM's own model."
    )
    logger.warning("%s Other models are not affected.", message)

    class Refusal(model_configs.VerifyAndUpdateConfig):
        @staticmethod
        def verify_and_update_model_config(model_config: Any) -> None:
            raise RefusedError(message)

        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            raise RefusedError(message)

    for architecture in ARCHITECTURES:
        model_configs.MODELS_CONFIG_MAP[architecture] = Refusal
