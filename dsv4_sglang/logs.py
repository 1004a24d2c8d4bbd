# SPDX-License-Identifier: Apache-2.0
"""dsv4's log lines in SGLang's log."""

from __future__ import annotations

import logging
import multiprocessing

LOGGERS = ("dsv4", "dsv4_sglang")


def join_engine_log() -> None:
    """Let the first process say who serves. Safe to call twice.

    SGLang loads plugins before it configures the root logger, which until then drops what is no
    warning. So long our loggers write to stderr in its format. SGLang's other processes would only
    repeat that, and need nothing.
    """
    if multiprocessing.current_process().name == "MainProcess":
        for ours in map(logging.getLogger, LOGGERS):
            if not ours.handlers:
                ours.addHandler(_UntilConfigured(ours))


class _UntilConfigured(logging.StreamHandler):
    """Prints a logger's lines until the root logger is given other handlers; then it takes itself
    away."""

    def __init__(self, logger: logging.Logger) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("[%(asctime)s] %(message)s", "%Y-%m-%d %H:%M:%S"))
        self.logger, self.root_handlers = logger, list(logging.getLogger().handlers)
        logger.propagate = False
        logger.setLevel(logging.INFO)  # SGLang's default; --log-level is not known yet

    def emit(self, record: logging.LogRecord) -> None:
        if logging.getLogger().handlers == self.root_handlers:
            super().emit(record)
            return
        self.logger.removeHandler(self)
        self.logger.propagate = True
        self.logger.setLevel(logging.NOTSET)
        if self.logger.isEnabledFor(record.levelno):
            logging.getLogger().handle(record)
