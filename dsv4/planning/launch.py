# SPDX-License-Identifier: Apache-2.0
"""From a deployment to command lines: argv per node, and shell, compose and Kubernetes around it.

Only spellings that parse on every tested version are used. Several nodes start through the engines'
own multi-node mode. `Var` marks what only the machine knows (its rank, the head's address).
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from dsv4.model.kv_layout import IndexFormat, KvFormat
from dsv4.planning.deployment import Deployment
from dsv4.planning.recipe.schema import Recipe

PORT = 8000
MASTER_PORT = 29501
DP_RPC_PORT = 13345
IMAGES = {"vllm": "vllm/vllm-openai:v{}", "sglang": "lmsysorg/sglang:v{}"}


@dataclass(frozen=True)
class Var:
    """A value known when the node starts. shell: how a shell derives it from NODE_RANK and
    HEAD_ADDR, "" when given.
    """

    name: str
    shell: str = ""


Arg = str | Var
NODE_RANK, HEAD_ADDR = Var("NODE_RANK"), Var("HEAD_ADDR")
HEAD_ADDR_PORT = Var("HEAD_ADDR_PORT", f'"$HEAD_ADDR:{MASTER_PORT}"')


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
        values["DP_START_RANK"] = str(node_rank * self.replicas_per_node)
        return [values[a.name] if isinstance(a, Var) else a for a in self.args]

    def prelude(self) -> list[str]:
        """Shell assignments of the variables that are derived."""
        used = {a.name: a for a in self.args if isinstance(a, Var) and a.shell}
        return [f"{name}={a.shell}" for name, a in used.items()]


def commands(recipe: Recipe) -> list[Command]:
    """What to run on the head and, with several nodes, on the workers."""
    return deployment_commands(recipe.deployment(), recipe.checkpoint.revision, tuple(recipe.extra_args))


def deployment_commands(d: Deployment, revision: str = "main", extra_args: tuple[str, ...] = ()) -> list[Command]:
    """As `commands`, from the typed fields alone; of one engine where there are several."""
    d = d.one_engine
    render = _vllm if d.engine == "vllm" else _sglang
    roles = ["head", "worker"] if d.nodes > 1 else ["head"]
    return [Command(role, (*render(d, revision, role), *extra_args), max(d.dp // d.nodes, 1)) for role in roles]


def environment(recipe: Recipe) -> dict[str, str]:
    """Variables of every node: the recipe's own."""
    return dict(sorted(recipe.env.items()))


def _revision(d: Deployment, revision: str) -> list[Arg]:
    return ["--revision", revision] if d.checkpoint.released else []  # a folder has none


def _vllm(d: Deployment, revision: str, role: str) -> list[Arg]:
    args: list[Arg] = ["vllm", "serve", d.checkpoint.repo, *_revision(d, revision)]
    args += ["--tensor-parallel-size", str(d.tp)]
    if d.pp > 1:
        args += ["--pipeline-parallel-size", str(d.pp)]
    if d.dp > 1:
        args += ["--data-parallel-size", str(d.dp)]
    if d.ep:
        args += ["--enable-expert-parallel"]
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
    args += ["--tokenizer-mode", "deepseek_v4", "--reasoning-parser", "deepseek_v4"]
    args += ["--enable-auto-tool-choice", "--tool-call-parser", "deepseek_v4"]
    return [*args, *_vllm_nodes(d, role), *(["--host", "0.0.0.0", "--port", str(PORT)] if role == "head" else [])]  # noqa: S104


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


def _sglang(d: Deployment, revision: str, role: str) -> list[Arg]:
    args: list[Arg] = ["sglang", "serve", "--model-path", d.checkpoint.repo, *_revision(d, revision)]
    args += ["--tp-size", str(d.tp * d.dp)]
    if d.dp > 1:
        args += ["--attn-dp-size", str(d.dp)]
    if d.ep:
        args += ["--ep-size", str(d.tp * d.dp)]
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
    return [*args, "--host", "0.0.0.0", "--port", str(PORT)]  # noqa: S104


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


