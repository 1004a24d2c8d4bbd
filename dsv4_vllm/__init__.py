# SPDX-License-Identifier: Apache-2.0
"""DeepSeek-V4 in stock vLLM. This file imports nothing that could fail: it is what catches the
failures."""

import logging

logger = logging.getLogger(__name__)


def register() -> None:
    """vllm.general_plugins entry point: runs in every vLLM process, may run twice, and never
    raises.

    vLLM swallows a plugin's errors and then serves V4 with its own model, or crashes elsewhere.
    Whatever goes wrong here therefore makes V4, and only V4, refuse to start, with the reason.
    """
    try:
        from dsv4_vllm.logs import join_engine_log
        from dsv4_vllm.registration import register_model

        join_engine_log()
        register_model()
    except Exception as error:
        _refuse(f"{type(error).__name__}: {error}")


def _refuse(reason: str) -> None:
    try:
        from dsv4_vllm.refusal import refuse

        refuse(reason)
    except Exception:
        logger.exception(
            "dsv4: DeepSeek-V4 cannot be refused on this vLLM; it may be served by vLLM's own model (%s)", reason
        )
