# SPDX-License-Identifier: Apache-2.0
"""The compressor with its open windows kept as pooling summaries instead of raw rows. Source: spec section 3.4.

Pooling is a softmax over rows, per channel, so any part of a window can be carried as three numbers per channel: the
largest score, the sum of exponentials and the weighted sum. That is all a request needs between steps, and all a prefix
hit needs at a page end. A summary cannot be taken back, so nothing that rejects tokens may use it.
"""

from collections.abc import Sequence

from torch import Tensor

from dsv4.ops.compressor.summary.state import Pooling
from dsv4.ops.kernels import refuse_triton
from dsv4.ops.pages import BatchView
from dsv4.ops.registry import register, resolve

register("summary.compress", "dsv4.ops.compressor.summary.reference:compress")
register("summary.compress", "dsv4.ops.compressor.summary.triton:compress", "triton", refuse_triton)


def compress(
    poolings: Sequence[Pooling],
    batch: BatchView,
    request_of_token: Tensor,
    positions: Tensor,
    page_tokens: int,
    ratio: int,
    overlap: int,
    eps: float,
    entry_cos_sin: Tensor,
) -> None:
    """Store the entries completed by this step, and carry every request's open windows on. See `reference.compress`."""
    resolve("summary.compress", positions.device)(
        poolings, batch, request_of_token, positions, page_tokens, ratio, overlap, eps, entry_cos_sin
    )


__all__ = ["Pooling", "compress"]
