# SPDX-License-Identifier: Apache-2.0
"""How V4's FP8 and FP4 weights become vLLM layers.

On a GPU the engine's own methods serve (block FP8 linears, MXFP4 experts); here is what they lack:
a CPU method for each, whose weights are plain, and wo_a, whose grouped product needs plain weights
on every device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEQuantConfig, RoutingMethodType
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.parameter import ModelWeightParameter
from vllm.model_executor.utils import set_weight_attrs
from vllm.models.deepseek_v4.quant_config import DeepseekV4FP8Config
from vllm.platforms import current_platform

from dsv4.loading import PlainLinear
from dsv4.model.config import V4Config
from dsv4.ops import moe

QUANTIZATION = "deepseek_v4_fp8"  # the name vLLM gives V4's quantisation; registering it again overrides


@register_quantization_config(QUANTIZATION)
class V4QuantConfig(DeepseekV4FP8Config):
    """vLLM's V4 quantisation, with our methods where its own cannot serve."""

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [*super().get_supported_act_dtypes(), torch.float32]  # the CPU reference runs in fp32

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        on_cpu = current_platform.is_cpu()
        if isinstance(layer, LinearBase) and (on_cpu or prefix.endswith(".wo_a")):
            return DequantizedLinearMethod()
        if isinstance(layer, RoutedExperts) and on_cpu:
            return DequantizedExpertsMethod(layer.moe_config)
        return super().get_quant_method(layer, prefix)


class DequantizedLinearMethod(LinearMethodBase):
    """A block-FP8 linear that is dequantised while it is loaded: see `ReleasedLoader`."""

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        weight = ModelWeightParameter(
            data=torch.empty(sum(output_partition_sizes), input_size_per_partition, dtype=params_dtype),
            input_dim=1,
            output_dim=0,
            weight_loader=extra_weight_attrs["weight_loader"],
        )
        layer.register_parameter("weight", weight)

    def apply(self, layer: PlainLinear, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return nn.functional.linear(x, layer.weight, bias)


class DequantizedExpertsMethod(FusedMoEMethodBase):
    """Routed experts, FP4 or block FP8, that are dequantised while they are loaded."""

    def __init__(self, moe_config: FusedMoEConfig) -> None:
        super().__init__(moe_config)

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        for name, rows, columns in (
            ("w13_weight", 2 * intermediate_size_per_partition, hidden_size),
            ("w2_weight", hidden_size, intermediate_size_per_partition),
        ):
            weight = nn.Parameter(torch.zeros(num_experts, rows, columns, dtype=params_dtype), requires_grad=False)
            layer.register_parameter(name, weight)
            set_weight_attrs(weight, extra)

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> FusedMoEQuantConfig | None:
        return None

    def apply(
        self,
        layer: RoutedExperts,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any = None,
        shared_experts_input: Tensor | None = None,
    ) -> Tensor:
        local = topk_ids if layer.expert_map is None else layer.expert_map[topk_ids.long()]  # -1: on another rank
        return moe.experts(x, layer.w13_weight, layer.w2_weight, topk_weights, local, layer.swiglu_limit)


class V4Router(BaseRouter):
    """sqrtsoftplus routing by score or by token id, through our operators; vLLM's own router needs
    its C++ extension."""

    def __init__(self, config: V4Config, bias: Tensor | None, tid2eid: Tensor | None) -> None:
        super().__init__(top_k=config.num_experts_per_tok, global_num_experts=config.n_routed_experts)
        self.bias, self.tid2eid, self.scaling_factor = bias, tid2eid, config.routed_scaling_factor

    @property
    def routing_method_type(self) -> RoutingMethodType:
        return RoutingMethodType.DeepseekV4

    def _compute_routing(
        self,
        hidden_states: Tensor,
        router_logits: Tensor,
        indices_type: torch.dtype | None,
        *,
        input_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        if self.bias is not None:
            weights, ids = moe.route_topk(router_logits, self.bias, self.top_k, self.scaling_factor)
        else:
            assert self.tid2eid is not None, "a layer routes by score or by token id"
            if input_ids is None:
                raise ValueError("hash routing needs input_ids; embeddings as input cannot be routed")
            weights, ids = moe.route_hash(router_logits, self.tid2eid, input_ids, self.scaling_factor)
        return weights, ids if indices_type is None else ids.to(indices_type)
