# SPDX-License-Identifier: Apache-2.0
"""DeepSeek-V4 in stock SGLang. This file imports nothing that could fail: it is what catches the
failures."""

import logging

logger = logging.getLogger(__name__)


def register() -> None:
    """sglang.srt.plugins entry point: runs in every SGLang process, and never raises.

    SGLang swallows a plugin's errors and then serves V4 with its own model, or crashes elsewhere.
    Whatever goes wrong here therefore makes V4, and only V4, refuse to start, with the reason.
    """
    try:
        from dsv4_sglang.logs import join_engine_log
        from dsv4_sglang.registration import register_model

        join_engine_log()
        register_model()
    except Exception as error:
        _refuse(f"{type(error).__name__}: {error}")


def _refuse(reason: str) -> None:
    try:
        from dsv4_sglang.refusal import refuse

        refuse(reason)
    except Exception:
        logger.exception(
            "dsv4: DeepSeek-V4 cannot be refused on this SGLang; it may be served by SGLang's own model (%s)", reason
        )
