# SPDX-License-Identifier: Apache-2.0
"""A launch as a shell script, a compose file or Kubernetes objects: the commands of
`dsv4.planning.launch` with what surrounds them on a machine.

Nothing here names dsv4 to a package index: where the plugin serves, containers install the wheel
that WHEELS holds, or the path or URL given. Its dependencies are in every engine image, so
--no-deps keeps pip from replacing them and from asking an index.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import yaml

from dsv4.errors import PlanError
from dsv4.machine.compat import TESTED_VERSIONS, dsv4_version
from dsv4.planning.deployment import Deployment
from dsv4.planning.launch import Command, Endpoint, deployment_commands
from dsv4.planning.recipe.schema import Recipe

IMAGES = {"vllm": "vllm/vllm-openai:v{}", "sglang": "lmsysorg/sglang:v{}"}
WHEELS, MODELS = "/wheels", "/root/.cache/huggingface"
LOAD_BYTES_PER_S = 160e6  # 865 GB in the 90 minutes that a published recipe waits for them
COMPUTE_DOMAIN = "resource.nvidia.com/v1beta1"
_GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Overrides:
    """What a user changes of a launch; "" and 0 leave it. wheel: path or URL of dsv4's wheel."""

    context: int = 0
    host: str = ""
    port: int = 0
    model: str = ""
    served_name: str = ""
    image: str = ""
    wheel: str = ""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What every format renders. id: of Kubernetes objects; notes: comment lines at the top."""

    id: str
    notes: tuple[str, ...]
    deployment: Deployment
    revision: str
    extra_args: tuple[str, ...]
    env: Mapping[str, str]
    plugin: bool
    version: str
    overrides: Overrides = field(default_factory=Overrides)

    @property
    def image(self) -> str:
        """Raises PlanError where no image is known."""
        if self.overrides.image:
            return self.overrides.image
        if self.deployment.gpu.platform == "rocm":
            raise PlanError(f"{self.deployment.gpu.id}: no pinned image is known for ROCm; give one", "image")
        return IMAGES[self.deployment.engine].format(self.version)

    @property
    def port(self) -> int:
        return self.overrides.port or Endpoint.port

    @property
    def per_node(self) -> int:
        return self.deployment.count // self.deployment.nodes

    @property
    def load_s(self) -> int:
        """Seconds that loading may take from a network volume, in whole ten minutes."""
        return max(600, math.ceil(self.deployment.checkpoint.total_bytes / LOAD_BYTES_PER_S / 600) * 600)

    def commands(self, host: str, key: bool = False) -> list[Command]:
        """One command per role. key: SGLang is told to ask for $API_KEY; vLLM reads a variable."""
        o = self.overrides
        ask = key and self.deployment.engine == "sglang"
        endpoint = Endpoint(host=o.host or host, port=self.port, served_name=o.served_name, ask_key=ask)
        return deployment_commands(self.deployment, self.revision, self.extra_args, endpoint)

    def environment(self) -> dict[str, str]:
        """Variables of every node: the recipe's own, and what loading needs."""
        ready = {"VLLM_ENGINE_READY_TIMEOUT_S": str(self.load_s)} if self.deployment.engine == "vllm" else {}
        return dict(sorted({**ready, **self.env}.items()))


def of_recipe(recipe: Recipe, overrides: Overrides = Overrides()) -> Launch:
    """The launch that `recipe` describes."""
    return Launch(
        id=recipe.id,
        notes=(
            f"{recipe.id}: {recipe.title}",
            f"status: {recipe.status}; engine: {recipe.engine.name} {recipe.version_range}",
        ),
        deployment=_overridden(recipe.deployment(), overrides),
        revision=recipe.checkpoint.revision,
        extra_args=tuple(recipe.extra_args),
        env=recipe.env,
        plugin=recipe.engine.serves_with == "plugin",
        version=recipe.versions[-1],
        overrides=overrides,
    )


def of_plan(d: Deployment, settings: Mapping[str, str], plugin: bool, overrides: Overrides = Overrides()) -> Launch:
    """The launch of a planned deployment, of one engine where it has several. settings: dsv4's own
    variables.
    """
    one = d.one_engine
    name = f"{one.checkpoint.id}-{one.count}x-{one.gpu.id}-{one.engine}".lower().replace("_", "-").replace(".", "-")
    notes: tuple[str, ...] = (
        f"planned by dsv4: {one.checkpoint.id} on {one.count} x {one.gpu.id}, {one.engine} {one.shape}",
    )
    if d.replicas > 1:
        notes += (f"one of {d.replicas} engines: start each on GPUs of its own, behind a router",)
    return Launch(
        id=name,
        notes=notes,
        deployment=_overridden(one, overrides),
        revision="main",
        extra_args=(),
        env=settings,
        plugin=plugin,
        version=TESTED_VERSIONS[d.engine][-1],
        overrides=overrides,
    )


