# SPDX-License-Identifier: Apache-2.0
"""What a worker is really serving, told by the worker itself."""

from __future__ import annotations

from typing import Any

import vllm

from dsv4.ops import registry
from dsv4.proof.status import STATUS_ROUTE, STATUS_RPC, ServedOp, WorkerStatus, answer, dotted


def worker_status(worker: Any) -> dict[str, Any]:
    """`WorkerStatus` of one worker, as plain JSON values."""
    from dsv4_vllm.caches import V4Cache

    model = worker.get_model()
    caches = [module for module in model.modules() if isinstance(module, V4Cache)]
    return WorkerStatus(
        rank=worker.rank,
        engine_version=vllm.__version__,
        model_class=dotted(model),
        served_by_dsv4=type(model).__module__.startswith("dsv4_vllm"),
        attention_backends=tuple(sorted({cache.get_attn_backend().get_name() for cache in caches})),
        model_runner=dotted(worker.model_runner),
        cache_class=dotted(caches[0]) if caches else None,
        kv_format=caches[0].formats.kv.value if caches else None,
        index_format=caches[0].formats.index.value if caches else None,
        quant_method=dotted(worker.vllm_config.quant_config),
        device=str(worker.device),
        dtype=str(worker.model_config.dtype).removeprefix("torch."),
        ops={op: ServedOp(**choice) for op, choice in registry.report().items()},
    ).to_json()


def add_route() -> None:
    """Serve `GET /dsv4/status` next to vLLM's `/version`. Safe to call twice."""
    from fastapi import Request
    from fastapi.responses import JSONResponse
    from vllm.entrypoints.serve.instrumentator.basic import router

    if any(getattr(route, "path", None) == STATUS_ROUTE for route in router.routes):
        return

    async def dsv4_status(request: Request) -> JSONResponse:
        return JSONResponse(answer("vllm", await request.app.state.engine_client.collective_rpc(STATUS_RPC)))

    # FastAPI resolves annotations in the module's globals, where this function's local import is
    # not visible.
    dsv4_status.__annotations__ = {"request": Request, "return": JSONResponse}
    router.add_api_route(STATUS_ROUTE, dsv4_status, methods=["GET"], response_model=None)
