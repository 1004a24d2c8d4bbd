# SPDX-License-Identifier: Apache-2.0
"""Guard, decide, register."""

from __future__ import annotations

import logging
import os

from dsv4.machine import admission

logger = logging.getLogger(__name__)

_MODELS = "SGLANG_EXTERNAL_MODEL_PACKAGE"


def register_model() -> None:
    """Put our model in place of SGLang's own where it should serve. Raises what makes that
    impossible."""
    decision = admission.admit("sglang")
    if decision.serve:
        # Names our model before the registry is imported: SGLang then leaves its 285 models alone
        # until one of them is asked for.
        os.environ.setdefault(_MODELS, "dsv4_sglang.models")
        admission.check_structure("sglang")
        _register()
    logger.info("dsv4: %s", decision.reason)


def _register() -> None:
    # Errors in these must refuse V4 here, not when a worker first needs them.
    import dsv4_sglang.caches
    import dsv4_sglang.model  # noqa: F401
    from dsv4_sglang import hooks, metadata

    metadata.register_backend()
    hooks.install()
