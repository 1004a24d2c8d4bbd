# SPDX-License-Identifier: Apache-2.0
"""SGLang on a CPU without its CPU kernels. Imported only after `platform.register` chose it."""

from __future__ import annotations

import os
from typing import Any

import psutil
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform


class ReferenceCpuPlatform(SRTPlatform):
    """Runs SGLang's scheduler, caches, workers and servers unchanged; layers take their PyTorch
    paths.

    An out-of-tree identity is what selects those paths: as SGLang's own "cpu" it would import
    sgl_kernel's CPU build, which the published wheel does not have.
    """

    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"
    capabilities = PlatformCapabilities()  # no Triton kernels of SGLang's own, no graphs

    def get_device(self, device_id: int = 0) -> str:
        return "cpu"

    def get_device_total_memory(self, device_id: int = 0) -> int:
        return int(psutil.virtual_memory().total)

    def get_current_memory_usage(self, device: Any = None) -> float:
        memory = psutil.virtual_memory()
        return float(memory.total - memory.available)

    def get_default_attention_backend(self) -> str:
        """Of models other than V4."""
        return "torch_native"

    def get_dispatch_key_name(self) -> str:
        return "native"

    def get_torch_distributed_backend_str(self) -> str:
        return "gloo"

    def apply_server_args_defaults(self, server_args: Any) -> None:
        # Unset, SGLang picks the Intel AMX backends for a device named cpu.
        if server_args.attention_backend is None:
            server_args.attention_backend = "torch_native"
        if server_args.sampling_backend is None:
            server_args.sampling_backend = "pytorch"
        # Unset, SGLang wants a NUMA node per rank; here ranks share what cores there are, and the
        # system places them.
        ranks = server_args.tp_size * server_args.dp_size * server_args.pp_size
        if ranks > 1:
            cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
            os.environ.setdefault("SGLANG_CPU_OMP_THREADS_BIND", "|".join([cores] * ranks))

    def supports_speculative_algorithm(self, algorithm: str) -> bool:
        return algorithm == "EAGLE"

    def get_speculative_cache_locs_fn(self) -> Any:
        from dsv4_sglang.draft_ops import verified_places

        return verified_places

    def get_quantization_config(self, quantization: str) -> type[Any] | None:
        from dsv4_sglang.quant import V4QuantConfig

        return V4QuantConfig if quantization == "fp8" else None
