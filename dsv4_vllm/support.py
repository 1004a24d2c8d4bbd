# SPDX-License-Identifier: Apache-2.0
"""What of a vLLM deployment dsv4 can serve exactly; everything else is refused before a weight is
read."""

from __future__ import annotations

from vllm import envs
from vllm.config import SpeculativeConfig, VllmConfig
from vllm.distributed.utils import get_pp_indices

from dsv4.errors import DeploymentError
from dsv4.loading import LOAD_FORMATS
from dsv4.model.config import V4Config
from dsv4.planning.deployment import MOST_DRAFTED
from dsv4.planning.memory.vllm import stage_with_draft, vllm_pool
from dsv4_vllm.options import cache_formats, num_drafted, state_mapping


def check_deployment(vllm_config: VllmConfig) -> V4Config:
    """The model's config, after refusing what cannot be served. Raises Dsv4Error with the flag and
    the way out."""
    config = v4_config(vllm_config)
    parallel = vllm_config.parallel_config
    if reason := config.why_not_sharded(parallel.tensor_parallel_size):
        raise DeploymentError(f"--tensor-parallel-size {reason}")
    refusals = (
        (
            parallel.decode_context_parallel_size > 1,
            "--decode-context-parallel-size",
            "the caches are replicated; use 1",
        ),
        (
            parallel.data_parallel_size > 1,
            "--data-parallel-size",
            "ranks that share experts are not tested with V4's hash-routed layers; use 1, and start one server per replica",
        ),
        (
            parallel.prefill_context_parallel_size > 1,
            "--prefill-context-parallel-size",
            "the compressor pools neighbouring tokens, which would lie on two ranks; use 1",
        ),
        (
            parallel.use_ubatching,
            "--enable-dbo (--ubatch-size)",
            "steps in two halves are not tested with dsv4's metadata; leave it out",
        ),
        (parallel.enable_elastic_ep, "--enable-elastic-ep", "experts stay where they were loaded; leave it out"),
        (
            vllm_config.cache_config.kv_offloading_size is not None,
            "--kv-offloading-size",
            "KV offloading has not been tested with dsv4's caches; leave it out",
        ),
        (
            vllm_config.offload_config.uva.cpu_offload_gb > 0
            or vllm_config.offload_config.prefetch.offload_group_size > 0,
            "--cpu-offload-gb (--offload-group-size)",
            "dsv4's kernels read weights where they were loaded, and offloaded ones have not been tested; leave it out",
        ),
        (
            bool(vllm_config.cache_config.kv_cache_dtype_skip_layers),
            "--kv-cache-dtype-skip-layers",
            "all layers store one format; leave it out",
        ),
        (
            vllm_config.aux_output_config.enabled,
            "--enable-return-routed-experts",
            "dsv4's router does not report its choices; leave it out",
        ),
        (
            envs.VLLM_BATCH_INVARIANT,
            "VLLM_BATCH_INVARIANT",
            "attention is split by the size of the batch, so a request's last bits depend on its neighbours; unset it",
        ),
        (
            vllm_config.load_config.load_format not in LOAD_FORMATS,
            f"--load-format {vllm_config.load_config.load_format}",
            f"dsv4 reads the released safetensors; use {' or '.join(LOAD_FORMATS)}",
        ),
        (
            vllm_config.model_config.enable_prompt_embeds,
            "--enable-prompt-embeds",
            "V4 chooses the experts of its first layers by token id, which an embedding has not; leave it out",
        ),
        (parallel.enable_eplb, "--enable-eplb", "expert load balancing is not wired; leave it out"),
        (vllm_config.lora_config is not None, "--enable-lora", "LoRA is not wired; leave it out"),
        (
            vllm_config.kv_transfer_config is not None,
            "--kv-transfer-config",
            "KV transfer has not been tested with dsv4's caches; leave it out",
        ),
        (
            vllm_config.weight_transfer_config is not None,
            "--weight-transfer-config",
            "weights that arrive in pieces cannot be checked before a layer is taken apart; use reload_weights",
        ),
        (
            vllm_config.model_config.enable_sleep_mode,
            "--enable-sleep-mode",
            "discarding and restoring weights and caches is not tested; stop the server, or use reload_weights",
        ),
    )
    for refused, flag, advice in refusals:
        if refused:
            raise DeploymentError(f"{flag}: {advice}, or set DSV4_MODE=off to serve with vLLM's own DeepSeek-V4")
    check_draft(config, vllm_config)
    cache_formats(vllm_config)
    state_mapping(vllm_config)
    check_stages(config, vllm_config)
    return config


