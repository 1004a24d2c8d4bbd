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
from dsv4.ops.compressor.ring import Rings, plan_many, plan_single
from dsv4.ops.pages import BatchView
from dsv4_sglang.caches import V4Pool
from dsv4_sglang.names import ATTENTION_BACKEND
from dsv4_sglang.step import StepPlan

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner


class V4AttentionBackend(AttentionBackend):
    """Builds the plan of each step. Layers read `plan` and `pool`, and call the operators
    themselves."""

    def __init__(self, runner: ModelRunner) -> None:
        super().__init__()
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
        self.ratios = sorted({layer.compress_ratio for layer in pool.config.layers} - {0})
        self.plan: StepPlan | None = None

    # ---- SGLang's interface -----------------------------------------------------------------

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        if forward_batch.forward_mode.is_idle():
            self.plan = None
            return
        lens = forward_batch.seq_lens_cpu if forward_batch.seq_lens_cpu is not None else forward_batch.seq_lens
        self.plan = self._plan(forward_batch, int(lens.max()))

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

    def _plan(self, fb: ForwardBatch, max_seq_len: int) -> StepPlan:
        batch, is_decode = _batch_view(fb, max_seq_len), fb.forward_mode.is_decode()
        block_table, window_table = self._tables(fb.req_pool_indices, max_seq_len)
        tokens = plan.plan_tokens(batch)
        # Page 0 is nobody's: what a padded batch writes there must not reach the caches of the
        # request it borrows.
        real = fb.out_cache_loc[: batch.num_tokens] >= PAGE_TOKENS
        tokens = plan.TokenPlan(tokens.request_of_token, tokens.positions, tokens.valid & real)
        rings = {
            CSA_RATIO: Rings(window_table, PAGE_TOKENS, CSA_RATIO, windows=2),
            HCA_RATIO: Rings(
                fb.req_pool_indices[:, None].int(), max(self.context_len, max_seq_len) + 1, HCA_RATIO, windows=1
            ),
        }
        return StepPlan(
            plan.plan_window(window_table, tokens, PAGE_TOKENS, self.window),
            {m: plan.plan_entries(block_table, tokens, PAGE_TOKENS, m, max_seq_len) for m in self.ratios},
            {
                m: plan_single(rings[m], tokens) if is_decode else plan_many(rings[m], tokens, batch)
                for m in self.ratios
            },
        )

    def _tables(self, req_pool_indices: Tensor, max_seq_len: int) -> tuple[Tensor, Tensor]:
        """Full and window pages of every request: [R, n] int32 each; places beyond a request's
        length mean nothing."""
        starts = self.req_to_token[req_pool_indices, :max_seq_len:PAGE_TOKENS].long()
        window = self.pool.translate_loc_from_full_to_swa(starts).clamp(min=0)
        return (starts // PAGE_TOKENS).int(), (window // PAGE_TOKENS).int()


def _batch_view(fb: ForwardBatch, max_seq_len: int) -> BatchView:
    """The step for the core."""
    num_reqs, device = fb.batch_size, fb.seq_lens.device
    if fb.forward_mode.is_decode():
        starts = torch.arange(num_reqs + 1, dtype=torch.int32, device=device)
        return BatchView(starts, fb.seq_lens.int(), num_reqs, num_reqs, max_seq_len, 1)
    starts = torch.zeros(num_reqs + 1, dtype=torch.int32, device=device)
    starts[1:] = fb.extend_seq_lens.cumsum(0)
    return BatchView(
        starts, fb.seq_lens.int(), fb.input_ids.shape[0], num_reqs, max_seq_len, max(fb.extend_seq_lens_cpu)
    )


def register_backend() -> None:
    """Offer the backend under its name, in the registry and on the command line. Safe to call
    twice."""
    register_attention_backend(ATTENTION_BACKEND)(V4AttentionBackend)
    if ATTENTION_BACKEND not in ATTENTION_BACKEND_CHOICES:
        ATTENTION_BACKEND_CHOICES.append(ATTENTION_BACKEND)
