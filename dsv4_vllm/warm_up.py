# SPDX-License-Identifier: Apache-2.0
"""Kernels compiled while vLLM starts, by its registry of warm-ups."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size

from dsv4.model.config import V4Config
from dsv4.ops.pages import BatchView
from dsv4.ops.registry import all_kernels
from dsv4.ops.warm_up import ServedLayer, ServedModel, warm_up
from dsv4_vllm.caches import LayerCaches
from dsv4_vllm.metadata import PlannedStep, V4MetadataBuilder, unused_ops
from dsv4_vllm.options import cache_formats, draft_method, num_drafted, state_mapping

logger = logging.getLogger(__name__)


class KernelWarmUp:
    """What vLLM's registry takes for a kernel, and asks for its variants once the caches are
    allocated: before graphs are captured, and before it watches for compilations."""

    def __init__(self, config: V4Config, vllm_config: VllmConfig, attentions: Mapping[int, nn.Module]) -> None:
        """attentions: of the layers of this rank, by their index."""
        self.config, self.vllm_config, self.attentions = config, vllm_config, dict(attentions)
        self.tp = get_tensor_model_parallel_world_size()
        self.plan: Sequence[tuple[V4MetadataBuilder, Tensor]] = ()  # of the step that was prepared last

    def get_warmup_keys(self) -> list[str]:
        """One for all kernels: which variants there are is what their launches say."""
        return ["dsv4"]

    def compile_many(self, keys: Iterable[str]) -> None:
        device = torch.device(self.vllm_config.device_config.device_type)
        if not all_kernels(device, unused_ops(self.vllm_config)):
            logger.info("dsv4: references or DSV4_CHECK are in use, so kernels are not compiled ahead")
            return
        model = ServedModel(
            config=self.config,
            tp=self.tp,
            dtype=self.vllm_config.model_config.dtype,
            device=device,
            mapping=state_mapping(self.vllm_config),
            index_format=cache_formats(self.vllm_config).index,
            max_context=self.vllm_config.model_config.max_model_len,
            drafted=num_drafted(self.vllm_config),
            block=num_drafted(self.vllm_config) if draft_method(self.vllm_config) == "dspark" else 0,
            routed_ids=torch.int32 if device.type == "cpu" else None,  # vLLM has a router of its own on a GPU
        )
        layers = [self._layer(index, attention) for index, attention in self.attentions.items()]
        self._plan_nothing(device)
        logger.info("dsv4: kernels of %d layers compiled in %.1f s", len(layers), warm_up(model, layers))

    def _plan_nothing(self, device: torch.device) -> None:
        """The plan's one launch, for a request without tokens. Before vLLM's first step nobody
        knows the groups: then a step of its own warm-up compiles it."""
        if self.plan:
            nothing = torch.zeros(2, dtype=torch.int32, device=device)
            PlannedStep(self.plan).make(BatchView(nothing, nothing[:1], 1, 1, 0, 1))

    def _layer(self, index: int, attention: nn.Module) -> ServedLayer:
        caches = cast(LayerCaches, attention.caches)
        pages = {role: caches.pages(role) for role in caches.by_role}
        tails = {role: cache.tail for role, cache in caches.by_role.items() if cache.tail is not None}
        return ServedLayer(self.config.layers[index], pages, tails)
