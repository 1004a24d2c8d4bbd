# SPDX-License-Identifier: Apache-2.0
"""An SGLang plugin for a text that is given. See `forced`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.support.forced import BONUS, wanted

SAMPLE = "sglang.srt.model_executor.model_runner.ModelRunner.sample"
PROMPT_LEN: dict[int, int] = {}  # by row of the request pool


def register() -> None:
    """sglang.srt.plugins entry point."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(SAMPLE, sample_forced, HookType.AROUND)


def sample_forced(original: Callable[..., Any], runner: Any, logits_output: Any, batch: Any) -> Any:
    """SGLang's sampling behind raised logits; in front of its grammars."""
    prefill = batch.forward_mode.is_extend()
    for row, (request, length) in enumerate(zip(batch.req_pool_indices.tolist(), batch.seq_lens.tolist(), strict=True)):
        if prefill:
            PROMPT_LEN[request] = length
        token = wanted(length - PROMPT_LEN[request])
        if token is not None:
            logits_output.next_token_logits[row, token] += BONUS
    return original(runner, logits_output, batch)
