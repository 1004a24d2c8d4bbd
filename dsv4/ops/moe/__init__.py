# SPDX-License-Identifier: Apache-2.0
"""Routing by score or by token id, and the experts. Source: docs/model.md, 3.8."""

from dsv4.ops.kernels import refuse_mxfp4_experts
from dsv4.ops.moe import reference
from dsv4.ops.registry import operator

route_topk = operator("moe.route_topk", reference.route_topk, triton="dsv4.ops.moe.triton:route_topk")
route_hash = operator("moe.route_hash", reference.route_hash, triton="dsv4.ops.moe.triton:route_hash")
experts = operator("moe.experts", reference.experts)
experts_mxfp4 = operator(
    "moe.experts_mxfp4",
    reference.experts_mxfp4,
    triton="dsv4.ops.moe.triton:experts_mxfp4",
    refuse=refuse_mxfp4_experts,
)
swiglu = operator("moe.swiglu", reference.swiglu, triton="dsv4.ops.moe.triton:swiglu")

__all__ = ["experts", "experts_mxfp4", "route_hash", "route_topk", "swiglu"]
