# SPDX-License-Identifier: Apache-2.0
"""Rules across fields that no parser checks: shapes that kernels refuse, features a card or a
checkpoint lacks.

Each rule names its cause. `violations` lists every broken one; a deployment without any may still
not fit (memory.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from dsv4.model.config import FP8_BLOCK
from dsv4.model.kv_layout import IndexFormat
from dsv4.planning.deployment import Deployment

DEEPEP_DISPATCH_ENV = "SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK"
DEEPEP_DISPATCH_DEFAULT = 128
SHARED_EXPERT_ENV = "SGLANG_SHARED_EXPERT_TP1"
_MEGA_MOE = ("deep_gemm_mega_moe", "megamoe", "flashinfer_megamoe")


def violations(d: Deployment, env: Mapping[str, str] | None = None) -> list[str]:
    """Why `d` cannot run, one sentence each; empty when nothing stands against it."""
    variables = env or {}
    return [*_topology(d), *_shards(d, variables), *_batching(d), *_speculation(d), *_card(d), *_experts(d, variables)]


def _topology(d: Deployment) -> Iterator[str]:
    if d.tp * d.dp * d.pp * d.replicas != d.count:
        yield f"tp x dp x pp is {d.tp * d.dp * d.pp * d.replicas}, the deployment has {d.count} GPUs"
    if d.pp > d.config.num_hidden_layers:
        yield f"PP{d.pp} has more stages than {d.checkpoint.id} has layers ({d.config.num_hidden_layers})"
    if d.count % d.nodes:
        yield f"{d.count} GPUs do not divide over {d.nodes} nodes"
    elif d.count // d.nodes > d.gpu.gpus_per_node:
        yield f"{d.count // d.nodes} GPUs per node: {d.gpu.id} nodes have at most {d.gpu.gpus_per_node}"
    elif d.tp > d.count // d.nodes and d.gpu.arch == "x86_64":
        yield f"TP{d.tp} crosses nodes of {d.count // d.nodes} GPUs, whose links are too slow for it; use DP or PP across nodes"


def _shards(d: Deployment, env: Mapping[str, str]) -> Iterator[str]:
    c = d.config
    for name, n in (
        ("attention heads", c.num_attention_heads),
        ("output groups", c.o_groups),
        ("index heads", c.index_n_heads),
    ):
        if n % d.tp:
            yield f"TP{d.tp} does not divide {n} {name}"
    shard = c.moe_intermediate_size // d.tp
    if shard % FP8_BLOCK and not (d.engine == "sglang" and env.get(SHARED_EXPERT_ENV) == "1"):
        yield f"TP{d.tp} cuts the shared expert to {shard} columns, no multiple of the FP8 block {FP8_BLOCK}; use DP or PP instead"
    ranks = d.tp * d.dp
    if d.redundant_experts and (ranks > c.n_routed_experts or d.gpu.needs_plugin):
        yield f"{c.n_routed_experts} experts do not divide over {ranks} ranks"
    if not d.ep and (c.moe_intermediate_size // ranks) % FP8_BLOCK:
        yield f"without EP, {ranks} ranks cut each routed expert to {c.moe_intermediate_size / ranks:g} columns; turn EP on"


def _batching(d: Deployment) -> Iterator[str]:
    per_request = 1 + d.speculation.num_tokens
    if d.max_num_seqs * per_request > d.max_num_batched_tokens:
        yield (
            f"max_num_seqs {d.max_num_seqs} x {per_request} tokens exceeds max_num_batched_tokens {d.max_num_batched_tokens}:"
            " a full decode step would not fit one batch"
        )
    if d.max_capture_size is not None and d.decode_graphs_only:
        yield "max_capture_size captures mixed steps too, graphs: decode_only forbids it; leave one out"
    if d.max_capture_size is not None and d.engine == "sglang":
        yield "max_capture_size is vLLM's; SGLang captures decode steps of up to max_num_seqs requests"
    if d.swa_full_tokens_ratio is not None and d.engine == "vllm":
        yield "swa_full_tokens_ratio is SGLang's; vLLM sizes windows itself"


def _speculation(d: Deployment) -> Iterator[str]:
    method, tokens = d.speculation.method, d.speculation.num_tokens
    if (method == "none") != (tokens == 0):
        yield f"speculative method {method} with {tokens} draft tokens"
    if method != "none" and method != d.config.draft:
        yield f"{d.checkpoint.id} carries a {d.config.draft} draft, not {method}: the engine would miss its tensors (KeyError)"
    if method != "none" and d.pp > 1:
        yield "speculation with pipeline stages is untested in both engines; turn one off"
    if d.engine == "sglang" and tokens + 1 > 10:
        yield f"SGLang's ratio-4 state ring serves at most 10 draft tokens, {tokens + 1} asked"


def _card(d: Deployment) -> Iterator[str]:
    major, _ = d.gpu.capability
    if d.index is IndexFormat.MXFP4 and major != 10:
        yield f"mxfp4 index keys exist on compute capability 10.x only; {d.gpu.id} is {d.gpu.cc}: use fp8"
    if d.gpu.needs_plugin and (d.dp > 1 or d.has_draft or (d.pp > 1 and d.engine == "sglang")):
        yield (
            f"{d.gpu.id} (cc {d.gpu.cc}) is served by dsv4's plugin, whose drafts (in vLLM alone) are not planned yet,"
            " which has no DP attention, and pipeline stages in vLLM alone"
        )
    if d.gpu.needs_plugin and d.checkpoint.unserved:
        yield f"{d.gpu.id} is served by dsv4's plugin, which does not serve this checkpoint: {d.checkpoint.unserved}"
    if d.moe_backend in _MEGA_MOE or d.a2a_backend in _MEGA_MOE:
        if major != 10:
            yield f"mega MoE needs compute capability 10.x; {d.gpu.id} is {d.gpu.cc}"
        if not d.ep:
            yield "mega MoE needs expert parallelism"


def _experts(d: Deployment, env: Mapping[str, str]) -> Iterator[str]:
    if d.a2a_backend == "none":
        return
    if not d.ep:
        yield f"all-to-all backend {d.a2a_backend} needs expert parallelism"
    if d.engine == "sglang" and d.a2a_backend == "deepep":
        bound = int(env.get(DEEPEP_DISPATCH_ENV, DEEPEP_DISPATCH_DEFAULT))
        tokens = d.max_num_seqs * (1 + d.speculation.num_tokens)
        if tokens > bound:
            yield f"DeepEP dispatches at most {bound} tokens per rank ({DEEPEP_DISPATCH_ENV}), a full step has {tokens}: it would abort"
