# SPDX-License-Identifier: Apache-2.0
"""Open windows as summaries instead of raw rows. Source: docs/model.md, 3.4.

Pooling is a softmax over rows, per channel, so any part of a window can be carried as three numbers
per channel: the largest score, the sum of exponentials and the weighted sum. That is all a request
needs between steps, and all a prefix hit needs at a page end. A summary cannot be taken back: where
drafted tokens may be refused, it ends before them, and their rows are kept beside it.
"""

from dsv4.ops.compressor.summary import reference
from dsv4.ops.compressor.summary.state import SummaryPages, SummaryState
from dsv4.ops.registry import operator

compress = operator("summary.compress", reference.compress, triton="dsv4.ops.compressor.summary.triton:compress")

__all__ = ["SummaryPages", "SummaryState", "compress"]
