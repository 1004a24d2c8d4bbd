# SPDX-License-Identifier: Apache-2.0
"""What a worker is really serving, told by the worker itself."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import vllm

from dsv4.ops import registry

STATUS_PATH = "/dsv4/status"


def worker_status(worker: Any) -> dict[str, Any]:
    """The model class, backends, cache formats and operator implementations of one worker, as plain JSON values."""
    from dsv4_vllm.caches import V4Cache

    model = worker.get_model()
    caches = [module for module in model.modules() if isinstance(module, V4Cache)]
    ours = type(model).__module__.startswith("dsv4_vllm")
    return {
        "rank": worker.rank,
        "vllm_version": vllm.__version__,
        "model_class": f"{type(model).__module__}.{type(model).__qualname__}",
        "served_by_dsv4": ours,
        "attention_backends": sorted({cache.get_attn_backend().get_name() for cache in caches}),
        "kv_format": caches[0].formats.kv.value if caches else None,
        "index_format": caches[0].formats.index.value if caches else None,
        "model_runner": f"{type(worker.model_runner).__module__}.{type(worker.model_runner).__qualname__}",
        "quant_method": type(worker.vllm_config.quant_config).__name__,
        "device": str(worker.device),
        "dtype": str(worker.model_config.dtype).removeprefix("torch."),
        "ops": registry.report(),
    }


def add_route() -> None:
    """Serve `GET /dsv4/status` next to vLLM's `/version`. Safe to call twice."""
    from fastapi import Request
    from fastapi.responses import JSONResponse
    from vllm.entrypoints.serve.instrumentator.basic import router

    if any(getattr(route, "path", None) == STATUS_PATH for route in router.routes):
        return

    async def dsv4_status(request: Request) -> JSONResponse:
        workers = await request.app.state.engine_client.collective_rpc("dsv4_status")
        return JSONResponse({"engine": "vllm", "engine_version": version("vllm"), "dsv4_version": version("dsv4"), "workers": workers})

    # FastAPI resolves annotations in the module's globals, where this function's local import is not visible.
    dsv4_status.__annotations__ = {"request": Request, "return": JSONResponse}
    router.add_api_route(STATUS_PATH, dsv4_status, methods=["GET"], response_model=None)
