# SPDX-License-Identifier: Apache-2.0
"""Requests that our model cannot take, refused with 400 where SGLang looks at requests.

In the scheduler it is too late: what raises inside a forward ends the server, as a step of no token
does, and a token id beyond the vocabulary reads past the embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from dsv4_sglang.names import ARCHITECTURE

_VALIDATE = "sglang.srt.managers.tokenizer_manager.TokenizerManager._validate_one_request"


def install() -> None:
    """Register the hook. See `hooks.install`."""
    HookRegistry.register(_VALIDATE, validate, HookType.AROUND)


def validate(original: Callable[..., None], manager: Any, request: Any, input_ids: list[int] | None) -> None:
    """SGLang's own look at a request, behind ours. Raises ValueError, which it answers with 400."""
    if list(manager.model_config.hf_config.architectures) == [ARCHITECTURE]:
        if request.input_embeds is not None:
            raise ValueError(
                "input_embeds: DeepSeek-V4 chooses the experts of its first layers by token id; send input_ids"
            )
        if not input_ids:
            raise ValueError("the prompt has no token: send at least one")
        size = manager.model_config.vocab_size
        bad = [token for token in input_ids if not 0 <= token < size]
        if bad:
            raise ValueError(f"input_ids: {bad[0]} is no token of this model, which has 0 to {size - 1}")
    original(manager, request, input_ids)
