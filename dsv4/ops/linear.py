# SPDX-License-Identifier: Apache-2.0
"""The one product that both engines' linears do not offer: low-precision operands, fp32 result."""

import torch
from torch import Tensor
from torch.nn import functional as F


def linear_fp32(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight^T accumulated and returned in fp32: x [T, K], weight [N, K]. Source:
    docs/model.md, 4.2, compressor and gate."""
    if x.is_cuda and x.dtype is not torch.float32:
        return torch.mm(x, weight.T, out_dtype=torch.float32)
    return F.linear(x.float(), weight.float())
