# SPDX-License-Identifier: Apache-2.0
"""vLLM's options that decide how V4's caches are kept."""

from __future__ import annotations

from vllm.config import VllmConfig

from dsv4.errors import Dsv4Error
from dsv4.machine import env
from dsv4.model.kv_layout import CacheFormats, StateMapping

_PACKED_CACHE_DTYPES = ("fp8", "fp8_e4m3", "fp8_ds_mla")


def cache_formats(vllm_config: VllmConfig) -> CacheFormats:
    """The storage formats that --kv-cache-dtype and --attention-config.indexer_kv_dtype ask for.

    fp8, fp8_e4m3 and fp8_ds_mla store the native 584-byte rows with fp8 index keys (or mxfp4 ones
    on request), the model's own dtype plain rows. auto is fp8_ds_mla on a GPU, as in vLLM's own V4,
    and plain rows on a CPU. Raises Dsv4Error for anything else.
    """
    own, itemsize = str(vllm_config.model_config.dtype).removeprefix("torch."), vllm_config.model_config.dtype.itemsize
    dtype, index = vllm_config.cache_config.cache_dtype, getattr(vllm_config.attention_config, "indexer_kv_dtype", None)
    if dtype == "auto":
        dtype = own if vllm_config.device_config.device_type == "cpu" else "fp8_ds_mla"
    if dtype == own:
        return CacheFormats.plain(itemsize)
    if dtype not in _PACKED_CACHE_DTYPES:
        known = ", ".join(_PACKED_CACHE_DTYPES)
        raise Dsv4Error(f"--kv-cache-dtype {dtype}: dsv4 stores auto, {own} (plain rows), or {known} (packed rows)")
    return CacheFormats.packed(itemsize, mxfp4_keys=index == "mxfp4")


def num_drafted(vllm_config: VllmConfig) -> int:
    """Tokens that a step may have to take back: those that --speculative-config drafts."""
    asked = vllm_config.speculative_config
    return 0 if asked is None else asked.num_speculative_tokens


def state_mapping(vllm_config: VllmConfig) -> StateMapping:
    """DSV4_STATE, where auto takes the summaries wherever they are possible; asks no device.

    Raises Dsv4Error for summaries with drafts, which cannot be taken back, and on the V1 runner of
    a GPU, whose slot-mapping kernel would read past a request's one block.
    """
    chosen, device_type = env.get("DSV4_STATE"), vllm_config.device_config.device_type
    if num_drafted(vllm_config):
        if chosen == "summary":
            raise Dsv4Error(
                "DSV4_STATE=summary: a summary has no way back when a drafted token is refused; set DSV4_STATE=paged, or"
                " leave out --speculative-config"
            )
        return StateMapping.PAGED
    possible = device_type == "cpu" or vllm_config.use_v2_model_runner
    if chosen == "summary" and not possible:
        raise Dsv4Error(
            "DSV4_STATE=summary needs model runner V2 on a GPU: leave VLLM_USE_V2_MODEL_RUNNER unset, or set DSV4_STATE=paged"
        )
    if chosen != "auto":
        return StateMapping(chosen)
    return StateMapping.SUMMARY if possible else StateMapping.PAGED
