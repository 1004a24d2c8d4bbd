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
    """Wraps the draft loop of either model runner. rows: for each proposal the tokens before it,
    the draft's own tokens, and those put in their place.

    truth: sequences that a request continues when it begins like one; without them the draft's own
    tokens are proposed
    """

    def __init__(self, llm: Any, truth: list[list[int]] | None, seed: int = 0) -> None:
        core = llm.llm_engine.engine_core.engine_core
        self.requests, self.runner = core.scheduler.requests, core.model_executor.driver_worker.worker.model_runner
        self.truth, self.random = truth or [], random.Random(seed)
        self.rows: list[dict[str, Any]] = []
        self.vocab = self.runner.model_config.get_vocab_size()
        if hasattr(self.runner, "speculator"):
            drafter, proposed = self.runner.speculator, self._proposed_by_v2
        else:
            drafter, proposed = self.runner.drafter, self._proposed_by_v1
        self.propose, drafter.propose = drafter.propose, proposed

    def _proposed_by_v1(self, *args: Any, **kwargs: Any) -> Any:
        metadata, next_ids = kwargs["common_attn_metadata"], kwargs["next_token_ids"]
        rejected = kwargs.get("num_rejected_tokens_gpu")
        seen = metadata.seq_lens[: next_ids.shape[0]].clone()
        if rejected is not None:
            seen -= rejected[: seen.shape[0]]
        names = self.runner.input_batch.req_ids[: seen.shape[0]]
        known = [self._known(name) for name in names]
        before = [
            None if ids is None else [*ids[:length], token]
            for ids, length, token in zip(known, seen.tolist(), next_ids.tolist(), strict=True)
        ]
        return self._given(self.propose(*args, **kwargs), names, before)

    def _proposed_by_v2(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        drafted: Tensor = self.propose(batch, *args, **kwargs)
        if kwargs.get("dummy_run"):
            return drafted
        sampled, rejected, last, following = args[4:8]
        at, n = batch.idx_mapping, batch.num_reqs
        seen = batch.seq_lens[:n] - rejected[:n]
        next_ids = torch.where(sampled[:n] > 0, last[at].flatten(), following.flatten()[at])
        rows = self.runner.req_states.all_token_ids.gpu[at]
        before = [
            [*ids[:length], token]
            for ids, length, token in zip(rows.tolist(), seen.tolist(), next_ids.tolist(), strict=True)
        ]
        return self._given(drafted, batch.req_ids, before)

    def _known(self, name: str) -> list[int] | None:
        """The sequence that a request is known to be."""
        request = self.requests.get(name)
        prompt = [] if request is None else list(request.prompt_token_ids)
        return next((ids for ids in self.truth if prompt and ids[: len(prompt)] == prompt), None)

    def _given(self, drafted: Tensor, names: list[str], before: list[list[int] | None]) -> Tensor:
        """What is proposed. before: each request's tokens, with the one that has been sampled."""
        forced = drafted.clone()
        for row, (name, ids) in enumerate(zip(names, before, strict=True)):
            known = self._known(name)
            if ids is not None and known is not None and len(ids) > len(self.requests[name].prompt_token_ids):
                forced[row] = torch.tensor(self._continued(known, len(ids) - 1, forced.shape[1]))
            self.rows.append(
                {"request": name, "before": ids, "own": drafted[row].tolist(), "given": forced[row].tolist()}
            )
        return forced

    def _continued(self, known: list[int], length: int, k: int) -> list[int]:
        """The true tokens after the next one, wrong from a random depth on."""
        right = known[length + 1 : length + 1 + k]
        depth = self.random.randint(0, k)
        wrong = [(t + 1) % self.vocab for t in right[depth:]]
        return (right[:depth] + wrong + [0] * k)[:k]
