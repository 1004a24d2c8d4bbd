# SPDX-License-Identifier: Apache-2.0
"""What SGLang's EAGLE worker has only as kernels of a GPU, in plain PyTorch, for one chain of
drafts per request. Imported only on a CPU, where SGLang refuses these functions or would launch
Triton.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.layers.sampler import top_k_top_p_min_p_sampling_from_probs_torch
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang.srt.runtime_context import get_parallel
from torch import Tensor

_COMMON = "sglang.srt.speculative.eagle_worker_common"
_ALLOCATION = "sglang.srt.mem_cache.allocation"
_UTILS = "sglang.srt.speculative.eagle_utils"


# Of the step whose drafts are being verified, where a request samples: its sampling parameters, and
# the logits that SGLang then changes in place.
_SAMPLED: list[tuple[Any, Tensor]] = []


def install() -> None:
    """Put these in place of SGLang's own, in this process. Safe to call twice."""
    from sglang.srt.speculative import eagle_worker_common

    places: tuple[str, Any] = ("assign_draft_cache_locs_contiguous_func", draft_places)
    if not hasattr(eagle_worker_common, places[0]):
        places = ("assign_draft_cache_locs_contiguous", DraftPlacesKernel)  # 0.5.22 launches its kernel itself
    for target, own in (
        (f"{_UTILS}.build_tree_kernel_efficient", chain),
        (f"{_UTILS}.verify_tree_greedy_func", verify),
        (f"{_UTILS}._verify_uses_greedy", always),
        (f"{_COMMON}.fill_bonus_tokens_func", last_kept),
        (f"{_COMMON}.{places[0]}", places[1]),
        (f"{_ALLOCATION}.get_last_loc", last_places),
        (f"{_ALLOCATION}.assign_req_to_token_pool_func", keep_places),
    ):
        if target not in HookRegistry._patched:
            HookRegistry.register(target, own, HookType.REPLACE)
    if (target := f"{_UTILS}.eagle_sample") not in HookRegistry._patched:
        HookRegistry.register(target, sample, HookType.AROUND)
    HookRegistry.apply_hooks()


def chain(
    bonus_tokens: Tensor,
    parent_list: Any,
    top_scores_index: Any,
    draft_tokens: Tensor,
    seq_lens: Tensor,
    seq_lens_sum: int,
    topk: int,
    spec_steps: int,
    num_verify_tokens: int,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, ...]:
    """SGLang's `build_tree_kernel_efficient` where each token has one successor: mask, positions,
    places in the batch, the token after each (by its place in the request), its sibling, tokens.

    The mask is which rows each row attends, of its request's whole text; V4 attends by position and
    reads none.
    """
    assert (topk, num_verify_tokens) == (1, spec_steps + 1), "dsv4 verifies one chain of drafts"
    count, n = seq_lens.numel(), num_verify_tokens
    tokens = torch.cat([bonus_tokens[:, None], draft_tokens], 1).flatten()
    at = torch.arange(n, device=seq_lens.device)
    positions = (seq_lens[:, None] + at).flatten().long()
    index = torch.arange(count * n, device=seq_lens.device).view(count, n)
    following = torch.where(at + 1 < n, at + 1, -1).expand(count, n).contiguous()
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    masks = [torch.cat([causal.new_ones(n, length), causal], 1).flatten() for length in seq_lens.tolist()]
    return torch.cat(masks), positions, index, following, torch.full_like(index, -1), tokens


def always(**kwargs: Any) -> bool:
    """SGLang's `_verify_uses_greedy`: whether `verify` takes the logits, which on a CPU it does
    where requests sample, too."""
    return True


def sample(
    original: Callable[..., Any], verify_input: Any, batch: Any, logits_output: Any, *args: Any, **kw: Any
) -> Any:
    """SGLang's `eagle_sample`, with what `verify` needs where a request samples."""
    _SAMPLED.clear()
    if not batch.forward_mode.is_idle() and not batch.sampling_info.is_all_greedy:
        _SAMPLED.append((batch.sampling_info, logits_output.next_token_logits))
    try:
        return original(verify_input, batch, logits_output, *args, **kw)
    finally:
        _SAMPLED.clear()


def draw(info: Any, logits: Tensor, rows: int) -> Tensor:
    """A token of each row's distribution, by the parameters of its request, which has `rows` rows.

    A draft is kept where it is the token drawn, so that whatever is drafted, each token is drawn
    from the backbone's distribution behind the ones before it.
    """
    each = {name: getattr(info, name).repeat_interleave(rows, 0) for name in ("top_ks", "top_ps", "min_ps")}
    probs = (logits.float() / info.temperatures.repeat_interleave(rows, 0)).softmax(-1)
    drawn: Tensor = top_k_top_p_min_p_sampling_from_probs_torch(
        probs, **each, need_min_p_sampling=info.need_min_p_sampling, sampling_seed=None, positions=torch.empty(0)
    )
    if get_parallel().tp_size > 1:
        get_parallel().tp_group.broadcast(drawn, src=0)
    return drawn.view(-1, rows)


