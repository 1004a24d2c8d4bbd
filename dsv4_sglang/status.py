# SPDX-License-Identifier: Apache-2.0
"""What a worker is really serving, told by the worker itself."""

from __future__ import annotations

import multiprocessing
from typing import Any

import sglang
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang.srt.runtime_context import get_parallel

from dsv4.ops import registry
from dsv4.proof.status import STATUS_ROUTE, ServedOp, WorkerStatus, answer, dotted

_INTERNAL_STATE = "sglang.srt.managers.scheduler.Scheduler.get_internal_state"
_RUN_SERVER = "sglang.srt.entrypoints.http_server._setup_and_run_http_server"


def install() -> None:
    """Let a server prove who serves V4: each scheduler adds what it runs to its internal state,
    which SGLang can ask for, and `GET /dsv4/status` shows it."""
    if multiprocessing.current_process().name == "MainProcess":
        HookRegistry.register(_RUN_SERVER, _add_route, HookType.BEFORE)
    HookRegistry.register(_INTERNAL_STATE, _add_workers, HookType.AFTER)


def worker_status(runner: Any) -> WorkerStatus:
    """What the worker of a model runner runs."""
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
    )


def _add_workers(result: Any, scheduler: Any, *args: Any, **kwargs: Any) -> Any:
    import torch

    own = worker_status(scheduler.tp_worker.model_runner).to_json()
    ranks = get_parallel().tp_size
    workers: list[Any] = [own]
    if ranks > 1:  # every rank answers the same request, in the same order
        workers = [None] * ranks
        torch.distributed.all_gather_object(workers, own, group=scheduler.tp_cpu_group)
    result.internal_state["dsv4"] = workers
    return result


def _add_route(*args: Any, **kwargs: Any) -> None:
    """Serve `GET /dsv4/status` next to SGLang's `/server_info`. Safe to call twice."""
    from fastapi.responses import JSONResponse
    from sglang.srt.entrypoints import http_server

    if any(getattr(route, "path", None) == STATUS_ROUTE for route in http_server.app.routes):
        return

    async def dsv4_status() -> Any:
        states = await http_server._global_state.tokenizer_manager.get_internal_state()
        workers = [worker for state in states for worker in state.get("dsv4", [])]
        return JSONResponse(answer("sglang", workers))

    dsv4_status.__annotations__ = {"return": JSONResponse}
    http_server.app.add_api_route(STATUS_ROUTE, dsv4_status, methods=["GET"], response_model=None)
