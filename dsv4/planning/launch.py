# SPDX-License-Identifier: Apache-2.0
"""From a deployment to command lines: argv per node; `dsv4.planning.manifests` writes them down.

Only spellings that parse on every tested version are used. Several nodes start through the engines'
own multi-node mode. `Var` marks what only the machine knows (its rank, the head's address).
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from dsv4.model.kv_layout import IndexFormat, KvFormat
from dsv4.planning.deployment import Deployment
from dsv4.planning.recipe.schema import Recipe

WATCHDOG_S = 1800  # kernels compile in the first steps, longer than SGLang's watchdog of 300 s waits
MASTER_PORT = 29501
DP_RPC_PORT = 13345


@dataclass(frozen=True)
class Var:
    """A value known when the node starts. shell: how a shell derives it from NODE_RANK and
    HEAD_ADDR, "" when given.
    """

    name: str
    shell: str = ""


Arg = str | Var
NODE_RANK, HEAD_ADDR, API_KEY = Var("NODE_RANK"), Var("HEAD_ADDR"), Var("API_KEY")
HEAD_ADDR_PORT = Var("HEAD_ADDR_PORT", f'"$HEAD_ADDR:{MASTER_PORT}"')


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where the engine listens: this machine alone, unless a host is given. served_name: "" keeps
    the model's; ask_key: SGLang demands $API_KEY of its clients.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    served_name: str = ""
    ask_key: bool = False


@dataclass(frozen=True)
class Command:
    """One process per node. role: head or worker (equal when the engine tells them apart by rank
    alone).
    """

    role: str
    args: tuple[Arg, ...]
    replicas_per_node: int = 1

    def shell(self) -> str:
        """Quoted for a POSIX shell; variables expand."""
        return " ".join(f'"${a.name}"' if isinstance(a, Var) else shlex.quote(a) for a in self.args)

    def argv(self, node_rank: int = 0, head_addr: str = "HEAD_ADDR") -> list[str]:
        """Plain arguments for node `node_rank`."""
        values = {"NODE_RANK": str(node_rank), "HEAD_ADDR": head_addr, "HEAD_ADDR_PORT": f"{head_addr}:{MASTER_PORT}"}
        values["API_KEY"] = "API_KEY"
        values["DP_START_RANK"] = str(node_rank * self.replicas_per_node)
        return [values[a.name] if isinstance(a, Var) else a for a in self.args]

    def prelude(self) -> list[str]:
        """Shell assignments of the variables that are derived."""
        used = {a.name: a for a in self.args if isinstance(a, Var) and a.shell}
        return [f"{name}={a.shell}" for name, a in used.items()]


def commands(recipe: Recipe) -> list[Command]:
    """What to run on the head and, with several nodes, on the workers."""
    return deployment_commands(recipe.deployment(), recipe.checkpoint.revision, tuple(recipe.extra_args))


def deployment_commands(
    d: Deployment,
    revision: str = "main",
    extra_args: tuple[str, ...] = (),
    endpoint: Endpoint = Endpoint(),
) -> list[Command]:
    """As `commands`, from the typed fields alone; of one engine where there are several."""
    d = d.one_engine
    render = _vllm if d.engine == "vllm" else _sglang
    roles = ["head", "worker"] if d.nodes > 1 else ["head"]
    return [
        Command(role, (*render(d, revision, role, endpoint), *extra_args), max(d.dp // d.nodes, 1)) for role in roles
    ]


def _revision(d: Deployment, revision: str) -> list[Arg]:
    return ["--revision", revision] if d.checkpoint.released else []  # a folder has none


def _vllm(d: Deployment, revision: str, role: str, endpoint: Endpoint) -> list[Arg]:
    args: list[Arg] = ["vllm", "serve", d.checkpoint.repo, *_revision(d, revision)]
    args += ["--tensor-parallel-size", str(d.tp)]
    if d.pp > 1:
        args += ["--pipeline-parallel-size", str(d.pp)]
    if d.dp > 1:
        args += ["--data-parallel-size", str(d.dp)]
    if d.ep:
        args += ["--enable-expert-parallel"]
    if d.redundant_experts:
        args += ["--enable-eplb", "--eplb-config", json.dumps({"num_redundant_experts": d.redundant_experts})]
    if d.a2a_backend != "none":
        args += ["--all2all-backend", d.a2a_backend]
    args += ["--max-model-len", str(d.max_model_len), "--max-num-batched-tokens", str(d.max_num_batched_tokens)]
    args += ["--max-num-seqs", str(d.max_num_seqs), "--gpu-memory-utilization", str(d.memory_fraction)]
    args += ["--async-scheduling" if d.async_scheduling else "--no-async-scheduling"]
    args += ["--kv-cache-dtype", "fp8_ds_mla" if d.kv is KvFormat.FP8_DS_MLA else "auto", "--block-size", "256"]
    if d.index is not IndexFormat.PLAIN:
        args += ["--attention-config.indexer_kv_dtype", d.index.value]
    if d.moe_backend != "auto":
        args += ["--moe-backend", d.moe_backend]
    if d.attention_backend != "auto":
        args += ["--attention-backend", d.attention_backend]
    if d.has_draft:
        args += [
            "--speculative-config",
            json.dumps({"method": d.speculation.method, "num_speculative_tokens": d.speculation.num_tokens}),
        ]
    if d.decode_graphs_only:
        args += ["--compilation-config", json.dumps({"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"})]
    elif d.max_capture_size is not None:
        args += ["--compilation-config", json.dumps({"mode": 0, "cudagraph_mode": "FULL_AND_PIECEWISE"})]
        args += ["--max-cudagraph-capture-size", str(d.max_capture_size)]
    args += ["--tokenizer-mode", "deepseek_v4", "--reasoning-parser", "deepseek_v4"]
    args += ["--enable-auto-tool-choice", "--tool-call-parser", "deepseek_v4"]
    return [*args, *_vllm_nodes(d, role), *(_listen(endpoint) if role == "head" else [])]


def _listen(endpoint: Endpoint) -> list[Arg]:
    name: list[Arg] = ["--served-model-name", endpoint.served_name] if endpoint.served_name else []
    return [*name, "--host", endpoint.host, "--port", str(endpoint.port)]


def _vllm_nodes(d: Deployment, role: str) -> list[Arg]:
    if d.nodes == 1:
        return []
    headless: list[Arg] = ["--headless"] if role == "worker" else []
    per_node = d.count // d.nodes
    if d.dp > 1 and d.tp * d.pp <= per_node:  # whole replicas per node: the data-parallel mode starts them
        local = d.dp // d.nodes
        rank = Var("DP_START_RANK", f"$((NODE_RANK * {local}))")
        start: list[Arg] = ["--data-parallel-start-rank", rank] if role == "worker" else []
        return ["--data-parallel-size-local", str(local), *start, "--data-parallel-address", HEAD_ADDR,
                "--data-parallel-rpc-port", str(DP_RPC_PORT), *headless]  # fmt: skip
    return [
        "--nnodes",
        str(d.nodes),
        "--node-rank",
        NODE_RANK,
        "--master-addr",
        HEAD_ADDR,
        "--master-port",
        str(MASTER_PORT),
        *headless,
    ]


def _sglang(d: Deployment, revision: str, role: str, endpoint: Endpoint) -> list[Arg]:
    args: list[Arg] = ["sglang", "serve", "--model-path", d.checkpoint.repo, *_revision(d, revision)]
    args += ["--tp-size", str(d.tp * d.dp)]
    if d.dp > 1:
        args += ["--attn-dp-size", str(d.dp)]
    if d.ep:
        args += ["--ep-size", str(d.tp * d.dp)]
    if d.redundant_experts:
        args += ["--ep-num-redundant-experts", str(d.redundant_experts)]
    if d.pp > 1:
        args += ["--pp-size", str(d.pp)]
    args += ["--context-length", str(d.max_model_len)]
    # SGLang divides both by the attention replicas.
    args += [
        "--chunked-prefill-size",
        str(d.max_num_batched_tokens * d.dp),
        "--max-running-requests",
        str(d.max_num_seqs * d.dp),
    ]
    args += ["--cuda-graph-max-bs-decode", str(d.max_num_seqs)]
    args += ["--mem-fraction-static", str(d.memory_fraction)]
    args += [] if d.async_scheduling else ["--disable-overlap-schedule"]
    args += ["--kv-cache-dtype", "fp8_e4m3" if d.kv is KvFormat.FP8_DS_MLA else "bfloat16"]
    if d.index is IndexFormat.MXFP4:
        args += ["--enable-deepseek-v4-fp4-indexer"]
    if d.swa_full_tokens_ratio is not None:
        args += ["--swa-full-tokens-ratio", str(d.swa_full_tokens_ratio)]
    if d.moe_backend != "auto":
        args += ["--moe-runner-backend", d.moe_backend]
    if d.a2a_backend != "none":
        args += ["--moe-a2a-backend", d.a2a_backend]
    if d.attention_backend != "auto":
        args += ["--dsv4-attn-backend", d.attention_backend]
    args += _sglang_speculation(d)
    args += ["--reasoning-parser", "deepseek-v4", "--tool-call-parser", "deepseekv4"]
    if d.nodes > 1:
        args += ["--nnodes", str(d.nodes), "--node-rank", NODE_RANK, "--dist-init-addr", HEAD_ADDR_PORT]
    key: list[Arg] = ["--api-key", API_KEY] if endpoint.ask_key else []
    return [*args, "--watchdog-timeout", str(WATCHDOG_S), *key, *_listen(endpoint)]


def _sglang_speculation(d: Deployment) -> list[Arg]:
    if d.speculation.method == "mtp":
        steps = str(d.speculation.num_tokens)
        return ["--speculative-algorithm", "EAGLE", "--speculative-num-steps", steps, "--speculative-eagle-topk", "1",
                "--speculative-num-draft-tokens", str(d.speculation.num_tokens + 1)]  # fmt: skip
    if d.speculation.method == "dspark":
        return [
            "--speculative-algorithm",
            "DSPARK",
            "--speculative-num-draft-tokens",
            str(d.speculation.num_tokens + 1),
        ]
    return []


def split_roles(cmds: Sequence[Command]) -> dict[str, list[str]]:
    """Plain argv by role."""
    return {c.role: c.argv(node_rank=i) for i, c in enumerate(cmds)}
