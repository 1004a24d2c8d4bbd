# SPDX-License-Identifier: Apache-2.0
"""How V4's FP8 and FP4 weights become SGLang layers.

On a GPU the engine's own methods serve (block FP8 linears, MXFP4 experts in Marlin's layout); here
is what they lack: a CPU method for each, whose weights are plain, wo_a, whose grouped product needs
plain weights on every device, and Marlin's experts without the gate that keeps them
from sm80, sm86 and sm89, where the kernel runs.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.moe.fused_moe_triton import FusedMoE
from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput
from sglang.srt.layers.quantization.base_config import FusedMoEMethodBase, LinearMethodBase, QuantizeMethodBase
from sglang.srt.layers.quantization.fp8 import Fp8Config, Fp8MoEMethod
from sglang.srt.layers.quantization.marlin_utils import check_moe_marlin_supports_layer
from sglang.srt.layers.quantization.marlin_utils_fp4 import prepare_moe_mxfp4_layer_for_marlin
from sglang.srt.layers.quantization.mxfp4_marlin_moe import Mxfp4MarlinMoEMethod
from sglang.srt.platforms import current_platform
from sglang.srt.runtime_context import get_platform
from sglang.srt.utils import set_weight_attrs
from torch import Tensor, nn

from dsv4.errors import Dsv4Error
from dsv4.loading import PlainLinear
from dsv4.model.config import FP4_BLOCK, ExpertDtype
from dsv4.ops import moe


def on_cpu() -> bool:
    """Whether the engine runs on the CPU platform, ours or another."""
    return current_platform.device_type == "cpu"


class V4QuantConfig(Fp8Config):
    """SGLang's FP8 quantisation, with our methods where its own cannot serve."""

    expert_dtype: ExpertDtype = "fp4"

    @classmethod
    def adopt(cls, config: Fp8Config, expert_dtype: ExpertDtype) -> V4QuantConfig:
        """`config`, which SGLang made from config.json, as ours."""
        ours = cls.__new__(cls)
        ours.__dict__.update(config.__dict__)
        ours.expert_dtype, ours.is_fp4_experts = expert_dtype, expert_dtype == "fp4"
        return ours

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [*super().get_supported_act_dtypes(), torch.float32]  # the CPU reference runs in fp32

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, LinearBase) and (on_cpu() or prefix.endswith(".wo_a")):
            return DequantizedLinearMethod()
        if isinstance(layer, FusedMoE):
            if on_cpu():
                return DequantizedExpertsMethod()
            if self.expert_dtype == "fp4":
                return UngatedMarlinExpertsMethod(Fp8MoEMethod(self), prefix=prefix)
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
        data = torch.empty(sum(output_partition_sizes), input_size_per_partition, dtype=params_dtype)
        weight = nn.Parameter(data, requires_grad=False)
        layer.register_parameter("weight", weight)
        set_weight_attrs(weight, {"input_dim": 1, "output_dim": 0, **extra_weight_attrs})

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        pass

    def apply(self, layer: PlainLinear, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return nn.functional.linear(x, layer.weight, bias)


class DequantizedExpertsMethod(FusedMoEMethodBase):
    """Routed experts, FP4 or block FP8, that are dequantised while they are loaded."""

    def create_weights(
        self,
        layer: FusedMoE,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        for name, rows, columns in (
            ("w13_weight", 2 * intermediate_size_per_partition, hidden_size),
            ("w2_weight", hidden_size, intermediate_size_per_partition),
        ):
            weight = nn.Parameter(torch.zeros(num_experts, rows, columns, dtype=params_dtype), requires_grad=False)
            layer.register_parameter(name, weight)
            set_weight_attrs(weight, extra_weight_attrs)

    def process_weights_after_loading(self, layer: FusedMoE) -> None:
        pass

    def create_moe_runner(self, layer: FusedMoE, moe_runner_config: Any) -> None:
        self.swiglu_limit = moe_runner_config.swiglu_limit

    def apply(self, layer: FusedMoE, dispatch_output: Any) -> StandardCombineInput:
        weights, ids, _ = dispatch_output.topk_output  # ids are local, -1 for experts of other ranks
        out = moe.experts(
            dispatch_output.hidden_states, layer.w13_weight, layer.w2_weight, weights, ids, self.swiglu_limit
        )
        return StandardCombineInput(hidden_states=out)


def fuse_activation() -> None:
    """Marlin's experts activate with our kernel where SGLang has none, which is everywhere but on
    sm90: there it takes five kernels, and rounds to bf16 between them.

    Until `swiglu_limit_func` is one kernel on every GPU; then delete.
    """
    from sglang.srt.layers.moe.fused_moe_triton import fused_marlin_moe  # on a CPU nobody needs it

    original = fused_marlin_moe.swiglu_limit_func
    if hasattr(original, "own") or get_platform().is_sm90:
        return

    def activate(output: Tensor, input: Tensor, swiglu_limit: float = 0.0) -> None:  # noqa: A002  SGLang's name
        if swiglu_limit > 0:
            gate, up = input.chunk(2, -1)
            output.copy_(moe.swiglu(gate, up, swiglu_limit))
        else:
            original(output, input, swiglu_limit)

    activate.own = original  # type: ignore[attr-defined]
    fused_marlin_moe.swiglu_limit_func = activate


class UngatedMarlinExpertsMethod(Mxfp4MarlinMoEMethod, FusedMoEMethodBase):
    """SGLang's MXFP4 Marlin experts from sm80 on.

    Not run: no such GPU was at hand. tests/plugins/test_sglang_quant.py shows what its kernels
    would be handed. Until SGLang's `process_weights_after_loading` lets Ampere and Ada through
    (sglang#33589); then delete.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        fuse_activation()

    def process_weights_after_loading(self, layer: FusedMoE) -> None:
        self._fp8.process_weights_after_loading(layer)
        if not check_moe_marlin_supports_layer(layer, FP4_BLOCK, allow_tile_padding=True):
            size, width = layer.hidden_size, layer.intermediate_size_per_partition
            raise Dsv4Error(
                f"{self.prefix}: Marlin has no tile for experts of {size} x {width}; use a smaller --tp-size"
            )
        prepare_moe_mxfp4_layer_for_marlin(layer)
        layer._dsv4_mxfp4_backend = "marlin"  # what SGLang's own method leaves for its readers
