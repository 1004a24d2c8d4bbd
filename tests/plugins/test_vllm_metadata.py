# SPDX-License-Identifier: Apache-2.0
"""What vLLM's description of a step becomes for the operators."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from dsv4.ops import plan
from dsv4_vllm.metadata import StateBuilder


@pytest.mark.parametrize(("starts", "shared"), [([0, 1, 2], False), ([0, 1, 3], True), ([0, 8, 12], True)])
def test_rows_may_be_shared_in_every_step_with_more_than_one_token_of_a_request(
    starts: list[int], shared: bool
) -> None:
    """Request 1 of the last batch has hit what request 0 fills in the same step."""
    builder = StateBuilder.__new__(StateBuilder)
    builder.buffers, builder.max_tokens = plan.GraphBuffers(), 16
    builder.kv_cache_spec = SimpleNamespace(block_size=4)
    common = SimpleNamespace(
        query_start_loc=torch.tensor(starts, dtype=torch.int32),
        seq_lens=torch.tensor([8, 12], dtype=torch.int32),
        block_table_tensor=torch.arange(3, dtype=torch.int32).expand(2, -1).contiguous(),
        num_actual_tokens=starts[-1],
        num_reqs=2,
        max_seq_len=12,
        max_query_len=int(torch.tensor(starts).diff().max()),
    )
    assert builder.build(0, common).shared is shared
