# SPDX-License-Identifier: Apache-2.0
"""Attention over the window, the visible compressed entries and a sink. Source: spec sections 3.2, 3.6 and 3.7."""

from torch import Tensor

from dsv4.ops.attention.vendor import refuse_flash_mla
from dsv4.ops.kernels import refuse_triton
from dsv4.ops.pages import Pages
from dsv4.ops.registry import register, resolve

register("attention.norm_rope_store", "dsv4.ops.attention.reference:norm_rope_store")
register("attention.sparse", "dsv4.ops.attention.reference:sparse_attention")
register("attention.output_a", "dsv4.ops.attention.reference:output_a")
register("attention.norm_rope_store", "dsv4.ops.attention.triton:norm_rope_store", "triton", refuse_triton)
register("attention.sparse", "dsv4.ops.attention.triton:sparse_attention", "triton", refuse_triton)
register("attention.sparse", "dsv4.ops.attention.vendor:flash_mla", "vendor-flashmla", refuse_flash_mla)
register("attention.output_a", "dsv4.ops.attention.triton:output_a", "triton", refuse_triton)


def norm_rope_store(q: Tensor, kv: Tensor, kv_weight: Tensor, eps: float, cos_sin: Tensor, window: Pages, slots: Tensor) -> Tensor:
    """Normalise and rotate q and kv, and write kv into the window cache. See `reference.norm_rope_store`."""
    return resolve("attention.norm_rope_store", q.device)(q, kv, kv_weight, eps, cos_sin, window, slots)


def sparse_attention(
    q: Tensor,
    window: Pages,
    window_slots: Tensor,
    window_lens: Tensor,
    entries: Pages | None,
    entry_slots: Tensor | None,
    entry_row: Tensor | None,
    entry_lens: Tensor | None,
    sink: Tensor,
    rope_dim: int,
    cos_sin: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend to the window and the given compressed entries. See `reference.sparse_attention`."""
    return resolve("attention.sparse", q.device)(
        q, window, window_slots, window_lens, entries, entry_slots, entry_row, entry_lens, sink, rope_dim, cos_sin
    )


def output_a(o: Tensor, cos_sin: Tensor | None, wo_a: Tensor) -> Tensor:
    """Rotate back and apply the grouped first output projection. See `reference.output_a`."""
    return resolve("attention.output_a", o.device)(o, cos_sin, wo_a)
