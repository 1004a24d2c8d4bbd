# SPDX-License-Identifier: Apache-2.0
"""What SGLang's draft worker proposed and how much of it was kept, and drafts that are right up to
a depth of our choice.

As in `vllm_drafts`: the true continuation is put in the place of what was drafted, wrong from a
random depth on, so that every accepted length occurs.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

_WORKER = "sglang.srt.speculative.eagle_worker_v2"


class Drafts:
    """Hooks on the worker.

    rows: of each proposal the tokens before it, those that the block drafted, and those verified
    kept: of each verified request its length before, and the drafts kept
    """

    def __init__(self, truth: list[list[int]] | None, seed: int = 0) -> None:
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType

        self.truth, self.random = truth, random.Random(seed)
        self.rows: list[dict[str, Any]] = []
        self.kept: list[tuple[int, int]] = []
        HookRegistry.register(f"{_WORKER}.EagleDraftWorker.draft", self.draft, HookType.AROUND)
        HookRegistry.register(f"{_WORKER}.EAGLEWorkerV2.verify", self.verify, HookType.AROUND)

    def draft(self, original: Callable[..., Any], worker: Any, batch: Any, **kwargs: Any) -> Any:
        lengths = batch.seq_lens.tolist()
        made = original(worker, batch, **kwargs)
        tokens = made.draft_token.view(len(lengths), -1)
        for row, (request, length) in enumerate(zip(batch.reqs, lengths, strict=True)):
            known = [*request.origin_input_ids, *request.output_ids][: length + 1]
            before = known if len(known) == length + 1 and known[-1] == int(tokens[row, 0]) else None
            own = tokens[row, 1:].tolist()
            text = self._text(list(request.origin_input_ids))
            if text is not None:
                tokens[row, 1:] = tokens.new_tensor(self._continued(text, length, len(own)))
            self.rows.append({"before": before, "own": own, "given": tokens[row, 1:].tolist()})
        return made

    def verify(self, original: Callable[..., Any], worker: Any, batch: Any, **kwargs: Any) -> Any:
        lengths = batch.seq_lens.tolist()
        made = original(worker, batch, **kwargs)
        self.kept += list(zip(lengths, (made.accept_lens - 1).tolist(), strict=True))
        return made

    def _text(self, prompt: list[int]) -> list[int] | None:
        return next((t for t in self.truth or () if t[: len(prompt)] == prompt), None)

    def _continued(self, text: list[int], length: int, k: int) -> list[int]:
        """The true tokens behind the one at `length`, wrong from a random depth on."""
        right, depth = text[length + 1 : length + 1 + k], self.random.randint(0, k)
        return (right[:depth] + [token ^ 1 for token in right[depth:]] + [0] * k)[:k]

    def report(self) -> dict[str, Any]:
        return {"rows": self.rows, "kept": self.kept}
