# SPDX-License-Identifier: Apache-2.0
"""The plan of a captured decode step of SGLang for fewer requests than it was captured for.

That SGLang's own runner pads and replays so is in tests/e2e/test_sglang_graphs.py.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from dsv4_sglang.metadata import V4AttentionBackend

CONTEXT = 2048
PAGE = 256
CAPTURED = (1, 2, 4, 8, 12)


class Pool:
    """Window pages are the full ones in reverse order; page 0 stays nobody's."""

    drafted = 0

    def __init__(self, num_pages: int) -> None:
        loc = torch.arange(num_pages * PAGE)
        self.full_to_swa_index_mapping = torch.where(loc < PAGE, loc, (num_pages - loc // PAGE) * PAGE + loc % PAGE)


def backend(num_slots: int) -> V4AttentionBackend:
    made: Any = object.__new__(V4AttentionBackend)
    pages = CONTEXT // PAGE
    # Slot 0 is nobody's, as SGLang keeps it for padding.
    starts = torch.arange(num_slots)[:, None] * pages * PAGE - (pages - 1) * PAGE
    made.req_to_token = (starts + torch.arange(CONTEXT)).clamp(min=0)
    made.req_to_token[0] = 0
    made.pool = Pool(num_slots * pages + 1)
    made.window, made.context_len, made.ratios, made.ahead = 128, CONTEXT, [4, 128], 0
    made.index_topk, made.ends, made.plan = 16, torch.arange(num_slots + 1, dtype=torch.int32), None
    return made


def running(made: Any, lens: list[int]) -> Any:
    """A decode batch of requests in slots 1, 2, ..."""
    slots, seq_lens = torch.arange(1, len(lens) + 1), torch.tensor(lens)
    return SimpleNamespace(
        forward_mode=ForwardMode.DECODE,
        batch_size=len(lens),
        req_pool_indices=slots,
        seq_lens=seq_lens,
        seq_lens_cpu=seq_lens,
        out_cache_loc=made.req_to_token[slots, seq_lens - 1],
    )


def replayed(batch: Any, bs: int) -> Any:
    """The batch in buffers of the captured size: SGLang pads slots and places with 0, lengths with
    the backend's fill value."""
    raw, fill = batch.batch_size, V4AttentionBackend.get_cuda_graph_seq_len_fill_value(object())  # type: ignore[arg-type]
    return SimpleNamespace(
        forward_mode=ForwardMode.DECODE,
        batch_size=bs,
        req_pool_indices=torch.cat([batch.req_pool_indices, torch.zeros(bs - raw, dtype=torch.long)]),
        seq_lens=torch.cat([batch.seq_lens, torch.full((bs - raw,), fill)]),
        out_cache_loc=torch.cat([batch.out_cache_loc, torch.zeros(bs - raw, dtype=torch.long)]),
    )


@pytest.mark.parametrize("raw", range(1, 13))
def test_padded_rows_write_nowhere_and_the_others_are_as_in_an_eager_step(raw: int) -> None:
    lens = [1, 3, 4, 127, 128, 129, 255, 256, 257, 511, 1024, 2047][:raw]
    made = backend(num_slots=13)
    batch, bs = running(made, lens), next(n for n in CAPTURED if n >= raw)
    made.init_forward_metadata(batch)
    eager = made.plan
    made.init_forward_metadata_in_graph(replayed(batch, bs))
    step = made.plan
    assert step.tokens.valid.tolist() == [True] * raw + [False] * (bs - raw)
    assert (step.window.slot_mapping[raw:] == -1).all()
    assert torch.equal(step.window.slot_mapping[:raw], eager.window.slot_mapping)
    assert torch.equal(step.window.lens[:raw], eager.window.lens)
    for ratio in made.ratios:
        entries, rings = step.entries[ratio], step.rings[ratio]
        assert (entries.slot_mapping[raw:] == -1).all()
        assert (rings.slot_mapping[raw:] == -1).all()
        assert (entries.lens[raw:] == 0).all()
        assert torch.equal(entries.slot_mapping[:raw], eager.entries[ratio].slot_mapping)
        assert torch.equal(entries.lens[:raw], eager.entries[ratio].lens)
        assert torch.equal(rings.slot_mapping[:raw], eager.rings[ratio].slot_mapping)
