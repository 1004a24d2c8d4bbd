# SPDX-License-Identifier: Apache-2.0
"""vLLM's own graph machinery over tapes (`tape`), on a CPU: its manager chooses sizes, pads,
captures, breaks and replays. Replayed steps are held against eager ones (`graph_steps`)."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dsv4.ops.plan import EntryPlan
from tests.support import tape
from tests.support.graph_steps import GraphSteps, counted, each_tensor


def install(sizes: list[int], mode: str) -> None:
    """Before the engine is made: graphs of these sizes are asked for, and operators count as
    kernels, which is what they are on the tape."""
    from vllm.compilation import breakable_cudagraph
    from vllm.config import CUDAGraphMode
    from vllm.platforms import current_platform
    from vllm.v1.worker.gpu import cudagraph_utils, model_runner

    import dsv4_vllm.metadata as metadata

    tape.install()
    metadata._captures = lambda vllm_config: True
    breakable_cudagraph.weak_ref_tensor = tape.weak_ref_tensor
    breakable_cudagraph.weak_ref_tensors = lambda output: each_tensor(tape.weak_ref_tensor, output)
    type(current_platform).graph_pool_handle = lambda self: (0, 1)
    tape.Graph.owner = staticmethod(breakable_cudagraph.BreakableCUDAGraphCapture.current)
    for module in (breakable_cudagraph, cudagraph_utils):
        module.capture_pool = pool_of
    cudagraph_utils.graph_capture = nothing
    cudagraph_utils.current_stream = lambda: None
    torch.accelerator.empty_cache = torch.accelerator.synchronize = lambda *args: None
    torch.accelerator.get_memory_info = lambda *args: (0, 0)
    runner = model_runner.GPUModelRunner
    start, load = runner.__init__, runner.load_model

    def ask(vllm_config: Any) -> None:
        compilation = vllm_config.compilation_config
        compilation.cudagraph_mode = CUDAGraphMode[mode]
        compilation.cudagraph_capture_sizes, compilation.max_cudagraph_capture_size = sizes, max(sizes)

    def started(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        ask(vllm_config)
        start(self, vllm_config, *args, **kwargs)

    def loaded(self: Any, *args: Any, **kwargs: Any) -> None:
        load(self, *args, **kwargs)
        ask(self.vllm_config)  # which a draft's own config has set back, as --enforce-eager says

    runner.__init__, runner.load_model = started, loaded


@contextmanager
def pool_of(pool: Any, vllm_config: Any) -> Any:
    yield pool


@contextmanager
def nothing(*args: Any, **kwargs: Any) -> Any:
    yield


class Graphs:
    """The graphs of one engine, and what its steps were replayed by."""

    def __init__(self, llm: Any) -> None:
        from vllm.v1.worker import workspace

        self.runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
        self.steps, self.outside = GraphSteps(self.caches), dict[int, int]()
        workspace.init_workspace_manager(self.runner.device)  # which a CPU worker leaves out
        self.runner.capture_model()
        manager = self.runner.cudagraph_manager
        self._full, self._piecewise = manager.run_fullgraph, manager.run_pw_graph
        manager.run_fullgraph, manager.run_pw_graph = self.run_full, self.run_piecewise
        self._attention: dict[str, Any] = {}
        connector = self.runner.kv_connector
        before = connector.pre_forward

        def pre_forward(*args: Any, **kwargs: Any) -> Any:
            self._attention = kwargs.get("attn_metadata")
            return before(*args, **kwargs)

        connector.pre_forward = pre_forward
        state = self.runner.model_state
        state.prepare_attn = counted(state.prepare_attn, self.outside, lambda batch: batch.num_tokens)

    def modules(self) -> list[Any]:
        """Every cache of the model."""
        from dsv4_vllm.caches import V4Cache

        return [m for m in self.runner.get_model().modules() if isinstance(m, V4Cache)]

    def caches(self) -> dict[str, Tensor]:
        """Their memory, by name."""
        return {cache.prefix: cache.kv_cache for cache in self.modules()}

    def run_full(self, desc: Any) -> Tensor:
        from vllm.forward_context import set_forward_context

        buffers, n = self.runner.input_buffers, desc.num_tokens

        def eager() -> Tensor:
            with set_forward_context(self.with_bounds_of_capture(), self.runner.vllm_config, num_tokens=n):
                return self.runner.model(
                    input_ids=buffers.input_ids[:n],
                    positions=buffers.positions[:n],
                    intermediate_tensors=None,
                    inputs_embeds=None,
                )

        return self.compare(f"full {n}", lambda: self._full(desc), eager)

    def with_bounds_of_capture(self) -> dict[str, Any]:
        """The step's metadata with the host bounds that a captured decode step has: kernels split
        their work by them, and so round differently, though all are right."""
        specs = {cache.prefix: cache.spec for cache in self.modules()}

        def bound(name: str, plan: Any) -> Any:
            if not isinstance(plan, EntryPlan):
                return plan
            ratio = specs[name].page_tokens // specs[name].rows_per_page
            slots, entries = plan.request_slots, self.runner.max_model_len // ratio
            if slots is not None:  # lists lie as far apart as the longest may be long
                slots = slots.as_strided((slots.shape[0], entries), slots.stride())
            return replace(plan, max_entries=entries, request_slots=slots)

        return {name: bound(name, plan) for name, plan in self._attention.items()}

    def run_piecewise(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        n = inputs["positions"].shape[0]
        return self.compare(
            f"piecewise {n}",
            lambda: self._piecewise(model, inputs),
            lambda: model(**inputs),
        )

    def compare(self, what: str, graph: Any, eager: Any) -> Tensor:
        """See `GraphSteps`. Padding may hold anything of earlier steps."""
        real, padded, buffers = self.real_tokens(), int(what.split()[1]), self.runner.input_buffers
        buffers.input_ids[real:padded], buffers.positions[real:padded] = 1, 12345
        return self.steps.compare(what, real, graph, eager)

    def real_tokens(self) -> int:
        """Tokens of the step that are no padding."""
        return int(self.runner.input_buffers.query_start_loc.max())

    def smallest(self) -> tape.Tape:
        """The tape of the full graph of one request, with its drafts."""
        graphs = self.runner.cudagraph_manager.graphs
        return min(graphs.items(), key=lambda pair: pair[0].num_tokens)[1].tape

    def report(self) -> dict[str, Any]:
        return self.steps.report(self.smallest(), self.outside.get(1))
