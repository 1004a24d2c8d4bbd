# SPDX-License-Identifier: Apache-2.0
"""vLLM's options that decide how V4's caches are kept."""

from __future__ import annotations

import logging

from vllm.config import VllmConfig
from vllm.platforms import current_platform

from dsv4.errors import Dsv4Error, HardwareError
from dsv4.machine import env
from dsv4.machine.hardware import GIB, MIB, Gpu, describe_gpu, match_device
from dsv4.model.config import DraftKind, V4Config
from dsv4.model.kv_layout import CacheFormats, StateMapping
from dsv4.planning.deployment import Checkpoint, Deployment, Speculation, capture_size
from dsv4.planning.memory.proof import requests_by_state, roomier_state

logger = logging.getLogger(__name__)

_STATE = "dsv4_state"  # the key in vLLM's additional_config, which goes to every process
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


def draft_method(vllm_config: VllmConfig) -> DraftKind:
    """What --speculative-config drafts with, once `check_draft` has refused other methods."""
    asked = vllm_config.speculative_config
    method: DraftKind = "none" if asked is None else asked.method
    return method


def state_mapping(vllm_config: VllmConfig) -> StateMapping:
    """How compressor state is kept: DSV4_STATE, where auto is what `choose_state` has entered in
    the config, and summaries where it has not and they are possible; asks no device.

    Raises Dsv4Error for summaries on the V1 runner of a GPU, whose slot-mapping kernel would read
    past a request's one block.
    """
    chosen, device_type = env.get("DSV4_STATE"), vllm_config.device_config.device_type
    possible = device_type == "cpu" or vllm_config.use_v2_model_runner
    if chosen == "summary" and not possible:
        raise Dsv4Error(
            "DSV4_STATE=summary needs model runner V2 on a GPU: leave VLLM_USE_V2_MODEL_RUNNER unset, or set DSV4_STATE=paged"
        )
    if chosen != "auto":
        return StateMapping(chosen)
    entered = vllm_config.additional_config
    if isinstance(entered, dict) and _STATE in entered:
        return StateMapping(entered[_STATE])
    return StateMapping.SUMMARY if possible else StateMapping.PAGED


def choose_state(vllm_config: VllmConfig, config: V4Config) -> None:
    """In the first process, enter in the config what DSV4_STATE=auto means on a GPU, so that every
    worker keeps the same: what holds more requests of max_model_len, by the planner.

    Workers size the pool later. Here it is --kv-cache-memory-bytes, or what the planner's proof
    leaves of the first GPU's memory.
    """
    device_type, entered = vllm_config.device_config.device_type, vllm_config.additional_config
    undecided = env.get("DSV4_STATE") == "auto" and device_type != "cpu" and isinstance(entered, dict)
    if not undecided or not vllm_config.use_v2_model_runner:
        return
    d, pool_bytes = deployment(vllm_config, config), vllm_config.cache_config.kv_cache_memory_bytes
    held = requests_by_state(d, pool_bytes)
    state = entered[_STATE] = roomier_state(d, pool_bytes).value
    source = "--kv-cache-memory-bytes" if pool_bytes is not None else "planned, before workers have measured it"
    logger.info(
        "dsv4: DSV4_STATE=auto is %s: requests of %d tokens at once in the KV pool (%s): %s",
        state,
        d.max_model_len,
        source,
        ", ".join(f"{n} with {mapping.value}" for mapping, n in held.items()),
    )


def first_gpu() -> Gpu:
    """As the planner's table has it, or as the platform describes it."""
    name, total = current_platform.get_device_name(), current_platform.get_device_total_memory()
    try:
        return match_device(name, total // MIB)
    except HardwareError:
        capability = current_platform.get_device_capability()
        return describe_gpu(total / GIB, f"{capability.major}.{capability.minor}", name=name)


def deployment(vllm_config: VllmConfig, config: V4Config) -> Deployment:
    """What the planner calls such a start of vLLM. Asks the platform for the first GPU's memory."""
    parallel, scheduler, formats = vllm_config.parallel_config, vllm_config.scheduler_config, cache_formats(vllm_config)
    ranks = parallel.tensor_parallel_size * parallel.pipeline_parallel_size
    return Deployment(
        checkpoint=Checkpoint(
            id=vllm_config.model_config.model,
            repo=vllm_config.model_config.model,
            family="",
            released="",
            total_bytes=0,
            config=config,
        ),
        engine="vllm",
        gpu=first_gpu(),
        count=ranks,
        nodes=parallel.nnodes,
        tp=parallel.tensor_parallel_size,
        dp=1,
        ep=parallel.enable_expert_parallel,
        pp=parallel.pipeline_parallel_size,
        max_model_len=vllm_config.model_config.max_model_len,
        max_num_batched_tokens=scheduler.max_num_batched_tokens,
        max_num_seqs=scheduler.max_num_seqs,
        memory_fraction=vllm_config.cache_config.gpu_memory_utilization,
        state=StateMapping.SUMMARY,
        async_scheduling=bool(scheduler.async_scheduling),
        kv=formats.kv,
        index=formats.index,
        max_capture_size=capture_size(scheduler.max_num_seqs, num_drafted(vllm_config)),
        speculation=Speculation(method=draft_method(vllm_config), num_tokens=num_drafted(vllm_config)),
    )
