# SPDX-License-Identifier: Apache-2.0
"""Plain-PyTorch paged attention, so that models other than V4 also run on the CPU platform without
vLLM's C++ extension."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)


@dataclass
class PagedTorchMetadata(AttentionMetadata):
    """query_start_loc: [R+1]; seq_lens: [R]; block_table: [R, n]; slot_mapping: [T]."""

    query_start_loc: Tensor
    seq_lens: Tensor
    block_table: Tensor
    slot_mapping: Tensor
    num_actual_tokens: int


class PagedTorchBuilder(AttentionMetadataBuilder[PagedTorchMetadata]):
    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> PagedTorchMetadata:
        c = common_attn_metadata
        return PagedTorchMetadata(
            c.query_start_loc[: c.num_reqs + 1],
            c.seq_lens[: c.num_reqs],
            c.block_table_tensor,
            c.slot_mapping,
            c.num_actual_tokens,
        )


class PagedTorchBackend(AttentionBackend):
    """Causal attention with grouped KV heads; sliding windows, ALiBi, soft caps and quantised KV
    are refused."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.bfloat16, torch.float16]
    forward_includes_kv_cache_update = True

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"  # the one name of vLLM's table that is free for plugins

    @staticmethod
    def get_impl_cls() -> type[PagedTorchImpl]:
        return PagedTorchImpl

    @staticmethod
    def get_builder_cls() -> type[PagedTorchBuilder]:
        return PagedTorchBuilder


class PagedTorchImpl(AttentionImpl):
    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        **extra: Any,
    ) -> None:
        refused = {
            "alibi_slopes": alibi_slopes is not None,
            "sliding_window": sliding_window is not None,
            "logits_soft_cap": bool(logits_soft_cap),
            f"kv_cache_dtype {kv_cache_dtype}": kv_cache_dtype not in ("auto", "float32", "bfloat16", "float16"),
            f"attn_type {attn_type}": attn_type != "decoder",
            "kv_sharing_target_layer_name": kv_sharing_target_layer_name is not None,
        }
        for what, is_set in refused.items():
            if is_set:
                raise NotImplementedError(
                    f"{what}: dsv4's CPU platform serves plain causal attention beside DeepSeek-V4; use a CPU build of vLLM"
                )
        self.num_heads, self.head_size, self.scale = num_heads, head_size, scale
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: PagedTorchMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """query: [T, H, D]; key, value: [T, Hkv, D]; kv_cache: [pages, Hkv, rows, 2 * D]; writes
        and returns output."""
        if attn_metadata is None:
            return output.fill_(0)
        m, dim, rows = attn_metadata, self.head_size, kv_cache.shape[2]
        slots = m.slot_mapping[: m.num_actual_tokens]
        keep = slots >= 0
        page, row = slots[keep] // rows, slots[keep] % rows
        kv_cache[page, :, row, :dim] = key[: m.num_actual_tokens][keep]
        kv_cache[page, :, row, dim:] = value[: m.num_actual_tokens][keep]
        starts = m.query_start_loc.tolist()
        for request, (start, end) in enumerate(itertools.pairwise(starts)):
            if end > start:
                context = int(m.seq_lens[request])
                pages = m.block_table[request, : -(-context // rows)].long()
                kv = kv_cache[pages].transpose(0, 1).flatten(1, 2)[:, :context].float()  # [Hkv, context, 2 * D]
                out = self._attend(query[start:end].float().transpose(0, 1), kv[..., :dim], kv[..., dim:])
                output[start:end] = out.transpose(0, 1).to(output.dtype).view_as(output[start:end])
        return output

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q: [H, Q, D], the last Q of k's positions; k, v: [Hkv, K, D]."""
        past = k.shape[1] - q.shape[1]
        causal = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(past)
        return torch.nn.functional.scaled_dot_product_attention(
            q[None],
            k[None],
            v[None],
            attn_mask=causal,
            scale=self.scale,
            enable_gqa=self.num_heads != self.num_kv_heads,
        )[0]
