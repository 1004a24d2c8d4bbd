# SPDX-License-Identifier: Apache-2.0
"""Pooling of 4 (CSA) or 128 (HCA) tokens into one cache entry. Source: spec section 3.4."""

from collections.abc import Sequence

from torch import Tensor

from dsv4.ops.compressor.paged.state import Pooling
from dsv4.ops.kernels import refuse_triton
from dsv4.ops.pages import Pages
from dsv4.ops.registry import register, resolve

register("compressor.save_state", "dsv4.ops.compressor.paged.reference:save_state")
register("compressor.compress_store", "dsv4.ops.compressor.paged.reference:compress_store")
register("compressor.update", "dsv4.ops.compressor.paged.reference:update")
register("compressor.save_state", "dsv4.ops.compressor.paged.triton:save_state", "triton", refuse_triton)
register("compressor.compress_store", "dsv4.ops.compressor.paged.triton:compress_store", "triton", refuse_triton)
register("compressor.update", "dsv4.ops.compressor.paged.triton:update", "triton", refuse_triton)


def save_state(kv: Tensor, gate: Tensor, ape: Tensor, positions: Tensor, state: Pages, slots: Tensor) -> None:
    """Keep each token's raw contribution until its windows are pooled. See `reference.save_state`."""
    resolve("compressor.save_state", kv.device)(kv, gate, ape, positions, state, slots)


def compress_store(
    state: Pages,
    state_block_table: Tensor,
    request_of_token: Tensor,
    positions: Tensor,
    entry_slots: Tensor,
    ratio: int,
    overlap: int,
    norm_weight: Tensor,
    eps: float,
    entry_cos_sin: Tensor,
    cache: Pages,
) -> None:
    """Pool, normalise, rotate, quantise and store the entries completed by this step. See `reference.compress_store`."""
    resolve("compressor.compress_store", positions.device)(
        state, state_block_table, request_of_token, positions, entry_slots, ratio, overlap, norm_weight, eps, entry_cos_sin, cache
    )


def update(
    poolings: Sequence[Pooling], positions: Tensor, request_of_token: Tensor, overlap: int, eps: float, entry_cos_sin: Tensor
) -> None:
    """`save_state` and `compress_store` of all caches of a layer in one. See `reference.update`."""
    resolve("compressor.update", positions.device)(poolings, positions, request_of_token, overlap, eps, entry_cos_sin)


__all__ = ["Pooling", "compress_store", "save_state", "update"]
