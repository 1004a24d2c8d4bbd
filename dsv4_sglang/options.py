# SPDX-License-Identifier: Apache-2.0
"""SGLang's options that decide how V4's caches are kept."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.runtime_context import get_exec, get_spec

from dsv4.errors import Dsv4Error
from dsv4.machine import env
from dsv4.model.kv_layout import CacheFormats

_PACKED_CACHE_DTYPES = ("fp8_e4m3",)


def cache_formats(
    kv_cache_dtype: str, dtype: torch.dtype, fp4_indexer: bool = False, *, on_cpu: bool = False
) -> CacheFormats:
    """The storage formats that --kv-cache-dtype and --enable-deepseek-v4-fp4-indexer ask for.

    fp8_e4m3 stores the native 584-byte rows with fp8 index keys (or mxfp4 ones on request), the
    model's own dtype plain rows. auto is fp8_e4m3 on a GPU, as in SGLang's own V4, and plain rows
    on a CPU. Raises Dsv4Error for anything else.
    """
    own = {torch.bfloat16: ("bf16", "bfloat16")}.get(dtype, ())
    if kv_cache_dtype in own or (kv_cache_dtype == "auto" and on_cpu):
        return CacheFormats.plain(dtype.itemsize)
    if kv_cache_dtype not in ("auto", *_PACKED_CACHE_DTYPES):
        known = ", ".join((*own, *_PACKED_CACHE_DTYPES))
        raise Dsv4Error(f"--kv-cache-dtype {kv_cache_dtype}: dsv4 stores auto or {known} with --dtype {dtype}")
    return CacheFormats.packed(dtype.itemsize, mxfp4_keys=fp4_indexer)


def has_host_reads() -> bool:
    """Whether references or DSV4_CHECK are asked for, which read lengths on the host: no step that
    they serve can be captured, and no kernel needs to be compiled ahead."""
    return env.get("DSV4_OPS") == "reference" or env.flag("DSV4_CHECK")


def drafted_tokens() -> int:
    """How many tokens the running engine drafts for each one that it is sure of; 0 without a
    draft."""
    spec = get_spec()
    return 0 if spec.speculative_algorithm is None else int(spec.speculative_num_steps)


def deployed_formats(kvc: Any) -> CacheFormats:
    """`cache_formats` of the running engine."""
    return cache_formats(
        kvc.kv_cache_dtype_str,
        kvc.model_config.dtype,
        get_exec().kernel.enable_deepseek_v4_fp4_indexer,
        on_cpu=kvc.device == "cpu",
    )
