# SPDX-License-Identifier: Apache-2.0
"""What a layer's attention allocates in a step, and what vLLM's memory profile lets it take."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.support import tape


def record_attention(llm: Any) -> list[dict[str, Any]]:
    """Collect {"kind", "tokens", "step", "profile"} of every call of a layer's attention: the most
    bytes that the step held at once and all that it took, and the same of the profile's rehearsal
    with as many tokens."""
    from dsv4_vllm.model import LayerInputs, V4Attention

    attend = V4Attention._attend
    calls: list[dict[str, Any]] = []

    def held(function: Any, *args: Any) -> tuple[int, int]:
        pool = tape.Pool()
        recorder = tape.Recorder(tape.Tape(pool, {}))
        tape.Graph.recording = recorder.tape
        try:
            with torch.inference_mode(), recorder:
                function(*args)
                return pool.peak, pool.taken
        finally:
            tape.Graph.recording = None

    def watched(self: V4Attention, inputs: LayerInputs, step: Any, metadata: Any, out: Tensor) -> None:
        taken: list[tuple[int, int]] = []

        def rehearse(_: V4Attention, *args: Any) -> None:
            taken.append(held(attend, self, *args))

        V4Attention._attend = rehearse
        try:
            self.attend_padding(inputs, torch.empty_like(out))
            taken.append(held(attend, self, inputs, step, metadata, out))
        finally:
            V4Attention._attend = watched
        tokens = inputs.q.shape[0]
        calls.append({"kind": self.layer.kind.value, "tokens": tokens, "profile": taken[0], "step": taken[1]})

    tape.install()
    V4Attention._attend = watched
    return calls


def still_held(llm: Any) -> list[str]:
    """The caches that hold on to memory after vLLM has taken it back, as it does between its memory
    profile and the real pool."""
    from vllm.v1.worker.utils import clear_layer_kv_caches

    from dsv4_vllm.caches import V4Cache

    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    caches = [m for m in runner.get_model().modules() if isinstance(m, V4Cache)]
    clear_layer_kv_caches(caches)
    return [c.prefix for c in caches if any(isinstance(v, Tensor) and v.numel() for v in held_by(c))]


def held_by(cache: Any) -> list[Any]:
    """Every tensor that the cache's attributes hold, in pages too."""
    return [part for value in vars(cache).values() for part in (value, getattr(value, "data", None))]