def v4_config(vllm_config: VllmConfig) -> V4Config:
    """The config of the checkpoint that is served."""
    served = vllm_config.model_config
    return V4Config.from_dict(served.hf_config.to_dict(), f"{served.model}/config.json")


def check_draft(config: V4Config, vllm_config: VllmConfig) -> None:
    """Refuse a way to draft that the checkpoint does not carry or dsv4 does not have. Raises
    DeploymentError.
    """
    asked = vllm_config.speculative_config
    if asked is None:
        return
    way_out = "no --speculative-config" if config.draft == "none" else f'"method": "{config.draft}"'
    if asked.method != config.draft:
        raise DeploymentError(
            f"--speculative-config: method {asked.method}, but the checkpoint carries {config.draft_in_words} and dsv4 drafts with that"
            f" alone; use {way_out}, or set DSV4_MODE=off to serve with vLLM's own DeepSeek-V4"
        )
    k, scheduler = asked.num_speculative_tokens, vllm_config.scheduler_config
    if config.draft == "dspark" and k != config.dspark_block_size:
        raise DeploymentError(
            f"--speculative-config: num_speculative_tokens {k}, but this DSpark draft was trained on blocks of"
            f" {config.dspark_block_size} and is rarely right with others; use {config.dspark_block_size}"
        )
    if not 1 <= k <= MOST_DRAFTED:
        raise DeploymentError(f"--speculative-config: num_speculative_tokens {k}; use 1 to {MOST_DRAFTED}")
    _check_draft_options(asked)
    if scheduler.max_num_batched_tokens < scheduler.max_num_seqs * (1 + k):
        raise DeploymentError(
            f"--max-num-batched-tokens {scheduler.max_num_batched_tokens}: a step of --max-num-seqs"
            f" {scheduler.max_num_seqs} requests with {k} drafted tokens each takes"
            f" {scheduler.max_num_seqs * (1 + k)}; raise the one or lower the other"
        )
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        raise DeploymentError(
            "--speculative-config with --pipeline-parallel-size: without async scheduling vLLM gives a step more drafted"
            " tokens than it has, and its workers stop; with it, which a CPU has not, this is not tested; leave one out"
        )


def _check_draft_options(asked: SpeculativeConfig) -> None:
    refusals = (
        (
            asked.rejection_sample_method != "standard",
            "rejection_sample_method",
            "it keeps tokens that the model would not say",
        ),
        (asked.kv_cache_dtype is not None, "kv_cache_dtype", "all layers store one format"),
        (asked.enable_adaptive_verification, "enable_adaptive_verification", "it is not tested"),
        (
            asked.num_speculative_tokens_per_batch_size is not None,
            "num_speculative_tokens_per_batch_size",
            "it is not tested",
        ),
    )
    for refused, option, reason in refusals:
        if refused:
            raise DeploymentError(f"--speculative-config: {option}: {reason} with dsv4; leave it out")


def check_stages(config: V4Config, vllm_config: VllmConfig) -> None:
    """Refuse cuts into pipeline stages that vLLM cannot run. Raises DeploymentError.

    vLLM fails to allocate the caches of a stage that has none of a group's layers. Layers that
    route by token id may be on any stage.
    """
    size = vllm_config.parallel_config.pipeline_parallel_size
    if size == 1:
        return
    cuts = [range(*get_pp_indices(config.num_hidden_layers, rank, size)) for rank in range(size)]
    cut = ",".join(str(len(stage)) for stage in cuts)
    where = f"--pipeline-parallel-size {size}, layers cut {cut}"
    drafted = len(config.draft_layers) if num_drafted(vllm_config) else 0
    pool = vllm_pool(config, cache_formats(vllm_config), drafted, None, state_mapping(vllm_config))
    for number, stage in enumerate(cuts):
        own = stage_with_draft(stage, config, drafted)
        for group in pool.groups:
            layers = sorted({layer for cache in group.caches for layer in cache.layers})
            if not set(own).intersection(layers):
                raise DeploymentError(
                    f"{where}: stage {number} has none of the layers {', '.join(map(str, layers))}, whose caches vLLM keeps"
                    " in one group, and it allocates no caches for such a stage; use fewer stages, or another"
                    " VLLM_PP_LAYER_PARTITION"
                )
