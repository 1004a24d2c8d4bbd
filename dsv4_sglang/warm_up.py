# SPDX-License-Identifier: Apache-2.0
"""Kernels compiled while SGLang starts, before it captures graphs."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from sglang.srt.runtime_context import get_parallel

from dsv4.model.config import V4Config
from dsv4.model.kv_layout import StateMapping
from dsv4.ops.warm_up import ServedLayer, ServedModel, warm_up
from dsv4_sglang.caches import V4Pool
from dsv4_sglang.options import has_host_reads

if TYPE_CHECKING:
    from sglang.srt.model_executor.model_runner import ModelRunner

logger = logging.getLogger(__name__)


def compile_kernels(config: V4Config, runner: ModelRunner) -> None:
    """Launch once what serving can need, on the caches of `runner`."""
    if has_host_reads():
        logger.info("dsv4: references or DSV4_CHECK are in use, so kernels are not compiled ahead")
        return
    pool = runner.token_to_kv_pool
    assert isinstance(pool, V4Pool)
    model = ServedModel(
        config=config,
        tp=get_parallel().tp_size,
        dtype=runner.model_config.dtype,
        device=torch.device(pool.device),
        mapping=StateMapping.RING,
        index_format=pool.formats.index,
        max_context=runner.model_config.context_len,
        routed_ids=torch.int64,
    )
    layers = [ServedLayer(layer, pages) for layer, pages in zip(config.layers, pool.layers.values(), strict=True)]
    logger.info("dsv4: kernels of %d layers compiled in %.1f s", len(layers), warm_up(model, layers))
