# SPDX-License-Identifier: Apache-2.0
"""vLLM's CPU platform without its C++ extension. Imported only after `platform.register` chose
it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.platforms.cpu import CpuPlatform

from dsv4_vllm import hooks

if TYPE_CHECKING:
    from vllm.config import VllmConfig  # at run time vllm.config is what is importing this module


class ReferenceCpuPlatform(CpuPlatform):
    """Runs vLLM's scheduler, KV manager, workers and servers unchanged; layers take their PyTorch
    paths."""

    @classmethod
    def import_kernels(cls) -> None:
        hooks.define_cpu_ops()

    @classmethod
    def register_triton_kernel_overrides(cls) -> None:
        from vllm.triton_utils import HAS_TRITON

        hooks.keep_plain_linears()
        if HAS_TRITON:
            return  # under TRITON_INTERPRET=1 vLLM's own kernels run
        super().register_triton_kernel_overrides()
        hooks.repair_slot_mapping()
        hooks.repair_sampling_with_drafts()

    @classmethod
    def check_and_update_config(cls, vllm_config: VllmConfig) -> None:
        scheduler, cache = vllm_config.scheduler_config, vllm_config.cache_config
        chosen = scheduler.enable_chunked_prefill, cache.enable_prefix_caching, scheduler.max_num_batched_tokens
        super().check_and_update_config(vllm_config)
        if _is_v4(vllm_config):
            # The base class turns these off for MLA models on CPUs without AMX; our attention
            # serves them.
            scheduler.enable_chunked_prefill, cache.enable_prefix_caching, scheduler.max_num_batched_tokens = chosen
        # Layers' CPU paths call operators of the C++ extension; "none" makes them take their
        # PyTorch ones.
        compilation = vllm_config.compilation_config
        compilation.custom_ops = ["none"] + [op for op in compilation.custom_ops if op not in ("all", "none")]

    @classmethod
    def get_attn_backend_cls(
        cls, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        """Backend of models other than V4, whose layers bring their own: plain PyTorch over paged
        KV."""
        return "dsv4_vllm.cpu_attention.PagedTorchBackend"


def _is_v4(vllm_config: VllmConfig) -> bool:
    model = vllm_config.model_config
    return model is not None and getattr(model.hf_config, "model_type", None) == "deepseek_v4"
