# SPDX-License-Identifier: Apache-2.0
"""Plain-PyTorch reference of the router and the experts. Source: docs/model.md, 3.8."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dsv4.ops.quant.reference import dequantize_e2m1

SUM_EPS = 1e-20  # HF's: where all chosen scores underflow, the weights are 0 and not 0 / 0


def scores(logits: Tensor) -> Tensor:
    """sqrt(softplus(logits)) in fp32; softplus as max(x, 0) + log1p(exp(-|x|))."""
    x = logits.float()
    return torch.sqrt(x.clamp(min=0) + torch.log1p(torch.exp(-x.abs())))


def _weigh(score: Tensor, ids: Tensor, scaling_factor: float) -> Tensor:
    weights = score.gather(1, ids.long())
    return weights / (weights.sum(-1, keepdim=True) + SUM_EPS) * scaling_factor


def route_topk(logits: Tensor, bias: Tensor, top_k: int, scaling_factor: float) -> tuple[Tensor, Tensor]:
    """The `top_k` experts of largest score + bias; the bias steers the choice and never enters the
    weights.

    logits: [T, E]; bias: [E] fp32. Returns weights [T, top_k] fp32 that sum to scaling_factor (to
    less where scores come near SUM_EPS), and ids [T, top_k] int32.
    """
    score = scores(logits)
    ids = torch.topk(score + bias, top_k, dim=-1).indices
    return _weigh(score, ids, scaling_factor), ids.int()


def route_hash(logits: Tensor, tid2eid: Tensor, input_ids: Tensor, scaling_factor: float) -> tuple[Tensor, Tensor]:
    """The experts that the table gives each token id; their weights still depend on the token's
    scores.

    logits: [T, E]; tid2eid: [V, top_k] int; input_ids: [T]. Returns as `route_topk`.
    """
    ids = tid2eid[input_ids]
    return _weigh(scores(logits), ids, scaling_factor), ids.int()


def swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """silu(min(gate, limit)) * clamp(up, -limit, limit), in fp32, rounded to the input's dtype;
    gate has no lower bound."""
    return (F.silu(gate.float().clamp(max=limit)) * up.float().clamp(-limit, limit)).to(gate.dtype)


def experts(
    x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, ids: Tensor, limit: float, out_dtype: torch.dtype | None = None
) -> Tensor:
    """sum_k weights[t, k] * expert_{ids[t, k]}(x[t]), summed in fp32.

    x: [T, D]; w13: [E, 2I, D], gate rows first; w2: [E, D, I]; weights: [T, K] fp32; ids: [T, K]
    int, -1 for an expert that lives elsewhere. Returns [T, D] in x's dtype, or in out_dtype.
    """
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for e in ids.unique().tolist():
        if e < 0:
            continue
        token, k = (ids == e).nonzero(as_tuple=True)
        gate, up = (x[token] @ w13[e].T).chunk(2, -1)
        y = swiglu(gate, up, limit) @ w2[e].T
        out.index_add_(0, token, y.float() * weights[token, k, None])
    return out.to(out_dtype or x.dtype)


def experts_mxfp4(
    x: Tensor, w13: Tensor, s13: Tensor, w2: Tensor, s2: Tensor, weights: Tensor, ids: Tensor, limit: float
) -> Tensor:
    """`experts` with packed weights, decoded to x's dtype (exactly in bf16) one expert at a time.

    w13: e2m1 bytes [E, 2I, D / 2], gate rows first; s13: ue8m0 bytes [E, 2I, D / 32]; w2: [E, D, I
    / 2]; s2: [E, D, I / 32].
    """
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for e in ids.unique().tolist():
        if e < 0:
            continue
        mine = torch.where(ids == e, 0, -1)
        one = slice(e, e + 1)
        dense13, dense2 = dequantize_e2m1(w13[one], s13[one]).to(x.dtype), dequantize_e2m1(w2[one], s2[one]).to(x.dtype)
        out += experts(x, dense13, dense2, weights, mine, limit, out_dtype=torch.float32)
    return out.to(x.dtype)
