# SPDX-License-Identifier: Apache-2.0
"""The compressor with its open windows kept as pooling summaries instead of raw rows. Source: spec section 3.4.

Pooling is a softmax over rows, per channel, so any part of a window can be carried as three numbers per channel: the
largest score, the sum of exponentials and the weighted sum. That is all a request needs between steps, and all a prefix
hit needs at a page end. A summary cannot be taken back, so nothing that rejects tokens may use it.
"""

from torch import Tensor

from dsv4.ops.pages import BatchView, Pages
from dsv4.ops.registry import register, resolve

register("summary.compress", "dsv4.ops.summary.reference:compress")


def compress(
    kv: Tensor,
    gate: Tensor,
    ape: Tensor,
    batch: BatchView,
    request_of_token: Tensor,
    positions: Tensor,
    state: Tensor,
    state_page: Tensor,
    tail: Tensor | None,
    block_table: Tensor,
    page_tokens: int,
    entry_slots: Tensor,
    ratio: int,
    overlap: int,
    norm_weight: Tensor,
    eps: float,
    entry_cos_sin: Tensor,
    cache: Pages,
) -> None:
    """Store the entries completed by this step, and carry every request's open windows on. See `reference.compress`."""
    resolve("summary.compress", kv.device)(
        kv, gate, ape, batch, request_of_token, positions, state, state_page, tail, block_table, page_tokens, entry_slots,
        ratio, overlap, norm_weight, eps, entry_cos_sin, cache,
    )  # fmt: skip
