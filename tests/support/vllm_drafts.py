# SPDX-License-Identifier: Apache-2.0
"""What vLLM's draft loop proposed, and drafts that are right up to a depth of our choice.

A draft of random weights is almost never right, so that a rejection is all that a test would see.
Here the true continuation is put in its place, wrong from a random depth on: every accepted length
then occurs at every position, and none depends on the draft.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor


class Drafts:
    """Wraps the runner's draft loop. rows: for each proposal the tokens before it, the draft
    layer's own tokens, and those put in their place.
    """

    def __init__(self, llm: Any, truth: list[list[int]] | None, seed: int = 0) -> None:
        self.runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
        self.truth, self.random = truth or [], random.Random(seed)
        self.rows: list[dict[str, Any]] = []
        self.vocab = self.runner.model_config.get_vocab_size()
        drafter = self.runner.drafter
        self.propose, drafter.propose = drafter.propose, self._proposed

    def _proposed(self, *args: Any, **kwargs: Any) -> Any:
        metadata, next_ids = kwargs["common_attn_metadata"], kwargs["next_token_ids"]
        rejected = kwargs.get("num_rejected_tokens_gpu")
        seen = metadata.seq_lens[: next_ids.shape[0]].clone()
        if rejected is not None:
            seen -= rejected[: seen.shape[0]]
        drafted: Tensor = self.propose(*args, **kwargs)
        forced = drafted.clone()
        for row, length in enumerate(seen.tolist()):
            state = self.runner.requests[self.runner.input_batch.req_ids[row]]
            prompt = list(state.prompt_token_ids)
            known = next((t for t in self.truth if t[: len(prompt)] == prompt), None)
            if known is not None and length >= len(prompt):
                forced[row] = torch.tensor(self._continued(known, length, forced.shape[1]))
            before = None if known is None else [*known[:length], int(next_ids[row])]
            self.rows.append({"before": before, "own": drafted[row].tolist(), "given": forced[row].tolist()})
        return forced

    def _continued(self, known: list[int], length: int, k: int) -> list[int]:
        """The true tokens after the next one, wrong from a random depth on."""
        right = known[length + 1 : length + 1 + k]
        depth = self.random.randint(0, k)
        wrong = [(t + 1) % self.vocab for t in right[depth:]]
        return (right[:depth] + wrong + [0] * k)[:k]
