# SPDX-License-Identifier: Apache-2.0
"""Guard, decide, register."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from dsv4.machine import admission
from dsv4.model.config import ARCHITECTURE

logger = logging.getLogger(__name__)

VISION_ARCHITECTURE = "DeepseekV4ForConditionalGeneration"
MODEL = "dsv4_vllm.model:DeepseekV4ForCausalLM"
DRAFTS = {  # by vLLM's names of a target's draft
    "DeepSeekV4MTPModel": "dsv4_vllm.draft:DeepSeekV4MTP",
    "DSparkDraftModel": "dsv4_vllm.dspark:DSparkDeepseekV4ForCausalLM",
}


def register_model() -> None:
    """Put our model in place of vLLM's own where it should serve. Raises what makes that
    impossible."""
    decision = admission.admit("vllm")
    if decision.serve:
        admission.check_structure("vllm")
        _register()
    logger.info("dsv4: %s", decision.reason)


def _register() -> None:
    from vllm import ModelRegistry
    from vllm.model_executor.models import config as model_configs

    import dsv4_vllm.model  # an error in it must refuse V4 here, not when vLLM inspects the class in another process
    import dsv4_vllm.quant  # noqa: F401  registers itself
    from dsv4_vllm import hooks, reload

    for architecture in (ARCHITECTURE, VISION_ARCHITECTURE):  # the latter only to be refused, with its reason
        ModelRegistry.register_model(architecture, MODEL)
        model_configs.MODELS_CONFIG_MAP[architecture] = _checked(model_configs.DeepseekV4ForCausalLMConfig)
    for architecture, draft in DRAFTS.items():
        ModelRegistry.register_model(architecture, draft)
    hooks.add_status()
    reload.install()


def _checked(base: Any) -> Any:
    """vLLM's own V4 config hook, followed by our refusals, in the first process and before anything
    is started."""

    class V4ConfigCheck(base):
        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            base.verify_and_update_config(vllm_config)
            from dsv4.model.checkpoint import validate
            from dsv4_vllm.options import choose_state
            from dsv4_vllm.support import check_deployment

            config = check_deployment(vllm_config)
            choose_state(vllm_config, config)
            folder = Path(vllm_config.model_config.model)
            if folder.is_dir() and vllm_config.load_config.load_format != "dummy":
                validate(folder, config)

    return V4ConfigCheck
