# SPDX-License-Identifier: Apache-2.0
"""What a worker is really serving, told by the worker itself."""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping, Sequence
from typing import Any

import sglang
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang.srt.runtime_context import get_parallel

from dsv4.ops import registry
from dsv4.proof.status import STATUS_ROUTE, Acceptance, ServedOp, WorkerStatus, answer, dotted
from dsv4_sglang.options import drafted_tokens

_INTERNAL_STATE = "sglang.srt.managers.scheduler.Scheduler.get_internal_state"
_RUN_SERVER = "sglang.srt.entrypoints.http_server._setup_and_run_http_server"


def install() -> None:
    """Let a server prove who serves V4: each scheduler adds what it runs to its internal state,
    which SGLang can ask for, and `GET /dsv4/status` shows it."""
    if multiprocessing.current_process().name == "MainProcess":
        HookRegistry.register(_RUN_SERVER, _add_route, HookType.BEFORE)
    HookRegistry.register(_INTERNAL_STATE, _add_workers, HookType.AFTER)


def worker_status(runner: Any, draft: Any = None, drafted: int = 0) -> WorkerStatus:
    """What the worker of a model runner runs. draft: the model that drafts so many tokens a
    step."""
    from dsv4_sglang.caches import V4Pool
    from dsv4_sglang.metadata import V4AttentionBackend

    model, backend, pool = runner.model, runner.attn_backend, runner.token_to_kv_pool
    return WorkerStatus(
        rank=get_parallel().tp_rank,
        engine_version=sglang.__version__,
        model_class=dotted(model),
        served_by_dsv4=type(model).__module__.startswith("dsv4_sglang") and isinstance(backend, V4AttentionBackend),
        attention_backends=(dotted(backend),),
        model_runner=dotted(runner),
        cache_class=dotted(pool),
        kv_format=pool.formats.kv.value if isinstance(pool, V4Pool) else None,
        index_format=pool.formats.index.value if isinstance(pool, V4Pool) else None,
        quant_method=dotted(getattr(model, "quant_config", None)),
        device=str(runner.device),
        dtype=str(runner.dtype).removeprefix("torch."),
        ops={op: ServedOp(**choice) for op, choice in registry.report().items()},
        draft_class=None if draft is None else dotted(draft),
        drafted=drafted,
    )


def _add_workers(result: Any, scheduler: Any, *args: Any, **kwargs: Any) -> Any:
    import torch

    own = worker_status(scheduler.tp_worker.model_runner, *_draft(scheduler)).to_json()
    ranks = get_parallel().tp_size
    workers: list[Any] = [own]
    if ranks > 1:  # every rank answers the same request, in the same order
        workers = [None] * ranks
        torch.distributed.all_gather_object(workers, own, group=scheduler.tp_cpu_group)
    result.internal_state["dsv4"] = workers
    return result


def _draft(scheduler: Any) -> tuple[Any, int]:
    """The model that drafts, and how many tokens a step; (None, 0) without drafts."""
    drafted = drafted_tokens()
    if not drafted:
        return None, 0
    return scheduler.draft_worker.draft_worker.draft_runner.model, drafted


def _acceptance(states: Sequence[Mapping[str, Any]]) -> Acceptance | None:
    """From SGLang's own count of tokens per verified step, which knows no positions."""
    lengths = [state["avg_spec_accept_length"] for state in states if state.get("avg_spec_accept_length")]
    return Acceptance(tokens_per_step=sum(lengths) / len(lengths), by_position=None) if lengths else None


def _add_route(*args: Any, **kwargs: Any) -> None:
    """Serve `GET /dsv4/status` next to SGLang's `/server_info`. Safe to call twice."""
    from fastapi.responses import JSONResponse
    from sglang.srt.entrypoints import http_server

    if any(getattr(route, "path", None) == STATUS_ROUTE for route in http_server.app.routes):
        return

    async def dsv4_status() -> Any:
        states = await http_server._global_state.tokenizer_manager.get_internal_state()
        workers = [worker for state in states for worker in state.get("dsv4", [])]
        return JSONResponse(answer("sglang", workers, _acceptance(states)))

    dsv4_status.__annotations__ = {"return": JSONResponse}
    http_server.app.add_api_route(STATUS_ROUTE, dsv4_status, methods=["GET"], response_model=None)