def verify(
    predicts: Tensor,
    accept_index: Tensor,
    accept_token_num: Tensor,
    candidates: Tensor,
    retrieve_index: Tensor,
    retrieve_next_token: Tensor,
    retrieve_next_sibling: Tensor,
    target_predict: Tensor,
    topk: int = -1,
) -> tuple[Tensor, Tensor, Tensor]:
    """SGLang's `verify_tree_greedy_func` of a chain: drafts are kept as far as each is what the
    backbone chose.

    candidates, target_predict: [R, n], the tokens of each row and what the backbone makes of it
    predicts: [R * n], accept_index: [R, n], accept_token_num: [R]; written
    """
    count, n = candidates.shape
    if _SAMPLED:
        target_predict = draw(*_SAMPLED[0], rows=n)
    right = (candidates[:, 1:] == target_predict[:, :-1]).int().cumprod(1).sum(1)
    at = torch.arange(n, device=candidates.device)
    kept = at <= right[:, None]
    accept_index[:] = torch.where(kept, retrieve_index.view(count, n), -1).to(accept_index.dtype)
    predicts[retrieve_index.view(count, n)[kept]] = target_predict[kept].to(predicts.dtype)
    accept_token_num[:] = right.to(accept_token_num.dtype)
    return predicts, accept_index, accept_token_num


def last_kept(
    accept_tokens: Tensor, accept_lens: Tensor, bonus_tokens: Tensor, accept_stride: int, batch_size: int
) -> None:
    """SGLang's `fill_bonus_tokens_func`: the last token that each request keeps."""
    rows = accept_tokens.view(batch_size, accept_stride)
    bonus_tokens[:] = rows.gather(1, accept_lens.long()[:, None] - 1)[:, 0].to(bonus_tokens.dtype)


def draft_places(
    req_pool_indices: Tensor,
    req_to_token: Tensor,
    seq_lens: Tensor,
    out_cache_loc: Tensor,
    topk: int,
    num_cols: int,
    positions: Tensor | None = None,
    mrope: Tensor | None = None,
) -> None:
    """SGLang's `assign_draft_cache_locs_contiguous_func`: where the tokens behind each request's
    last one are kept."""
    assert positions is mrope is None, "SGLang asks for these on a GPU alone"
    columns = seq_lens.long()[:, None] + torch.arange(topk * num_cols)
    out_cache_loc[:] = req_to_token[req_pool_indices.long()[:, None], columns].flatten().to(out_cache_loc.dtype)


class DraftPlacesKernel:
    """`draft_places`, launched as 0.5.22 launches its kernel. Delete with 0.5.22."""

    def __class_getitem__(cls, grid: tuple[int, ...]) -> Any:
        def launch(
            req_pool_indices: Tensor,
            req_to_token: Tensor,
            seq_lens: Tensor,
            out_cache_loc: Tensor,
            width: int,
            topk: int,
            num_cols: int,
            **kwargs: Any,
        ) -> None:
            draft_places(req_pool_indices, req_to_token, seq_lens, out_cache_loc, topk, num_cols)

        return launch


def last_places(req_to_token: Tensor, requests: Tensor, lengths: Tensor) -> Tensor:
    """SGLang's `get_last_loc`: where each request's last token is kept, -1 for none."""
    return torch.where(lengths > 0, req_to_token[requests.long(), lengths.long() - 1].to(lengths.dtype), -1)


def keep_places(
    req_pool_indices: Tensor, req_to_token: Tensor, start_offset: Tensor, end_offset: Tensor, places: Tensor, count: int
) -> None:
    """SGLang's `assign_req_to_token_pool_func`: each request's new places, from one position to
    another, one request after the other."""
    lengths = (end_offset - start_offset).long()
    request = torch.repeat_interleave(torch.arange(count), lengths)
    ends = lengths.cumsum(0)
    position = torch.arange(len(request)) - (ends - lengths)[request] + start_offset.long()[request]
    req_to_token[req_pool_indices.long()[request], position] = places[: len(request)].to(req_to_token.dtype)


def verified_places(
    req_pool_indices: Tensor,
    req_to_token: Tensor,
    start_offset: Tensor,
    end_offset: Tensor,
    batch_size: int,
    draft_token_num: int,
    device: Any,
) -> Tensor:
    """What a platform may bring: where each request's tokens from one position to another are
    kept, `draft_token_num` of every one."""
    columns = start_offset.long()[:, None] + torch.arange(draft_token_num)
    return req_to_token[req_pool_indices.long()[:, None], columns].flatten().long()
