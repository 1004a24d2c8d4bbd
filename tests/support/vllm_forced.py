# SPDX-License-Identifier: Apache-2.0
"""vLLM's --logits-processors for a text that is given. See `forced`."""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.sample.logits_processor import LogitsProcessor

from tests.support.forced import BONUS, wanted


class ForcedText(LogitsProcessor):
    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self.generated: dict[int, list[int]] = {}  # by row of the batch

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        if batch_update is not None:
            for row in batch_update.removed:
                self.generated.pop(row, None)
            for row, _, _, generated in batch_update.added:
                self.generated[row] = generated

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """logits: [requests, vocabulary]."""
        for row, generated in self.generated.items():
            token = wanted(len(generated))
            if token is not None and row < len(logits):
                logits[row, token] += BONUS
        return logits
