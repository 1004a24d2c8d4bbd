# SPDX-License-Identifier: Apache-2.0
"""What a worker is really serving, told by the worker itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import vllm

from dsv4.ops import registry
from dsv4.proof.status import STATUS_ROUTE, STATUS_RPC, Acceptance, ServedOp, WorkerStatus, answer, dotted
from dsv4_vllm.options import num_drafted

_COUNTED = "vllm:spec_decode_num"


def worker_status(worker: Any) -> dict[str, Any]:
    """`WorkerStatus` of one worker, as plain JSON values."""
    from dsv4_vllm.caches import V4Cache

    model, draft = worker.get_model(), _draft(worker.model_runner)
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
        draft_class=None if draft is None else dotted(draft),
        drafted=num_drafted(worker.vllm_config),
    ).to_json()


def _draft(runner: Any) -> Any:
    """The model that drafts for either model runner; None without one."""
    drafter = getattr(runner, "drafter", None) or getattr(runner, "speculator", None)
    return getattr(drafter, "model", None)


def acceptance(samples: Iterable[tuple[str, Mapping[str, str], float]]) -> Acceptance | None:
    """From vLLM's own counters. samples: name, labels and value of each metric."""
    counted: Counter[str] = Counter()
    kept: Counter[int] = Counter()
    for name, labels, value in samples:
        if name == f"{_COUNTED}_accepted_tokens_per_pos_total":
            kept[int(labels["position"])] += int(value)
        elif name in (f"{_COUNTED}_drafts_total", f"{_COUNTED}_accepted_tokens_total"):
            counted[name.removeprefix(f"{_COUNTED}_")] += int(value)
    steps = counted["drafts_total"]
    if not steps:
        return None
    return Acceptance(
        tokens_per_step=1 + counted["accepted_tokens_total"] / steps,
        by_position=tuple(kept[i] / steps for i in range(max(kept, default=-1) + 1)),
    )


def add_route() -> None:
    """Serve `GET /dsv4/status` next to vLLM's `/version`. Safe to call twice."""
    from fastapi import Request
    from fastapi.responses import JSONResponse
    from vllm.entrypoints.serve.instrumentator.basic import router
    from vllm.v1.metrics.prometheus import get_prometheus_registry

    if any(getattr(route, "path", None) == STATUS_ROUTE for route in router.routes):
        return

    async def dsv4_status(request: Request) -> JSONResponse:
        workers = await request.app.state.engine_client.collective_rpc(STATUS_RPC)
        metrics = get_prometheus_registry().collect()
        samples = ((s.name, s.labels, s.value) for metric in metrics for s in metric.samples)
        return JSONResponse(answer("vllm", workers, acceptance(samples)))

    # FastAPI resolves annotations in the module's globals, where this function's local import is
    # not visible.
    dsv4_status.__annotations__ = {"request": Request, "return": JSONResponse}
    router.add_api_route(STATUS_ROUTE, dsv4_status, methods=["GET"], response_model=None)
