# SPDX-License-Identifier: Apache-2.0
"""What of an SGLang deployment dsv4 can serve exactly; everything else is refused before a weight
is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dsv4.errors import DeploymentError
from dsv4.loading import LOAD_FORMATS
from dsv4.machine.compilers import missing_compilers
from dsv4.machine.decide import Device, detect_devices, weakest
from dsv4.model.checkpoint import validate
from dsv4.model.config import V4Config
from dsv4.model.kv_layout import PAGE_TOKENS
from dsv4.planning.deployment import MOST_DRAFTED
from dsv4_sglang.names import ATTENTION_BACKEND
from dsv4_sglang.options import cache_formats

MTP_ALGORITHMS = ("NEXTN", "EAGLE")  # of which the first is a name for the second
# Options of drafts, and the value of each that dsv4 is tested with, which is SGLang's own.
_DRAFTED_SO_ONLY = {
    "--speculative-accept-threshold-acc": 1.0,
    "--speculative-accept-threshold-single": 1.0,
    "--speculative-adaptive": False,
    "--speculative-draft-attention-backend": None,
    "--speculative-draft-kv-cache-dtype": None,
    "--speculative-draft-load-format": None,
    "--speculative-draft-model-quantization": None,
    "--speculative-draft-sink-size": None,
    "--speculative-draft-window-size": None,
    "--speculative-moe-a2a-backend": None,
    "--speculative-moe-runner-backend": None,
    "--speculative-token-map": None,
    "--speculative-use-block-verification": False,
    "--speculative-use-rejection-sampling": False,
    "--enable-multi-layer-eagle": False,
}

_DTYPES = {"float32": torch.float32, "float": torch.float32, "bfloat16": torch.bfloat16, "auto": torch.bfloat16}


def check_deployment(asked: Any, args: Any, config: V4Config) -> None:
    """Refuse what cannot be served. asked: the arguments as given; args: what SGLang made of them
    so far.

    Raises Dsv4Error with the flag and the way out.
    """
    refusals = (
        (args.disaggregation_mode != "null", "--disaggregation-mode", "dsv4's caches cannot be transferred"),
        (args.enable_hierarchical_cache, "--enable-hierarchical-cache", "dsv4's caches have no host pool"),
        (args.enable_lmcache, "--enable-lmcache", "dsv4's caches cannot be transferred"),
        (args.enable_hisparse, "--enable-hisparse", "it is made for SGLang's own V4 pool"),
        (args.enable_unified_memory, "--enable-unified-memory", "dsv4 has its own pool"),
        (args.enable_kv_cache_sharding, "--enable-kv-cache-sharding", "the caches are replicated"),
        (args.attn_cp_size > 1, "--attn-cp-size", "context parallelism is not wired"),
        (args.dcp_size > 1, "--dcp-size", "decode context parallelism is not wired: the caches are replicated"),
        (
            args.enable_dp_attention or args.attn_dp_size > 1,
            "--enable-dp-attention (--attn-dp-size)",
            "DP attention is not wired",
        ),
        (
            args.dp_size > 1,
            f"--dp-size {args.dp_size}",
            "replicas behind one server are not tested; start one server per replica",
        ),
        (
            args.enable_return_routed_experts,
            "--enable-return-routed-experts",
            "dsv4's router does not report its choices, which would come back as zeros",
        ),
        (
            args.expert_distribution_recorder_mode is not None,
            "--expert-distribution-recorder-mode",
            "dsv4's router does not report its choices",
        ),
        (
            args.enable_deterministic_inference or args.rl_on_policy_target is not None,
            "--enable-deterministic-inference (--rl-on-policy-target)",
            "attention is split by the size of the batch, so a request's last bits depend on its neighbours",
        ),
        (
            args.cpu_offload_gb > 0 or args.offload_group_size > 0,
            "--cpu-offload-gb (--offload-group-size)",
            "dsv4's kernels read weights where they were loaded, and offloaded ones are not tested",
        ),
        (args.enable_memory_saver, "--enable-memory-saver", "releasing and restoring dsv4's caches is not tested"),
        (
            args.disable_hybrid_swa_memory,
            "--disable-hybrid-swa-memory",
            "dsv4's pool has pages that live as long as the window",
        ),
        (
            args.load_format not in LOAD_FORMATS,
            f"--load-format {args.load_format}",
            f"dsv4 reads the released safetensors, by {' or '.join(LOAD_FORMATS)}",
        ),
        (
            getattr(args, "enable_paged_experts", False),  # new in 0.5.23
            "--enable-paged-experts",
            "experts stay where they were loaded",
        ),
        (args.pp_size > 1, "--pp-size", "pipeline parallelism is not wired"),
        (
            args.moe_a2a_backend != "none",
            f"--moe-a2a-backend {args.moe_a2a_backend}",
            "the experts' all-to-all is not wired",
        ),
        (args.enable_two_batch_overlap, "--enable-two-batch-overlap", "it needs a model split in two batches"),
        (args.enable_pdmux, "--enable-pdmux", "it needs two attention backends at once"),
        (
            args.enable_eplb or args.ep_num_redundant_experts > 0 or args.init_expert_location != "trivial",
            "--enable-eplb (--ep-num-redundant-experts, --init-expert-location)",
            "each expert is expected once, in its place",
        ),
        (
            args.json_model_override_args not in (None, "", "{}"),
            "--json-model-override-args",
            "dsv4 reads config.json itself",
        ),
        (
            asked.cuda_graph_backend_prefill not in (None, "disabled"),
            f"--cuda-graph-backend-prefill {asked.cuda_graph_backend_prefill}",
            "a captured prefill would repeat the step that was captured",
        ),
        (bool(args.enable_lora or args.lora_paths), "--enable-lora", "LoRA is not wired"),
    )
    for refused, flag, reason in refusals:
        if refused:
            raise DeploymentError(
                f"{flag}: {reason}; leave it out, or set DSV4_MODE=off to serve with SGLang's own DeepSeek-V4"
            )
    check_draft(args, config)
    if config.expert_dtype == "fp4" and asked.moe_runner_backend not in ("auto", "marlin"):
        raise DeploymentError(
            f"--moe-runner-backend {asked.moe_runner_backend}: dsv4 runs FP4 experts with marlin alone; leave it out"
        )
    if args.dtype not in _DTYPES:
        raise DeploymentError(
            f"--dtype {args.dtype}: dsv4 runs V4 in bfloat16, and in float32 on a CPU; use one of them"
        )
    if args.device != "cpu":
        gpu = weakest(detect_devices())
        check_gpu(config, _DTYPES[args.dtype], gpu)
        if args.speculative_algorithm is not None and gpu.kind == "rocm":
            raise DeploymentError(
                "--speculative-algorithm on ROCm: SGLang verifies drafts by another kernel there, which is not tested"
                " with dsv4; leave it out"
            )
        if config.expert_dtype == "fp4":
            check_compilers()
    if why_not := config.why_not_sharded(args.tp_size):
        raise DeploymentError(f"--tp-size {why_not}")
    for flag, value in (
        ("--attention-backend", asked.attention_backend),
        ("--prefill-attention-backend", asked.prefill_attention_backend),
        ("--decode-attention-backend", asked.decode_attention_backend),
    ):
        if value not in (None, ATTENTION_BACKEND):
            raise DeploymentError(f"{flag} {value}: dsv4 serves V4 with {ATTENTION_BACKEND} alone; leave it out")
    chunk = args.chunked_prefill_size
    if chunk is not None and chunk > 0 and chunk % PAGE_TOKENS:
        raise DeploymentError(
            f"--chunked-prefill-size {chunk}: SGLang wants a multiple of V4's page of {PAGE_TOKENS} tokens"
        )
    on_cpu = args.device == "cpu"
    cache_formats(args.kv_cache_dtype, _DTYPES[args.dtype], args.enable_deepseek_v4_fp4_indexer, on_cpu=on_cpu)


def check_draft(args: Any, config: V4Config) -> None:
    """Refuse a way to draft that the checkpoint does not carry or dsv4 does not have. Raises
    DeploymentError."""
    algorithm = args.speculative_algorithm
    if algorithm is None:
        return
    way_out = f"use {MTP_ALGORITHMS[0]}" if config.draft == "mtp" else "leave it out"
    if algorithm.upper() not in MTP_ALGORITHMS or config.draft != "mtp":
        raise DeploymentError(
            f"--speculative-algorithm {algorithm}: the checkpoint carries {config.draft_in_words}, and dsv4 drafts with MTP alone in"
            f" SGLang; {way_out}, or set DSV4_MODE=off to serve with SGLang's own DeepSeek-V4"
        )
    k = drafted_steps(args)
    if not 1 <= k <= MOST_DRAFTED:
        raise DeploymentError(f"--speculative-num-steps {k}: use 1 to {MOST_DRAFTED}")
    given = (
        ("--speculative-eagle-topk", args.speculative_eagle_topk, 1, "one token is drafted after each"),
        (
            "--speculative-num-draft-tokens",
            args.speculative_num_draft_tokens,
            k + 1,
            f"a step verifies the {k} drafted and the one before them",
        ),
    )
    for flag, found, wanted, reason in given:
        if found not in (None, wanted):
            raise DeploymentError(f"{flag} {found}: {reason}; use {wanted}, or leave it out")
    if args.speculative_draft_model_path not in (None, args.model_path):
        raise DeploymentError(
            f"--speculative-draft-model-path {args.speculative_draft_model_path}: the draft is in the checkpoint; leave"
            " it out"
        )
    for flag, only in _DRAFTED_SO_ONLY.items():
        found = getattr(args, flag[2:].replace("-", "_"))
        if found != only:
            raise DeploymentError(f"{flag} {found}: it is not tested with dsv4's drafts; leave it out")


def drafted_steps(args: Any) -> int:
    """Tokens to draft: as asked, or as many as SGLang drafts for its own V4."""
    return 3 if args.speculative_num_steps is None else int(args.speculative_num_steps)


def check_compilers() -> None:
    """Refuse a machine on which SGLang cannot compile Marlin, which it does behind the download of
    the weights. Raises DeploymentError naming what is missing."""
    if missing := missing_compilers():
        raise DeploymentError(missing)


def check_gpu(config: V4Config, dtype: torch.dtype, gpu: Device) -> None:
    """Refuse what SGLang's GPU kernels lack, before they fail to compile in the first step. Raises
    DeploymentError."""
    if dtype is torch.float32:
        raise DeploymentError("--dtype float32: V4 is served in float32 on a CPU alone; leave it out")
    if config.expert_dtype == "fp4" and gpu.kind == "rocm":
        raise DeploymentError(
            "expert_dtype fp4 on ROCm: SGLang runs FP4 experts for dsv4 by Marlin, which is for NVIDIA GPUs alone;"
            " serve a checkpoint with FP8 experts, or set DSV4_MODE=off to serve with SGLang's own DeepSeek-V4"
        )
    if config.expert_dtype == "fp8" and gpu.capability is not None and gpu.capability < (8, 9):
        raise DeploymentError(
            f"expert_dtype fp8: SGLang runs FP8 experts by kernels that multiply in fp8, which {gpu.arch} cannot;"
            " serve a checkpoint with FP4 experts, or this one on sm89 or newer"
        )


def check_checkpoint(folder: str, load_format: str, config: V4Config) -> None:
    """Compare a local checkpoint's headers with its config. Raises CheckpointError naming what does
    not fit."""
    if Path(folder).is_dir() and load_format != "dummy":
        validate(folder, config)
