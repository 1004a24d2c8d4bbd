# SPDX-License-Identifier: Apache-2.0
"""How many requests SGLang's own allocator holds at once, on a CPU: `python sglang_capacity.py <
cases.json > held.json`.

A case is a `Case` as a dictionary; the answer is a list of numbers. Each request is admitted by
SGLang's `SWAPrefillBudget`, prefilled in chunks and decoded to its full length before the next;
window slots are freed where the scheduler frees them, by `free_swa_out_of_window_slots`. Pages are
numbers, no cache is allocated.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

PAGE = 256
WINDOW = 128
DECODED = 2 * PAGE + 16  # past the page of its prompt's end, so that every request's prefill is settled


@dataclass(frozen=True, kw_only=True)
class Case:
    """Requests of `context` tokens in a pool of `full_tokens`, windows having the share `ratio`."""

    full_tokens: int
    ratio: float
    context: int
    chunk: int
    overlap: bool
    drafts: int

    @property
    def window_tokens(self) -> int:
        return int(self.full_tokens * self.ratio) // PAGE * PAGE

    @property
    def written_ahead(self) -> int:
        """`get_alloc_reserve_per_decode`: twice what a step writes, with a draft."""
        return 2 * (self.drafts + 1) if self.drafts else 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Pool:
    """SGLang's allocator over numbers, and the slots of the requests it holds."""

    def __init__(self, case: Case) -> None:
        import torch
        from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator
        from sglang.srt.mem_cache.base_swa_memory_pool import BaseSWAKVPool

        nothing = {name: lambda self, *a, **k: None for name in BaseSWAKVPool.__abstractmethods__}

        def translate(pool: Any, slots: Any) -> Any:
            return pool.full_to_swa_index_mapping[slots]

        def register(pool: Any, mapping: Any) -> None:
            pool.full_to_swa_index_mapping = mapping

        methods = {**nothing, "translate_loc_from_full_to_swa": translate, "register_mapping": register}
        tree = SimpleNamespace(sliding_window_size=WINDOW, swa_evictable_size=lambda: 0, full_evictable_size=lambda: 0)
        kvcache = object.__new__(type("Slots", (BaseSWAKVPool,), methods))
        self.torch = torch
        self.case = case
        self.allocator = SWATokenToKVPoolAllocator(
            case.full_tokens // PAGE * PAGE, case.window_tokens, PAGE, torch.uint8, "cpu", kvcache, need_sort=False
        )
        self.budget = self.allocator.create_prefill_budget(tree)

    def holds(self, number: int) -> bool:
        """Prefill request `number` and decode it to its end, anywhere in its last page."""
        from sglang.srt.managers.schedule_batch import ReqKvInfo

        case, torch = self.case, self.torch
        end = case.context - number * 97 % PAGE
        rows = SimpleNamespace(req_to_token=torch.zeros((1, end + 2 * PAGE), dtype=torch.int64))
        req = SimpleNamespace(kv=ReqKvInfo(req_pool_idx=0))
        fits, limit = self.budget.check_prefill(
            extend_input_len=end - DECODED,
            total_tokens=end + PAGE,
            max_new_tokens=DECODED,
            input_tokens=end - DECODED,
            swa_host_hit_length=0,
            chunk_limit=case.chunk,
        )
        if not fits:
            return False
        length, in_flight = 0, 0
        while length < end - DECODED:
            self._evict(req, rows, length - in_flight)
            available = self.budget.available_chunk_tokens(limit)
            if available is None and in_flight:
                in_flight = 0  # it waits for the chunk before
                continue
            if available is None:
                return False
            chunk = min(available, end - DECODED - length)
            if not self._grow(rows, length, length + chunk):
                return False
            length += chunk
            in_flight = chunk if case.overlap else 0
        allocated = length
        while length < end:
            self._evict(req, rows, length)
            length += 1
            wanted = -(-(length + case.written_ahead) // PAGE) * PAGE if case.drafts else length
            if wanted > allocated and not self._grow(rows, allocated, wanted):
                return False
            allocated = max(allocated, wanted)
        return True

    def _grow(self, rows: Any, start: int, stop: int) -> bool:
        torch = self.torch
        last = rows.req_to_token[0, start - 1 : start] if start else torch.tensor([-1])
        before, after = torch.tensor([start]), torch.tensor([stop])
        out = self.allocator.alloc_extend(before, before, after, after, last, stop - start)
        if out is None:
            return False
        rows.req_to_token[0, start:stop] = out
        return True

    def _evict(self, req: Any, rows: Any, settled: int) -> None:
        from sglang.srt.mem_cache.common import free_swa_out_of_window_slots

        free_swa_out_of_window_slots(
            req,
            settled,
            sliding_window_size=WINDOW,
            page_size=PAGE,
            req_to_token_pool=rows,
            token_to_kv_pool_allocator=self.allocator,
            eviction_interval=WINDOW,
        )


def main() -> None:
    cases = [Case(**case) for case in json.load(sys.stdin)]
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from dsv4.probe import torchvision

    torchvision.allow_absent()
    held = []
    for case in cases:
        pool, number = Pool(case), 0
        while pool.holds(number):
            number += 1
        held.append(number)
    json.dump(held, out)
    out.flush()


if __name__ == "__main__":
    main()
