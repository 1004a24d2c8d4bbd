# SPDX-License-Identifier: Apache-2.0
"""SGLang's own decode graphs over tapes (`tape`), on a CPU: its runner chooses sizes, pads,
captures and replays. Replayed steps are held against eager ones (`graph_steps`)."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from tests.support import tape
from tests.support.graph_steps import GraphSteps, counted


class Graphs:
    """The decode graphs of one model runner, and what its steps were replayed by."""

    def __init__(self, runner: Any, sizes: list[int]) -> None:
        self.runner, self.forwards = runner, dict[Any, Any]()
        self.steps, self.outside = GraphSteps(self.caches), dict[int, int]()
        stub(runner, sizes)
        from sglang.srt.model_executor.runner.decode_cuda_graph_runner import DecodeCudaGraphRunner
        from sglang.srt.model_executor.runner_backend.full_cuda_graph_backend import FullCudaGraphBackend

        capture = FullCudaGraphBackend.capture_one

        def capture_one(backend: Any, key: Any, forward: Any, *args: Any, **kwargs: Any) -> None:
            self.forwards[key] = forward
            capture(backend, key, forward, *args, **kwargs)

        FullCudaGraphBackend.capture_one = capture_one
        runner.decode_cuda_graph_runner = made = DecodeCudaGraphRunner(runner)
        self._replay, made.backend.replay = made.backend.replay, self.replay
        backend = runner.attn_backend
        backend.init_forward_metadata_out_graph = counted(
            backend.init_forward_metadata_out_graph, self.outside, lambda view: view.batch_size
        )

    def replay(self, key: Any, forward_batch: Any, **kwargs: Any) -> Any:
        """Replay and run eagerly, from the same caches; what the graph computed goes on."""
        outputs = []

        def graph() -> Tensor:
            outputs.append(self._replay(key, forward_batch, **kwargs))
            return outputs[0].next_token_logits

        def eager() -> Tensor:
            return self.forwards[key]().next_token_logits.clone()

        logits = self.steps.compare(f"{key.size}", forward_batch.batch_size, graph, eager)
        outputs[0].next_token_logits.copy_(logits)
        return outputs[0]

    def caches(self) -> dict[str, Tensor]:
        """Every cache's bytes, by layer and role."""
        return {
            f"{layer} {role.value}": pages.data.view(torch.uint8)
            for layer, caches in self.runner.token_to_kv_pool.layers.items()
            for role, pages in caches.items()
        }

    def report(self) -> dict[str, Any]:
        return self.steps.report(tape.Graph.captured[-1].tape, self.outside.get(1))  # the largest is captured first


def stub(runner: Any, sizes: list[int]) -> None:
    """Give the runner what a CPU has not: streams, graphs, and a choice of sizes."""
    from sglang.srt.model_executor.runner import decode_cuda_graph_runner as decode
    from sglang.srt.runtime_context import get_exec

    tape.install()
    config = get_exec().graph.cuda_graph_config
    config.decode.bs, config.decode.backend = sizes, "full"
    decode.graph_capture = no_stream
    decode.get_or_create_global_graph_capture_stream = lambda: None
    torch.cpu.graph, torch.cpu.graph_pool_handle = tape.graph, lambda: (0, 1)
    torch.cpu.is_current_stream_capturing = lambda: False


@contextmanager
def no_stream(**kwargs: Any) -> Any:
    class Context:
        stream = None

    with nullcontext():
        yield Context()
