# SPDX-License-Identifier: Apache-2.0
"""SGLang's view of a step turned into the core's plan, once per step, and the caches for V4's
layers to use it on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.arg_groups.choices import ATTENTION_BACKEND_CHOICES
from sglang.srt.layers.attention.attention_registry import register_attention_backend
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from torch import Tensor

from dsv4.errors import CompatError
from dsv4.model.config import CSA_RATIO, HCA_RATIO
from dsv4.model.kv_layout import PAGE_TOKENS
from dsv4.ops import plan
from dsv4.ops.pages import BatchView
from dsv4.ops.plan import Rings
from dsv4_sglang.caches import V4Pool
from dsv4_sglang.names import ATTENTION_BACKEND
from dsv4_sglang.step import StepMetadata

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner


class V4AttentionBackend(AttentionBackend):
    """Builds the plan of each step. Layers read `plan` and `pool`, and call the operators
    themselves."""

    def __init__(self, runner: ModelRunner, ahead: int = 0) -> None:
        """ahead: tokens of one step per request that SGLang does not count in its lengths."""
        super().__init__()
        self.ahead = ahead
        pool = runner.token_to_kv_pool
        if not isinstance(pool, V4Pool):
            raise CompatError(
                f"dsv4's hook on SGLang's KV pool did not apply: the pool is {type(pool).__module__}.{type(pool).__qualname__}."
                " The server's log has the reason where it says 'Failed to apply hooks'; install a supported SGLang or report it"
            )
        self.pool = self.token_to_kv_pool = pool
        self.req_to_token_pool = runner.req_to_token_pool
        self.req_to_token = runner.req_to_token_pool.req_to_token
        self.window = pool.config.sliding_window
        self.context_len = runner.model_config.context_len
        self.index_topk = pool.config.index_topk
        # Where each request's tokens end in a step of one token per request.
        self.ends = torch.arange(self.req_to_token.shape[0] + 1, dtype=torch.int32, device=self.req_to_token.device)
        self.ratios = sorted({layer.compress_ratio for layer in pool.served} - {0})
        self.plan: StepMetadata | None = None

    # ---- SGLang's interface -----------------------------------------------------------------

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        if forward_batch.forward_mode.is_idle():
            self.plan = None
            return
        lens = forward_batch.seq_lens_cpu if forward_batch.seq_lens_cpu is not None else forward_batch.seq_lens
        self.plan = self._plan(forward_batch, int(lens.max()) + self._ahead(forward_batch))

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Nothing is kept outside the graphs."""

    def init_forward_metadata_out_graph(self, forward_batch: ForwardBatch, in_capture: bool = False) -> None:
        """Nothing: the plan of a captured decode step is made in the graph."""

    def init_forward_metadata_in_graph(self, forward_batch: ForwardBatch) -> None:
        """Plan a captured decode step, for the longest context: every input has a fixed address,
        the batch's buffers and SGLang's request table alike."""
        self.plan = self._plan(forward_batch, self.context_len)

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return 1

    def forward_extend(self, *args: Any, **kwargs: Any) -> Tensor:
        raise NotImplementedError("V4's layers call dsv4's operators, not an attention layer of SGLang's")

    forward_decode = forward_extend

    # ---- the plan ---------------------------------------------------------------------------

    def _plan(self, fb: ForwardBatch, max_seq_len: int) -> StepMetadata:
        batch, context = self._batch_view(fb, max_seq_len), max(self.context_len, max_seq_len)
        block_table, window_table = self._tables(fb.req_pool_indices, max_seq_len, context)
        drafted = self.pool.drafted
        rings = {
            CSA_RATIO: Rings(window_table, PAGE_TOKENS, CSA_RATIO, windows=2, drafted=drafted),
            HCA_RATIO: Rings(fb.req_pool_indices[:, None], context + 1, HCA_RATIO, windows=1, drafted=drafted),
        }
        chosen = {CSA_RATIO: self.index_topk, HCA_RATIO: None}
        single = [rings[m] for m in self.ratios] if fb.forward_mode.is_decode() else []
        made = plan.planned(
            batch,
            [
                plan.WindowCache(window_table, PAGE_TOKENS, self.window),
                *(plan.EntryCache(block_table, PAGE_TOKENS, m, context, chosen[m]) for m in self.ratios),
                *single,
            ],
            # Page 0 is nobody's: what a padded batch writes there must not reach the caches of the
            # request it borrows.
            plan.Homes(fb.out_cache_loc, PAGE_TOKENS),
        )
        planned = (
            made.of(plan.RingPlan) if single else [plan.plan_many(rings[m], made.tokens, batch) for m in self.ratios]
        )
        return StepMetadata(
            made.tokens,
            made.of(plan.WindowPlan)[0],
            dict(zip(self.ratios, made.of(plan.EntryPlan), strict=True)),
            dict(zip(self.ratios, planned, strict=True)),
        )

    def _tables(self, req_pool_indices: Tensor, max_seq_len: int, context: int) -> tuple[Tensor, Tensor]:
        """Full and window pages of every request: [R, n] int32 each; places beyond a request's
        length mean nothing. Their rows lie equally far apart in every step."""
        shape = req_pool_indices.shape[0], pages_of(context)
        to_window = self.pool.full_to_swa_index_mapping
        assert to_window is not None, "SGLang has not registered its window pool's mapping"
        full, window = (torch.empty(shape, dtype=torch.int32, device=req_pool_indices.device) for _ in range(2))
        plan.page_tables(
            self.req_to_token,
            req_pool_indices,
            to_window,
            full,
            window,
            page_tokens=PAGE_TOKENS,
            columns=pages_of(max_seq_len),
        )
        return full, window

    def _ahead(self, fb: ForwardBatch) -> int:
        """Tokens of a step that SGLang does not count in its lengths: drafted ones, to be verified
        or gone on from."""
        return int(fb.spec_info.draft_token_num) if fb.forward_mode.is_target_verify() else self.ahead

    def _batch_view(self, fb: ForwardBatch, max_seq_len: int) -> BatchView:
        """The step for the core."""
        num_reqs, device = fb.batch_size, fb.seq_lens.device
        ahead, ends = self._ahead(fb), self.ends[: num_reqs + 1]
        if fb.forward_mode.is_target_verify():
            return BatchView(ends * ahead, fb.seq_lens + ahead, num_reqs * ahead, num_reqs, max_seq_len, ahead)
        if fb.forward_mode.is_decode():
            return BatchView(ends, fb.seq_lens + ahead if ahead else fb.seq_lens, num_reqs, num_reqs, max_seq_len, 1)
        starts = torch.zeros(num_reqs + 1, dtype=torch.int32, device=device)
        starts[1:] = fb.extend_seq_lens.cumsum(0)
        return BatchView(starts, fb.seq_lens, fb.input_ids.shape[0], num_reqs, max_seq_len, max(fb.extend_seq_lens_cpu))


class V4DraftBackend(V4AttentionBackend):
    """Plans all steps of a chain of drafts before the first: SGLang counts none of their tokens.

    attn_backends: SGLang's name, one for each step
    """

    def __init__(self, runner: ModelRunner, steps: int) -> None:
        super().__init__(runner)
        self.attn_backends = [V4AttentionBackend(runner, ahead=1 + step) for step in range(steps)]

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        for backend in self.attn_backends[:-1]:  # the last draft is made by the step before
            backend.init_forward_metadata(forward_batch)


def pages_of(tokens: int) -> int:
    """Pages that so many tokens of a request take."""
    return -(-tokens // PAGE_TOKENS)


def register_backend() -> None:
    """Offer the backend under its name, in the registry and on the command line. Safe to call
    twice."""
    register_attention_backend(ATTENTION_BACKEND)(V4AttentionBackend)
    if ATTENTION_BACKEND not in ATTENTION_BACKEND_CHOICES:
        ATTENTION_BACKEND_CHOICES.append(ATTENTION_BACKEND)
