# SPDX-License-Identifier: Apache-2.0
"""`dsv4_sglang.draft_ops` beside SGLang's own kernels, in Triton's interpreter: run under
TRITON_INTERPRET=1; prints how many batches were compared.
"""

from __future__ import annotations

import torch
from sglang.kernels.ops.memory.common import get_last_loc_triton
from sglang.kernels.ops.speculative import cache_locs, eagle, spec_tree
from sglang.srt.mem_cache.allocation import assign_req_to_token_pool
from sglang.srt.speculative import eagle_utils
from torch import Tensor

from dsv4_sglang import draft_ops

TABLE = 64
VOCAB = 3  # so that many drafts are right


def of(name: str) -> object:
    """A function that 0.5.22 keeps in another module."""
    return getattr(spec_tree if hasattr(spec_tree, name) else eagle_utils, name)


def same(own: Tensor, theirs: Tensor, what: str) -> None:
    assert torch.equal(own.to(theirs.dtype), theirs), (what, own, theirs)


def compare(count: int, k: int, rng: torch.Generator) -> None:
    n = k + 1
    lengths = torch.randint(0, 40, (count,), generator=rng)
    bonus, drafts = (torch.randint(0, VOCAB, shape, generator=rng) for shape in ((count,), (count, k)))

    # The tree, as SGLang's worker describes a chain.
    parents = torch.arange(-1, (k if k > 1 else 0) - 1).repeat(count, 1)
    selected = torch.arange(k).repeat(count, 1)
    mask = torch.ones(int(lengths.sum()) * n + n * n * count, dtype=torch.bool)
    index, following, sibling = torch.full((3, count, n), -1)
    positions = torch.empty(count * n, dtype=torch.long)
    of("sgl_build_tree_kernel_triton")(
        parents, selected, lengths, mask, positions, index, following, sibling, topk=1, depth=k, draft_token_num=n
    )  # type: ignore[operator]
    tokens = torch.cat([bonus[:, None], drafts], 1)
    own = draft_ops.chain(bonus, parents, selected, drafts, lengths, int(lengths.sum()), 1, k, n)
    for mine, theirs in zip(own, (mask, positions, index, following, sibling, tokens.flatten()), strict=True):
        same(mine, theirs, "tree")

    # What is kept of it.
    target = torch.randint(0, VOCAB, (count, n), generator=rng)

    def outputs() -> list[Tensor]:
        return [
            torch.zeros(count * n, dtype=torch.int32),
            torch.full((count, n), -1, dtype=torch.int32),
            torch.empty(count, dtype=torch.int32),
        ]

    theirs, mine = outputs(), outputs()
    of("verify_tree_greedy_triton")(*theirs, tokens, index, following, sibling, target)  # type: ignore[operator]
    draft_ops.verify(*mine, tokens, index, following, sibling, target)  # type: ignore[arg-type]
    for a, b in zip(mine, theirs, strict=True):
        same(a, b, "verified")
    predicts, accepted, right = theirs
    chosen, lens = predicts[accepted], right + 1
    last, own_last = torch.empty(2, count, dtype=torch.int32)
    eagle.fill_bonus_tokens[(count,)](chosen, lens, last, n)
    draft_ops.last_kept(chosen, lens, own_last, n, count)
    same(own_last, last, "bonus")

    # Where the tokens are kept.
    table = torch.randint(0, 1000, (2 * count, TABLE), generator=rng, dtype=torch.int32)
    rows = torch.randperm(2 * count, generator=rng)[:count]
    places, own_places = torch.empty(2, count * n, dtype=torch.int64)
    cache_locs.assign_draft_cache_locs_contiguous[(count,)](rows, table, lengths, places, TABLE, 1, n)
    draft_ops.DraftPlacesKernel[(count,)](rows, table, lengths, own_places, TABLE, 1, n, BS=count)
    same(own_places, places, "drafted")
    cache_locs.assign_extend_cache_locs_uniform[(count,)](rows, table, lengths, places, TABLE, n)
    same(draft_ops.verified_places(rows, table, lengths, lengths + n, count, n, "cpu"), places, "verified places")
    same(draft_ops.last_places(table, rows, lengths), get_last_loc_triton(table, rows, lengths), "last place")
    ends = lengths + torch.randint(0, 20, (count,), generator=rng)
    new = torch.randint(0, 1000, (int((ends - lengths).sum()),), generator=rng)
    kernel_table = table.clone()
    assign_req_to_token_pool[(count,)](rows, kernel_table, lengths, ends, new, TABLE, 1 << (count - 1).bit_length())
    draft_ops.keep_places(rows, table, lengths, ends, new, count)
    same(table, kernel_table, "request table")


if __name__ == "__main__":
    generator = torch.Generator().manual_seed(0)
    batches = [(count, k) for k in range(1, 8) for count in (1, 3, 8)]
    for each in batches:
        compare(*each, generator)
    print(len(batches))