def _overridden(d: Deployment, o: Overrides) -> Deployment:
    if o.context:
        d = replace(d, max_model_len=o.context)
    if o.model:
        d = replace(d, checkpoint=replace(d.checkpoint, repo=o.model, released=""))
    return d


def render(launch: Launch, output: str) -> str:
    """`launch` as `shell`, `compose`, `k8s` or `argv` (JSON, one list per role)."""
    formats: dict[str, Callable[[Launch], str]] = {"shell": _shell, "compose": _compose, "k8s": _k8s, "argv": _argv}
    return formats[output](launch)


def _argv(launch: Launch) -> str:
    return "\n".join(json.dumps(c.argv(node_rank=i)) for i, c in enumerate(launch.commands("127.0.0.1")))


def _header(launch: Launch, *more: str) -> list[str]:
    lines = [*launch.notes, *more]
    if launch.plugin:
        lines.append(
            "served by dsv4's plugin, installed beside the engine from its wheel with --no-deps: the engine has its dependencies"
        )
    return [f"# {' '.join(line.split())}" for line in lines]  # a title with a newline must stay a comment


def _shell(launch: Launch) -> str:
    exports = [f"export {k}={shlex.quote(v)}" for k, v in launch.environment().items()]
    cmds = launch.commands("127.0.0.1")
    start = ["#!/bin/sh", *_header(launch)]
    if len(cmds) == 1:
        return "\n".join([*start, *exports, f"exec {cmds[0].shell()}"])
    head, worker = cmds
    start += [
        f"# Run on each of the {launch.deployment.nodes} nodes with NODE_RANK=0.. and HEAD_ADDR=<address of node 0> set.",
        ': "${NODE_RANK:?set NODE_RANK}" "${HEAD_ADDR:?set HEAD_ADDR}"',
        *exports,
        *worker.prelude(),
    ]
    if head.args == worker.args:
        return "\n".join([*start, f"exec {head.shell()}"])
    return "\n".join(
        [*start, 'if [ "$NODE_RANK" = 0 ]; then', f"  exec {head.shell()}", "else", f"  exec {worker.shell()}", "fi"]
    )


def _wheel(launch: Launch) -> str:
    return launch.overrides.wheel or f"{WHEELS}/dsv4-{dsv4_version()}-py3-none-any.whl"


def _script(launch: Launch, command: Command) -> list[str]:
    """Container entry point: a shell, because node facts arrive as variables."""
    install = f"pip install --no-deps {shlex.quote(_wheel(launch))} && " if launch.plugin else ""
    return ["/bin/sh", "-c", install + "; ".join([*command.prelude(), f"exec {command.shell()}"])]


def _several(launch: Launch) -> bool:
    return launch.deployment.nodes > 1


# --------------------------------------------------------------------------------------------
# Compose


def _compose(launch: Launch) -> str:
    services = {command.role: _service(launch, command) for command in launch.commands("127.0.0.1")}
    more = ["docker compose --profile head up on node 0, --profile worker up on the others"] if _several(launch) else []
    if launch.plugin and not launch.overrides.wheel:
        more.append(f"put the wheel into ./wheels first: {_wheel(launch)} is installed from there, offline")
    return "\n".join([*_header(launch, *more), _dump({"services": services})])


