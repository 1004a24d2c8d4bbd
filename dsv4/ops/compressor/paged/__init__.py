# SPDX-License-Identifier: Apache-2.0
"""Open windows as raw rows in pages. Source: docs/model.md, 3.4."""

from dsv4.ops.compressor.paged import reference
from dsv4.ops.compressor.paged.state import PagedState
from dsv4.ops.registry import operator

_TRITON = "dsv4.ops.compressor.paged.triton"
save_state = operator("compressor.save_state", reference.save_state, triton=f"{_TRITON}:save_state")
compress_store = operator("compressor.compress_store", reference.compress_store, triton=f"{_TRITON}:compress_store")
update = operator("compressor.update", reference.update, triton=f"{_TRITON}:update")

__all__ = ["PagedState", "compress_store", "save_state", "update"]
