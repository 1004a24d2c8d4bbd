# SPDX-License-Identifier: Apache-2.0
"""Command lines: golden files, and every format executed by a real shell with stand-ins for the
engines."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4.errors import PlanError
from dsv4.machine.hardware import find_gpu
from dsv4.planning.deployment import find_checkpoint
from dsv4.planning.launch import Command, Var, commands
from dsv4.planning.manifests import Overrides, of_plan, of_recipe, render
from dsv4.planning.planner import Question, plan
from dsv4.planning.recipe.schema import Recipe, find_recipe, shipped_recipes
from dsv4.planning.text import dsv4_settings

GOLDEN = Path(__file__).parents[1] / "golden" / "launch"
_spec = importlib.util.spec_from_file_location("golden_launch", GOLDEN / "write.py")
assert _spec is not None
assert _spec.loader is not None
golden = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(golden)

WORKS = [r for r in shipped_recipes() if r.can_work]
SHAPES = [  # one recipe per way of starting
    "h200-x8-pro-vllm-context-800k",
    "h100-x16-pro-vllm-context",
    "h200-x16-pro-vllm-throughput",
    "gb200-x8-pro-sglang-latency",
    "a100-80g-x8-flash-vllm-context",
]


@pytest.fixture
def engines(tmp_path) -> dict[str, str]:
    """PATH on which `vllm`, `sglang` and `pip` print their arguments as JSON."""
    for name in ("vllm", "sglang"):
        script = tmp_path / name
        script.write_text(
            "#!/usr/bin/env python3\nimport json, sys, os\nprint(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]))\n"
        )
        script.chmod(0o755)
    pip = tmp_path / "pip"
    pip.write_text("#!/bin/sh\n")
    pip.chmod(0o755)
    return {"PATH": f"{tmp_path}:{os.environ['PATH']}"}


def _run(script: str, env: dict[str, str]) -> list[str]:
    done = subprocess.run(["sh", "-c", script], env=env, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", sorted(golden.files()))
def test_command_lines_equal_the_golden_ones(name):
    assert (GOLDEN / name).read_text() == golden.files()[name], (
        "run python tests/golden/launch/write.py and read the diff"
    )


@pytest.mark.parametrize(
    ("name", "rank"), [(name, rank) for name in SHAPES for rank in range(find_recipe(name)[0].hardware.nodes)]
)
def test_the_shell_script_starts_exactly_the_argv(name, rank, engines):
    recipe = find_recipe(name)[0]
    cmds = commands(recipe)
    got = _run(render(of_recipe(recipe), "shell"), {**engines, "NODE_RANK": str(rank), "HEAD_ADDR": "10.0.0.1"})
    assert got == cmds[min(rank, len(cmds) - 1)].argv(rank, "10.0.0.1")


@pytest.mark.parametrize("name", SHAPES)
def test_compose_services_start_exactly_the_argv(name, engines):
    recipe = find_recipe(name)[0]
    services = yaml.safe_load(render(of_recipe(recipe), "compose"))["services"]
    for rank, command in enumerate(commands(recipe)):
        service = services[command.role]
        assert service["entrypoint"] == ["/bin/sh", "-c"]
        (script,) = service["command"]
        assert "$" not in script.replace("$$", "")  # compose itself must expand nothing here
        got = _run(script.replace("$$", "$"), {**engines, "NODE_RANK": str(rank), "HEAD_ADDR": "10.0.0.1"})
        assert got == command.argv(rank, "10.0.0.1")


@pytest.mark.parametrize("name", SHAPES)
def test_kubernetes_containers_start_exactly_the_argv(name, engines):
    recipe = find_recipe(name)[0]
    launch = of_recipe(recipe)
    claim, *domain, workload, service = yaml.safe_load_all(render(launch, "k8s"))
    assert claim["kind"] == "PersistentVolumeClaim"
    assert [o["kind"] for o in domain] == (["ComputeDomain"] if name.startswith("gb") else [])
    if recipe.hardware.nodes == 1:
        assert workload["kind"] == "Deployment"
        assert workload["spec"]["strategy"] == {"type": "Recreate"}
        pods = [workload["spec"]["template"]]
    else:
        assert (workload["apiVersion"], workload["kind"]) == ("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet")
        group = workload["spec"]["leaderWorkerTemplate"]
        assert group["size"] == recipe.hardware.nodes
        pods = [group["leaderTemplate"], group["workerTemplate"]]
    key = "k e'y"
    for rank, (pod, command) in enumerate(zip(pods, launch.commands("0.0.0.0", key=True), strict=True)):
        (container,) = pod["spec"]["containers"]
        assert container["command"] == ["/bin/sh", "-c"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == recipe.hardware.count // recipe.hardware.nodes
        env = {**engines, "LWS_WORKER_INDEX": str(rank), "LWS_LEADER_ADDRESS": "10.0.0.1", "API_KEY": key}
        wanted = [key if a == "API_KEY" else a for a in command.argv(rank, "10.0.0.1")]
        assert _run(container["args"][0], env) == wanted
        _check_pod(recipe, container, pod["spec"], command.role)
    assert service["spec"]["selector"].items() <= pods[0]["metadata"]["labels"].items()


def _check_pod(recipe: Recipe, container: dict, pod: dict, role: str) -> None:
    """What a pod needs beside its command."""
    named = {e["name"]: e for e in container["env"]}
    key = "VLLM_API_KEY" if recipe.engine.name == "vllm" else "API_KEY"
    assert named[key]["valueFrom"]["secretKeyRef"]["name"] == f"{recipe.id}-key"
    assert named["HF_TOKEN"]["valueFrom"]["secretKeyRef"]["optional"]
    assert named["HF_HUB_OFFLINE"]["value"] == "0"
    mounted = {m["name"]: m["mountPath"] for m in container["volumeMounts"]}
    assert mounted.keys() == {v["name"] for v in pod["volumes"]}
    assert mounted["shm"] == "/dev/shm"
    assert pod["nodeSelector"]["nvidia.com/gpu.product"].startswith("NVIDIA-")
    several = recipe.hardware.nodes > 1
    assert ("NCCL_SOCKET_IFNAME" in named, "securityContext" in container) == (several, several)
    assert ("rdma/ib" in container["resources"]["limits"]) is several
    if role == "head":
        total = recipe.deployment().checkpoint.total_bytes
        start = container["startupProbe"]
        assert start["periodSeconds"] * start["failureThreshold"] >= total / 160e6
        assert {container[p]["timeoutSeconds"] for p in ("startupProbe", "readinessProbe", "livenessProbe")} == {10}


@pytest.mark.parametrize("name", SHAPES)
def test_an_engine_waits_for_its_weights_as_long_as_they_may_take(name):
    recipe = find_recipe(name)[0]
    launch = of_recipe(recipe)
    assert launch.load_s >= recipe.deployment().checkpoint.total_bytes / 160e6
    ready = launch.environment().get("VLLM_ENGINE_READY_TIMEOUT_S")
    assert ready == (str(launch.load_s) if recipe.engine.name == "vllm" else None)
    if recipe.engine.name == "sglang":
        assert launch.commands("127.0.0.1")[0].argv().count("--watchdog-timeout") == 1


def test_a_server_listens_to_its_machine_alone_unless_told_otherwise():
    for name in SHAPES:
        launch = of_recipe(find_recipe(name)[0])
        assert "0.0.0.0" not in render(launch, "shell") + render(launch, "compose")
        assert f"{launch.id}-key" in render(launch, "k8s")
    (command,) = of_recipe(find_recipe(SHAPES[0])[0], Overrides(host="10.1.2.3", port=9000)).commands("127.0.0.1")
    assert command.argv()[-4:] == ["--host", "10.1.2.3", "--port", "9000"]


def test_overrides_change_what_they_name():
    overrides = Overrides(
        context=65_536, port=9000, model="/models/v4", served_name="v4", image="me/vllm:1", wheel="https://x.org/d.whl"
    )
    launch = of_recipe(find_recipe("a100-80g-x8-flash-vllm-context")[0], overrides)
    args = launch.commands("127.0.0.1")[0].argv()
    assert args[:3] == ["vllm", "serve", "/models/v4"]
    assert "--revision" not in args
    for flag, value in (("--max-model-len", "65536"), ("--served-model-name", "v4"), ("--port", "9000")):
        assert args[args.index(flag) + 1] == value
    (service,) = yaml.safe_load(render(launch, "compose"))["services"].values()
    assert service["image"] == "me/vllm:1"
    assert "/models/v4:/models/v4:ro" in service["volumes"]
    assert ":9000/health" in service["healthcheck"]["test"][-1]
    text = render(launch, "k8s")
    assert "pip install --no-deps https://x.org/d.whl" in text
    assert "dsv4-wheels" not in text


def test_nothing_generated_installs_dsv4_by_name_from_an_index():
    for recipe in WORKS:
        for output in ("shell", "compose", "k8s"):
            for install in re.findall(r"pip (?:install|download)[^&;\n]*", render(of_recipe(recipe), output)):
                assert re.fullmatch(r"pip install --no-deps /wheels/dsv4-\S+\.whl ", install), install


def test_a_plan_is_launched_in_every_format(engines):
    gpu = find_gpu("a100")
    q = Question(checkpoint=find_checkpoint("flash"), gpu=gpu, count=8, nodes=1, context=131_072, engine="vllm")
    for c in plan(q):
        if not c.works:
            continue
        launch = of_plan(c.deployment, dsv4_settings(c.deployment), plugin=True)
        assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", launch.id)
        assert _run(render(launch, "shell"), engines) == launch.commands("127.0.0.1")[0].argv()
        assert yaml.safe_load(render(launch, "compose"))["services"]
        assert len(list(yaml.safe_load_all(render(launch, "k8s")))) == 3


def test_an_amd_card_asks_for_an_image():
    mi300x = find_gpu("mi300x")
    q = Question(checkpoint=find_checkpoint("flash"), gpu=mi300x, count=8, nodes=1, context=131_072, engine="vllm")
    best = plan(q)[0].deployment
    with pytest.raises(PlanError, match="no pinned image is known for ROCm"):
        render(of_plan(best, {}, plugin=False), "k8s")
    text = render(of_plan(best, {}, plugin=False, overrides=Overrides(image="x/y:1")), "k8s")
    assert "amd.com/gpu: 8" in text
    assert "nvidia" not in text


@pytest.mark.parametrize("recipe", WORKS, ids=lambda r: r.id)
def test_every_recipe_renders_in_every_format_and_sets_its_step_explicitly(recipe):
    step = "--max-num-batched-tokens" if recipe.engine.name == "vllm" else "--chunked-prefill-size"
    for command in commands(recipe):
        assert step in command.args
    launch = of_recipe(recipe)
    assert "&id" not in render(launch, "k8s")
    assert len(list(yaml.safe_load_all(render(launch, "k8s")))) in (3, 4)
    assert yaml.safe_load(render(launch, "compose"))["services"]
    assert all(isinstance(json.loads(line), list) for line in render(launch, "argv").splitlines())
    subprocess.run(["sh", "-n"], input=render(launch, "shell"), text=True, check=True)


def test_a_plugin_recipe_installs_dsv4_in_its_container_and_others_do_not():
    for name, installs in (("a100-80g-x8-flash-vllm-context", True), ("h200-x8-pro-vllm-context-800k", False)):
        assert ("pip install" in render(of_recipe(find_recipe(name)[0]), "k8s")) is installs


def test_the_second_of_three_nodes_starts_at_its_own_replica():
    command = Command("worker", ("vllm", Var("DP_START_RANK", "$((NODE_RANK * 2))")), replicas_per_node=2)
    assert [command.argv(node_rank=rank)[1] for rank in (1, 2)] == ["2", "4"]


@settings(max_examples=40, deadline=None)
@given(
    args=st.lists(
        st.text(st.characters(exclude_characters="\x00", exclude_categories=("Cs",)), max_size=20), max_size=4
    ),
    var=st.text("ab'\"$ `\\", max_size=8),
)
def test_quoting_survives_any_argument(args, var):
    command = Command("head", ("printf", "%s\\0", *args, Var("HEAD_ADDR")))
    env = {"PATH": os.environ["PATH"], "HEAD_ADDR": var}
    done = subprocess.run(["sh", "-c", command.shell()], env=env, capture_output=True, check=True)
    assert done.stdout.decode().split("\0")[:-1] == [*args, var]


def test_hostile_recipe_text_stays_text(engines):
    recipe = find_recipe(SHAPES[0])[0]
    raw = recipe.model_dump(mode="json")
    raw["extra_args"] = ["--served-model-name", "$(touch /tmp/pwned) `id` 'x' \"y\"; exit 1"]
    raw["title"] = "first\nexec false"
    raw["env"] = {"NAME": "a b'c$(id)"}
    evil = Recipe.model_validate(raw)
    assert _run(render(of_recipe(evil), "shell"), engines)[-1] == raw["extra_args"][1]
    _, workload, _ = yaml.safe_load_all(render(of_recipe(evil), "k8s"))
    (container,) = workload["spec"]["template"]["spec"]["containers"]
    assert _run(container["args"][0], engines)[-1] == raw["extra_args"][1]
    assert {"name": "NAME", "value": "a b'c$(id)"} in container["env"]
    service = yaml.safe_load(render(of_recipe(evil), "compose"))["services"]["head"]
    assert service["environment"]["NAME"] == "a b'c$$(id)"