# --------------------------------------------------------------------------------------------
# Formats


def render(recipe: Recipe, output: str) -> str:
    """The recipe as `shell`, `compose`, `k8s` or `argv` (JSON, one list per role)."""
    return {"shell": _shell, "compose": _compose, "k8s": _k8s, "argv": _argv}[output](recipe)


def _argv(recipe: Recipe) -> str:
    rows = [c.argv(node_rank=i) for i, c in enumerate(commands(recipe))]
    return "\n".join(json.dumps(row) for row in rows)


def _header(recipe: Recipe) -> list[str]:
    lines = [
        f"{recipe.id}: {recipe.title}",
        f"status: {recipe.status}; engine: {recipe.engine.name} {recipe.version_range}",
    ]
    if recipe.engine.serves_with == "plugin":
        lines.append(
            "served by dsv4's plugin: pip install dsv4 beside the engine on every node, then check with dsv4 doctor"
        )
    return [f"# {' '.join(line.split())}" for line in lines]  # a title with a newline must stay a comment


def _shell(recipe: Recipe) -> str:
    exports = [f"export {k}={shlex.quote(v)}" for k, v in environment(recipe).items()]
    cmds = commands(recipe)
    if len(cmds) == 1:
        return "\n".join(["#!/bin/sh", *_header(recipe), *exports, f"exec {cmds[0].shell()}"])
    check = [
        f"# Run on each of the {recipe.hardware.nodes} nodes with NODE_RANK=0.. and HEAD_ADDR=<address of node 0> set.",
        ': "${NODE_RANK:?set NODE_RANK}" "${HEAD_ADDR:?set HEAD_ADDR}"',
    ]
    head, worker = cmds
    start = ["#!/bin/sh", *_header(recipe), *check, *exports, *worker.prelude()]
    if head.args == worker.args:
        return "\n".join([*start, f"exec {head.shell()}"])
    return "\n".join(
        [*start, 'if [ "$NODE_RANK" = 0 ]; then', f"  exec {head.shell()}", "else", f"  exec {worker.shell()}", "fi"]
    )


def _image(recipe: Recipe) -> str:
    return IMAGES[recipe.engine.name].format(recipe.versions[-1])


def _script(recipe: Recipe, command: Command) -> list[str]:
    """Container entry point: a shell, because node facts arrive as variables."""
    install = f"pip install --no-deps 'dsv4[{recipe.engine.name}]' && " if recipe.engine.serves_with == "plugin" else ""
    return ["/bin/sh", "-c", install + "; ".join([*command.prelude(), f"exec {command.shell()}"])]


def _compose(recipe: Recipe) -> str:
    services = {}
    for command in commands(recipe):
        per_node = recipe.hardware.count // recipe.hardware.nodes
        # Compose would expand $NAME itself: double the sign, so that the container's shell does.
        script = [part.replace("$", "$$") for part in _script(recipe, command)]
        nodes = {k: f"${{{k}:?set {k}}}" for k in ("NODE_RANK", "HEAD_ADDR")} if recipe.hardware.nodes > 1 else {}
        services[command.role] = {
            "image": _image(recipe),
            "entrypoint": script[:2],
            "command": script[2:],
            "environment": {**environment(recipe), **nodes},
            "network_mode": "host",
            "ipc": "host",
            "shm_size": _shm(recipe),
            "ulimits": {"memlock": -1, "stack": 67108864},
            "volumes": ["${HF_HOME:-~/.cache/huggingface}:/root/.cache/huggingface"],
            "deploy": {
                "resources": {
                    "reservations": {"devices": [{"driver": "nvidia", "count": per_node, "capabilities": ["gpu"]}]}
                }
            },
            **({"profiles": [command.role]} if recipe.hardware.nodes > 1 else {}),
        }
    note = (
        ["# docker compose --profile head up on node 0, --profile worker up on the others"]
        if recipe.hardware.nodes > 1
        else []
    )
    return "\n".join([*_header(recipe), *note, _dump({"services": services})])