def _service(launch: Launch, command: Command) -> dict[str, Any]:
    # Compose would expand $NAME itself: double the sign, so that the container's shell does.
    script = [part.replace("$", "$$") for part in _script(launch, command)]
    nodes = {k: f"${{{k}:?set {k}}}" for k in ("NODE_RANK", "HEAD_ADDR")} if _several(launch) else {}
    hub = {"HF_TOKEN": "${HF_TOKEN:-}", "HF_HUB_OFFLINE": "${HF_HUB_OFFLINE:-0}"}
    own = {k: v.replace("$", "$$") for k, v in launch.environment().items()}
    amd = launch.deployment.gpu.platform == "rocm"
    gpus = {"driver": "nvidia", "count": launch.per_node, "capabilities": ["gpu"]}
    devices = (["/dev/kfd", "/dev/dri"] if amd else []) + (["/dev/infiniband"] if _several(launch) else [])
    probe = f"import urllib.request; urllib.request.urlopen('http://127.0.0.1:{launch.port}/health', timeout=10)"
    health = {
        "test": ["CMD", "python3", "-c", probe],
        "interval": "30s",
        "timeout": "15s",
        "retries": 6,
        "start_period": f"{launch.load_s}s",
    }
    return {
        "image": launch.image,
        "entrypoint": script[:2],
        "command": script[2:],
        "environment": {**own, **hub, **nodes},
        "network_mode": "host",
        "ipc": "host",
        "shm_size": _shm(launch),
        "ulimits": {"memlock": -1, "stack": 67108864},
        "restart": "unless-stopped",
        "volumes": [f"${{HF_HOME:-~/.cache/huggingface}}:{MODELS}", *_mounts(launch)],
        **({"healthcheck": health} if command.role == "head" else {}),
        **({"devices": devices} if devices else {}),
        **({"cap_add": ["IPC_LOCK"], "profiles": [command.role]} if _several(launch) else {}),
        **({} if amd else {"deploy": {"resources": {"reservations": {"devices": [gpus]}}}}),
    }


def _mounts(launch: Launch) -> list[str]:
    """Folders that the container reads under their own names: the wheel's and a local model's."""
    wheels = [f"./wheels:{WHEELS}:ro"] if launch.plugin and not launch.overrides.wheel else []
    model = launch.deployment.checkpoint.repo
    return [*wheels, *([f"{model}:{model}:ro"] if model.startswith("/") else [])]


# --------------------------------------------------------------------------------------------
# Kubernetes


def _k8s(launch: Launch) -> str:
    several, labels = _several(launch), {"app": launch.id}
    cmds = launch.commands("0.0.0.0", key=True)  # noqa: S104 - a pod's own address, and a key is asked for
    selector = {**labels, "role": "head"} if several else labels
    workload = _group(launch, cmds) if several else _deployment(launch, cmds[0])
    service = {"selector": selector, "ports": [{"name": "http", "port": launch.port, "targetPort": launch.port}]}
    objects = [
        _object("v1", "PersistentVolumeClaim", "huggingface-cache", {}, _claim(launch)),
        *([_domain(launch)] if _has_domain(launch) else []),
        workload,
        _object("v1", "Service", launch.id, labels, service),
    ]
    more = [
        f"first: kubectl create secret generic {launch.id}-key --from-literal=key=...",
        "and, for a gated or private model: kubectl create secret generic hf-token --from-literal=token=...",
    ]
    if several:
        more.append(
            "rdma/ib, eth0 and the nodes' GPU label are those of the NVIDIA operators' defaults: compare with yours"
        )
    if launch.plugin and not launch.overrides.wheel:
        more.append(f"the claim dsv4-wheels holds {_wheel(launch)}; --wheel takes another path or a URL")
    return "\n".join([*_header(launch, *more), "---\n".join(_dump(o) for o in objects)]).rstrip()


def _object(api: str, kind: str, name: str, labels: Mapping[str, str], spec: Mapping[str, Any]) -> dict[str, Any]:
    metadata = {"name": name, "labels": dict(labels)} if labels else {"name": name}
    return {"apiVersion": api, "kind": kind, "metadata": metadata, "spec": dict(spec)}


def _claim(launch: Launch) -> dict[str, Any]:
    size = math.ceil(launch.deployment.checkpoint.total_bytes * 1.2 / _GIB)
    mode = "ReadWriteMany" if _several(launch) else "ReadWriteOnce"
    return {"accessModes": [mode], "resources": {"requests": {"storage": f"{size}Gi"}}}


def _has_domain(launch: Launch) -> bool:
    """Several trays of one NVLink domain: GB200 and GB300."""
    return _several(launch) and launch.deployment.gpu.id in ("gb200", "gb300")


def _domain(launch: Launch) -> dict[str, Any]:
    channel = {"resourceClaimTemplate": {"name": f"{launch.id}-channel"}}
    spec = {"numNodes": launch.deployment.nodes, "channel": channel}
    return _object(COMPUTE_DOMAIN, "ComputeDomain", launch.id, {}, spec)


def _deployment(launch: Launch, command: Command) -> dict[str, Any]:
    labels = {"app": launch.id}
    # The GPUs are taken until the old pod is gone: a rolling update would wait for ever.
    spec = {
        "replicas": 1,
        "strategy": {"type": "Recreate"},
        "selector": {"matchLabels": labels},
        "template": {"metadata": {"labels": labels}, "spec": _pod(launch, command)},
    }
    return _object("apps/v1", "Deployment", launch.id, labels, spec)


