# SPDX-License-Identifier: Apache-2.0
"""Whose token is which."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4.ops.pages import BatchView
from dsv4.ops.plan.room import Room


@dataclass(frozen=True)
class TokenPlan:
    """request_of_token: [T] int32; positions: [T] int64; valid: [T] bool, false for padding."""

    request_of_token: Tensor
    positions: Tensor
    valid: Tensor

    @classmethod
    def empty(cls, room: Room) -> TokenPlan:
        """Memory for a step's."""
        return cls(
            room.per_token("request_of_token"),
            room.per_token("positions", dtype=torch.int64),
            room.per_token("valid", dtype=torch.bool),
        )

    def fill(self, given: TokenPlan) -> None:
        """Copy another."""
        self.request_of_token.copy_(given.request_of_token)
        self.positions.copy_(given.positions)
        self.valid.copy_(given.valid)


@dataclass(frozen=True)
class Homes:
    """Where an engine keeps each token, if it gives padding a place too.

    at: [T] int; first: the first place that is somebody's
    """

    at: Tensor
    first: int


def plan_tokens(batch: BatchView, homes: Homes | None = None) -> TokenPlan:
    """Which request each token belongs to, and its position. Padding tokens get the last request
    and are not valid; nor is a token whose home is nobody's."""
    index = torch.arange(batch.num_tokens, device=batch.seq_lens.device, dtype=torch.int32)
    ends = batch.query_start_loc[1 : batch.num_reqs + 1]
    request = torch.searchsorted(ends, index, right=True).clamp_(max=batch.num_reqs - 1)
    valid = index < ends[-1]
    positions = torch.where(valid, batch.seq_lens[request] - ends[request] + index, 0).long()
    if homes is not None:
        valid = valid & (homes.at[: batch.num_tokens] >= homes.first)
    return TokenPlan(request.int(), positions, valid)
