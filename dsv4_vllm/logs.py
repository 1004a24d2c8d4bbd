# SPDX-License-Identifier: Apache-2.0
"""dsv4's log lines in vLLM's log."""

from __future__ import annotations

import logging

LOGGERS = ("dsv4", "dsv4_vllm")


def join_engine_log() -> None:
    """Give our loggers vLLM's handlers and level. vLLM configures its own logger alone, so ours
    would reach nobody."""
    import vllm.logger  # noqa: F401  configures logging when it is imported

    engine = logging.getLogger("vllm")
    for ours in map(logging.getLogger, LOGGERS):
        ours.handlers, ours.propagate = list(engine.handlers), engine.propagate
        ours.setLevel(engine.level)
