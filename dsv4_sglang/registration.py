# SPDX-License-Identifier: Apache-2.0
"""Guard, decide, register."""

from __future__ import annotations

import logging
import os

from dsv4.machine import compat, decide, env

logger = logging.getLogger(__name__)

_MODELS = "SGLANG_EXTERNAL_MODEL_PACKAGE"


def register_model() -> None:
    """Put our model in place of SGLang's own where it should serve. Raises what makes that impossible."""
    env.check_environ()
    decision = decide.decide(env.get("DSV4_MODE"), decide.weakest(decide.detect_devices()))
    if not decision.serve:
        logger.info("dsv4: %s", decision.reason)
        return
    found = compat.installed_version("sglang") or "(not installed)"
    compat.check_version("sglang", found, allow_untested=env.flag("DSV4_ALLOW_UNTESTED"))
    # Names our model before the registry is imported: SGLang then leaves its 285 models alone until one of them is asked for.
    os.environ.setdefault(_MODELS, "dsv4_sglang.models")
    compat.check_structure("sglang", found)
    _register()
    logger.info("dsv4: %s", decision.reason)


def _register() -> None:
    # Errors in these must refuse V4 here, not when a worker first needs them.
    from dsv4_sglang import hooks, metadata

    metadata.register_backend()
    hooks.install()
