# SPDX-License-Identifier: Apache-2.0
"""Routing by score or by token id, and the experts. Source: spec section 3.8."""

from torch import Tensor

from dsv4.ops.kernels import refuse_mxfp4_experts, refuse_triton
from dsv4.ops.registry import register, resolve

register("moe.route_topk", "dsv4.ops.moe.reference:route_topk")
register("moe.route_hash", "dsv4.ops.moe.reference:route_hash")
register("moe.experts", "dsv4.ops.moe.reference:experts")
register("moe.experts_mxfp4", "dsv4.ops.moe.reference:experts_mxfp4")
register("moe.swiglu", "dsv4.ops.moe.reference:swiglu")
register("moe.route_topk", "dsv4.ops.moe.triton:route_topk", "triton", refuse_triton)
register("moe.route_hash", "dsv4.ops.moe.triton:route_hash", "triton", refuse_triton)
register("moe.experts_mxfp4", "dsv4.ops.moe.triton:experts_mxfp4", "triton", refuse_mxfp4_experts)
register("moe.swiglu", "dsv4.ops.moe.triton:swiglu", "triton", refuse_triton)


def route_topk(logits: Tensor, bias: Tensor, top_k: int, scaling_factor: float) -> tuple[Tensor, Tensor]:
    """Choose experts by score plus bias. See `reference.route_topk`."""
    return resolve("moe.route_topk", logits.device)(logits, bias, top_k, scaling_factor)


def route_hash(logits: Tensor, tid2eid: Tensor, input_ids: Tensor, scaling_factor: float) -> tuple[Tensor, Tensor]:
    """Choose experts by token id. See `reference.route_hash`."""
    return resolve("moe.route_hash", logits.device)(logits, tid2eid, input_ids, scaling_factor)


def swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """Clamped SwiGLU. See `reference.swiglu`."""
    return resolve("moe.swiglu", gate.device)(gate, up, limit)


def experts(x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, ids: Tensor, limit: float) -> Tensor:
    """Weighted sum of the chosen experts. See `reference.experts`."""
    return resolve("moe.experts", x.device)(x, w13, w2, weights, ids, limit)


def experts_mxfp4(x: Tensor, w13: Tensor, s13: Tensor, w2: Tensor, s2: Tensor, weights: Tensor, ids: Tensor, limit: float) -> Tensor:
    """Weighted sum of the chosen experts, from packed weights. See `reference.experts_mxfp4`."""
    return resolve("moe.experts_mxfp4", x.device)(x, w13, s13, w2, s2, weights, ids, limit)