def _k8s(recipe: Recipe) -> str:
    cmds = commands(recipe)
    labels = {"app": recipe.id}
    if len(cmds) == 1:
        template = {"metadata": {"labels": labels}, "spec": _pod(recipe, cmds[0])}
        spec = {"replicas": 1, "selector": {"matchLabels": labels}, "template": template}
        workload = {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": recipe.id, "labels": labels},
            "spec": spec,
        }
        selector = labels
    else:
        group = {
            "size": recipe.hardware.nodes,
            "restartPolicy": "RecreateGroupOnPodRestart",
            "leaderTemplate": {"metadata": {"labels": {**labels, "role": "head"}}, "spec": _pod(recipe, cmds[0])},
            "workerTemplate": {"metadata": {"labels": labels}, "spec": _pod(recipe, cmds[1])},
        }
        workload = {
            "apiVersion": "leaderworkerset.x-k8s.io/v1",
            "kind": "LeaderWorkerSet",
            "metadata": {"name": recipe.id, "labels": labels},
            "spec": {"replicas": 1, "leaderWorkerTemplate": group},
        }
        selector = {**labels, "role": "head"}
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": recipe.id, "labels": labels},
        "spec": {"selector": selector, "ports": [{"name": "http", "port": PORT, "targetPort": PORT}]},
    }
    return "\n".join([*_header(recipe), _dump(workload).rstrip(), "---", _dump(service)])


def _pod(recipe: Recipe, command: Command) -> dict[str, Any]:
    per_node = recipe.hardware.count // recipe.hardware.nodes
    script = _script(recipe, command)
    if recipe.hardware.nodes > 1:
        # LeaderWorkerSet injects both into every container of the group.
        script[2] = f'NODE_RANK="$LWS_WORKER_INDEX"; HEAD_ADDR="$LWS_LEADER_ADDRESS"; {script[2]}'
    container: dict[str, Any] = {
        "name": recipe.engine.name,
        "image": _image(recipe),
        "command": script[:2],
        "args": script[2:],
        "env": [{"name": k, "value": v} for k, v in environment(recipe).items()],
        "resources": {"limits": {"nvidia.com/gpu": per_node}},
        "volumeMounts": [
            {"name": "shm", "mountPath": "/dev/shm"},  # noqa: S108
            {"name": "models", "mountPath": "/root/.cache/huggingface"},
        ],
    }
    if command.role == "head":
        probe = {"httpGet": {"path": "/health", "port": PORT}}
        container["ports"] = [{"containerPort": PORT}]
        # Loading 150 to 900 GB from a network volume takes up to 90 minutes.
        container["startupProbe"] = {**probe, "periodSeconds": 30, "failureThreshold": 180}
        container["readinessProbe"] = {**probe, "periodSeconds": 10}
    shm = {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": _shm(recipe).replace("gb", "Gi")}}
    models = {"name": "models", "persistentVolumeClaim": {"claimName": "huggingface-cache"}}
    return {"containers": [container], "volumes": [shm, models]}


def _shm(recipe: Recipe) -> str:
    return "64gb" if recipe.hardware.nodes > 1 else "32gb"


def _dump(data: Mapping[str, Any]) -> str:
    return yaml.dump(dict(data), Dumper=_PlainDumper, sort_keys=False, width=10_000)


class _PlainDumper(yaml.SafeDumper):
    """Without anchors: Kubernetes files are edited by hand."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def split_roles(cmds: Sequence[Command]) -> dict[str, list[str]]:
    """Plain argv by role."""
    return {c.role: c.argv(node_rank=i) for i, c in enumerate(cmds)}
