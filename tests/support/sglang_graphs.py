# SPDX-License-Identifier: Apache-2.0
"""SGLang's own decode graphs over tapes (`tape`), on a CPU: its runner chooses sizes, pads,
captures and replays.

Every replayed step is held against the same padded step run eagerly from the same caches: logits
and every byte of every cache must be the same.
"""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from tests.support import tape


class Graphs:
    """The decode graphs of one model runner, and what its steps were replayed by."""

    def __init__(self, runner: Any, sizes: list[int]) -> None:
        self.runner, self.forwards = runner, dict[Any, Any]()
        self.replayed: Counter[str] = Counter()
        self.different: list[str] = []
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
        self.outside: dict[int, int] = {}
        plan = runner.attn_backend.init_forward_metadata_out_graph

        def before_replay(view: Any, **kwargs: Any) -> None:
            counting = tape.Counting()
            with counting:
                plan(view, **kwargs)
            self.outside[view.batch_size] = counting.launches

        runner.attn_backend.init_forward_metadata_out_graph = before_replay
        smallest = tape.Graph.captured[-1].tape  # SGLang captures the largest first
        assert smallest is not None
        self.inside = [launch.name for launch in smallest.launches if launch.works]

    def replay(self, key: Any, forward_batch: Any, **kwargs: Any) -> Any:
        """Replay and run eagerly, from the same caches; what the graph computed goes on."""
        what = f"{key.size}"
        self.replayed[what] += 1
        caches = self.caches()
        before = {name: cache.clone() for name, cache in caches.items()}
        out = self._replay(key, forward_batch, **kwargs)
        got, after = out.next_token_logits.clone(), {name: cache.clone() for name, cache in caches.items()}
        for name, cache in caches.items():
            cache.copy_(before[name])
        want = self.forwards[key]().next_token_logits[: forward_batch.batch_size].clone()
        if not torch.equal(got[: forward_batch.batch_size], want):
            self.different.append(f"{what}: logits of {forward_batch.batch_size} requests")
        self.different += [f"{what}: {name}" for name, cache in caches.items() if not torch.equal(after[name], cache)]
        for name, cache in caches.items():
            cache.copy_(after[name])
        out.next_token_logits.copy_(got)
        return out

    def caches(self) -> dict[str, Tensor]:
        """Every cache's bytes, by layer and role."""
        return {
            f"{layer} {role.value}": pages.data.view(torch.uint8)
            for layer, caches in enumerate(self.runner.token_to_kv_pool.layers)
            for role, pages in caches.items()
        }

    def report(self) -> dict[str, Any]:
        pools = tape.Graph.pools.values()
        return {
            "replayed": dict(self.replayed),
            "different": self.different[:20],
            "captured": len(tape.Graph.captured),
            # Of a decode step of one request: in its graph, and before it for attention's metadata.
            "inside": self.inside,
            "outside": self.outside.get(1),
            "held": sum(pool.held for pool in pools),
            "peak": sum(pool.peak for pool in pools),
        }


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
