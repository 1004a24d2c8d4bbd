# SPDX-License-Identifier: Apache-2.0
"""Where a step's plan lies."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.ops.pages import BatchView


class Room:
    """Memory for one step's plan, which asks for each name once: new every time."""

    def __init__(self, batch: BatchView) -> None:
        self.num_tokens, self.num_reqs, self.device = batch.num_tokens, batch.num_reqs, batch.device

    def per_token(self, name: str, *columns: int, dtype: torch.dtype = torch.int32) -> Tensor:
        """[T, *columns], with anything in it."""
        return torch.empty(self.num_tokens, *columns, dtype=dtype, device=self.device)

    def per_request(self, name: str, *columns: int, dtype: torch.dtype = torch.int32) -> Tensor:
        """[R, *columns], with anything in it."""
        return torch.empty(self.num_reqs, *columns, dtype=dtype, device=self.device)


class GraphBuffers:
    """Buffers that keep their address and shape from step to step, as a captured CUDA graph needs:
    rows for the longest step, and for the most requests."""

    def __init__(self, max_tokens: int, max_reqs: int) -> None:
        self.max_tokens, self.max_reqs = max_tokens, max_reqs
        self._buffers: dict[str, Tensor] = {}

    def room(self, batch: BatchView) -> Room:
        """The first rows of the buffers, for one step. Raises ValueError where there are not so
        many."""
        return _Kept(batch, self)

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """The buffer `name`; zeros at first."""
        if name not in self._buffers:
            self._buffers[name] = torch.zeros(shape, dtype=dtype, device=device)
        return self._buffers[name]


class _Kept(Room):
    def __init__(self, batch: BatchView, buffers: GraphBuffers) -> None:
        super().__init__(batch)
        self.buffers = buffers

    def per_token(self, name: str, *columns: int, dtype: torch.dtype = torch.int32) -> Tensor:
        shape = self.buffers.max_tokens, *columns
        return self._first(name, self.num_tokens, self.buffers.take(name, shape, dtype, self.device))

    def per_request(self, name: str, *columns: int, dtype: torch.dtype = torch.int32) -> Tensor:
        shape = self.buffers.max_reqs, *columns
        return self._first(name, self.num_reqs, self.buffers.take(name, shape, dtype, self.device))

    def _first(self, name: str, rows: int, buffer: Tensor) -> Tensor:
        if rows > buffer.shape[0]:
            raise ValueError(f"{name}: {rows} rows do not fit the {buffer.shape[0]} planned for this deployment")
        return buffer[:rows]
