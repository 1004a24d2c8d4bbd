# SPDX-License-Identifier: Apache-2.0
"""Attention over the window, the visible compressed entries and a sink. Source: docs/model.md, 3.2,
3.6 and 3.7."""

from dsv4.ops.attention import reference
from dsv4.ops.registry import operator

norm_rope_store = operator(
    "attention.norm_rope_store", reference.norm_rope_store, triton="dsv4.ops.attention.triton:norm_rope_store"
)
sparse_attention = operator(
    "attention.sparse", reference.sparse_attention, triton="dsv4.ops.attention.triton:sparse_attention"
)
output_a = operator("attention.output_a", reference.output_a, triton="dsv4.ops.attention.triton:output_a")

__all__ = ["norm_rope_store", "output_a", "sparse_attention"]
