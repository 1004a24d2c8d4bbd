# SPDX-License-Identifier: Apache-2.0
"""Everything dsv4 adds to a running vLLM beyond its plugin interfaces. Each entry names its cause
and its end."""

from __future__ import annotations

import multiprocessing
from typing import Any

import torch
from torch import Tensor

from dsv4_vllm import draft_ops

_CPU_OPS = torch.library.Library("_C", "FRAGMENT")


def define_cpu_ops() -> None:
    """Give the stock wheel the operators that its Python code calls on every CPU and only CPU
    builds carry.

    Until the published wheel contains its CPU extension; then delete. An operator that exists is
    left alone.
    """
    _define("init_cpu_memory_env(int[] nodes) -> ()", lambda nodes: None)
    _define("greedy_argmax(Tensor logits) -> Tensor", lambda logits: logits.argmax(-1).view(-1))
    _define("fused_gumbel_argmax(Tensor logits, Tensor seeds) -> Tensor", _gumbel_argmax)
    _define(
        "compute_slot_mapping_kernel_impl(Tensor query_start_loc, Tensor positions, Tensor block_table,"
        " Tensor(a!) slot_mapping, int block_size) -> ()",
        _slot_mapping,
    )
    for schema, function in draft_ops.OPS:
        _define(schema, function)


def _define(schema: str, function: Any) -> None:
    name = schema.split("(")[0]
    if not hasattr(torch.ops._C, name):
        _CPU_OPS.define(schema)
        _CPU_OPS.impl(name, function, "CompositeExplicitAutograd")


def _gumbel_argmax(logits: Tensor, seeds: Tensor) -> Tensor:
    """Sample one token per row by exponential races, each row from its own seed."""
    logprobs = logits.float().log_softmax(-1)
    race = torch.empty_like(logprobs)
    for row, seed in zip(race, seeds.tolist(), strict=True):
        row.exponential_(generator=torch.Generator().manual_seed(seed))
    return (logprobs - race.log()).argmax(-1)


def _slot_mapping(
    query_start_loc: Tensor, positions: Tensor, block_table: Tensor, slot_mapping: Tensor, block_size: int
) -> None:
    """slot = block * block_size + offset per token; -1 beyond the last token.

    Groups with one block per request get no meaningful slots: the V1 runner asks for them all the
    same.
    """
    num_tokens = int(query_start_loc[-1])
    lens = query_start_loc.diff().long()
    request = torch.repeat_interleave(torch.arange(lens.numel()), lens)
    at = positions[:num_tokens]
    block = (at // block_size).clamp(max=block_table.shape[1] - 1)
    slot_mapping[:num_tokens] = block_table[request, block].long() * block_size + at % block_size
    slot_mapping[num_tokens:] = -1


def _slot_mapping_kernel(
    num_tokens: int,
    max_num_tokens: int,
    query_start_loc_ptr: Tensor,
    positions_ptr: Tensor,
    block_table_ptr: Tensor,
    block_table_stride: int,
    slot_mapping_ptr: Tensor,
    KV_CACHE_BLOCK_SIZE: int,
    TOTAL_CP_WORLD_SIZE: int,
    TOTAL_CP_RANK: int,
    CP_KV_CACHE_INTERLEAVE_SIZE: int,
    PAD_ID: int,
    BLOCK_SIZE: int,
) -> None:
    _slot_mapping(query_start_loc_ptr, positions_ptr, block_table_ptr, slot_mapping_ptr, KV_CACHE_BLOCK_SIZE)


def repair_slot_mapping() -> None:
    """vLLM 0.32: the slot-mapping kernel lost two parameters that its CPU stand-in kept, so
    arguments shift.

    Fixed in 0.33; delete when 0.32 leaves the supported range.
    """
    from vllm.triton_utils.dispatcher import KernelOverride, register_kernels
    from vllm.v1.worker.block_table import ComputeSlotMappingKernel

    kernel = ComputeSlotMappingKernel.kernel
    if isinstance(kernel, KernelOverride) and "block_size" not in kernel.arg_names:
        register_kernels({"vllm.v1.worker.block_table.ComputeSlotMappingKernel.kernel": _slot_mapping_kernel})


def repair_sampling_with_drafts() -> None:
    """vLLM 0.32 and 0.33: the stand-in that spreads temperatures over drafted tokens writes to an
    int64 copy of its float output, so that tokens are sampled by what the memory held.

    Delete when the adapter copies back; the test of sampled drafts says when.
    """
    from vllm.triton_utils.dispatcher import register_kernels

    register_kernels({"vllm.v1.sample.rejection_sampler.expand_kernel": _expand_kernel})


def _expand_kernel(
    output_ptr: Tensor,
    input_ptr: Tensor,
    cu_num_tokens_ptr: Tensor,
    replace_from: int,
    replace_to: int,
    MAX_NUM_TOKENS: int,
) -> None:
    draft_ops.expand(output_ptr, input_ptr, cu_num_tokens_ptr, replace_from, replace_to)


def keep_plain_linears() -> None:
    """Half-precision weights stay as PyTorch reads them: on a CPU with AMX vLLM would repack them
    with its C++ extension.

    Until the published wheel contains its CPU extension; then delete.
    """
    if not hasattr(torch.ops._C, "convert_weight_packed"):
        from vllm.model_executor.layers import utils

        utils.check_cpu_sgl_kernel = lambda n, k, dtype: False


def add_status() -> None:
    """Let a server prove who serves V4: a worker method, and `GET /dsv4/status` that asks every
    worker.

    vLLM's own endpoint plugins stay off unless VLLM_PLUGINS names them, which would silence every
    other plugin; the route therefore joins the router that serves /version. Delete when endpoint
    plugins can be on by default.
    """
    from vllm.v1.worker.worker_base import WorkerBase

    from dsv4.proof.status import STATUS_RPC
    from dsv4_vllm.status import add_route, worker_status

    setattr(WorkerBase, STATUS_RPC, worker_status)
    process = multiprocessing.current_process().name
    if process == "MainProcess" or process.startswith("ApiServer"):
        add_route()