def _group(launch: Launch, cmds: list[Command]) -> dict[str, Any]:
    labels = {"app": launch.id}
    group = {
        "size": launch.deployment.nodes,
        "restartPolicy": "RecreateGroupOnPodRestart",
        "leaderTemplate": {"metadata": {"labels": {**labels, "role": "head"}}, "spec": _pod(launch, cmds[0])},
        "workerTemplate": {"metadata": {"labels": labels}, "spec": _pod(launch, cmds[1])},
    }
    spec = {"replicas": 1, "leaderWorkerTemplate": group}
    return _object("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet", launch.id, labels, spec)


def _pod(launch: Launch, command: Command) -> dict[str, Any]:
    several = _several(launch)
    script = _script(launch, command)
    if several:
        # LeaderWorkerSet injects both into every container of the group.
        given = {"NODE_RANK": "LWS_WORKER_INDEX", "HEAD_ADDR": "LWS_LEADER_ADDRESS"}
        named = [f'{name}="${source}"; ' for name, source in given.items() if name in script[2]]
        script[2] = "".join(named) + script[2]
    resource = "amd.com/gpu" if launch.deployment.gpu.platform == "rocm" else "nvidia.com/gpu"
    limits: dict[str, Any] = {resource: launch.per_node, **({"rdma/ib": 1} if several else {})}
    container: dict[str, Any] = {
        "name": launch.deployment.engine,
        "image": launch.image,
        "command": script[:2],
        "args": script[2:],
        "env": _env(launch),
        "resources": {"limits": limits},
        "volumeMounts": [
            {"name": "shm", "mountPath": "/dev/shm"},  # noqa: S108
            {"name": "models", "mountPath": MODELS},
        ],
    }
    shm = {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": _shm(launch).replace("gb", "Gi")}}
    models = {"name": "models", "persistentVolumeClaim": {"claimName": "huggingface-cache"}}
    pod: dict[str, Any] = {"containers": [container], "volumes": [shm, models]}
    if several:
        container["securityContext"] = {"capabilities": {"add": ["IPC_LOCK"]}}
    if _has_domain(launch):
        container["resources"]["claims"] = [{"name": "nvlink"}]
        pod["resourceClaims"] = [{"name": "nvlink", "resourceClaimTemplateName": f"{launch.id}-channel"}]
    if launch.plugin and not launch.overrides.wheel:
        container["volumeMounts"].append({"name": "wheels", "mountPath": WHEELS, "readOnly": True})
        pod["volumes"].append({"name": "wheels", "persistentVolumeClaim": {"claimName": "dsv4-wheels"}})
    if command.role == "head":
        probe = {"httpGet": {"path": "/health", "port": launch.port}, "timeoutSeconds": 10}
        container["ports"] = [{"containerPort": launch.port}]
        container["startupProbe"] = {**probe, "periodSeconds": 30, "failureThreshold": launch.load_s // 30}
        container["readinessProbe"] = {**probe, "periodSeconds": 10}
        container["livenessProbe"] = {**probe, "periodSeconds": 30, "failureThreshold": 10}
    if launch.deployment.gpu.platform == "cuda" and launch.deployment.gpu.confidence != "as given":
        pod["nodeSelector"] = {"nvidia.com/gpu.product": launch.deployment.gpu.name.replace(" ", "-")}
    return pod


def _env(launch: Launch) -> list[dict[str, Any]]:
    key = "VLLM_API_KEY" if launch.deployment.engine == "vllm" else "API_KEY"
    network = {"NCCL_SOCKET_IFNAME": "eth0", "GLOO_SOCKET_IFNAME": "eth0"} if _several(launch) else {}
    plain = {"HF_HUB_OFFLINE": "0", **network, **launch.environment()}
    token = {"name": "hf-token", "key": "token", "optional": True}
    return [
        {"name": key, "valueFrom": {"secretKeyRef": {"name": f"{launch.id}-key", "key": "key"}}},
        {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": token}},
        *({"name": k, "value": v} for k, v in plain.items()),
    ]


def _shm(launch: Launch) -> str:
    return "64gb" if _several(launch) else "32gb"


def _dump(data: Mapping[str, Any]) -> str:
    return yaml.dump(dict(data), Dumper=_PlainDumper, sort_keys=False, width=10_000)


class _PlainDumper(yaml.SafeDumper):
    """Without anchors: Kubernetes files are edited by hand."""

    def ignore_aliases(self, data: Any) -> bool:
        return True
