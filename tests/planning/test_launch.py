# SPDX-License-Identifier: Apache-2.0
"""Command lines: golden files, and every format executed by a real shell with stand-ins for the
engines."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4.planning.launch import Command, Var, commands, render
from dsv4.planning.recipe.schema import Recipe, find_recipe, shipped_recipes

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
    got = _run(render(recipe, "shell"), {**engines, "NODE_RANK": str(rank), "HEAD_ADDR": "10.0.0.1"})
    assert got == cmds[min(rank, len(cmds) - 1)].argv(rank, "10.0.0.1")


@pytest.mark.parametrize("name", SHAPES)
def test_compose_services_start_exactly_the_argv(name, engines):
    recipe = find_recipe(name)[0]
    services = yaml.safe_load(render(recipe, "compose"))["services"]
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
    workload, service = yaml.safe_load_all(render(recipe, "k8s"))
    if recipe.hardware.nodes == 1:
        assert workload["kind"] == "Deployment"
        pods = [workload["spec"]["template"]]
    else:
        assert (workload["apiVersion"], workload["kind"]) == ("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet")
        group = workload["spec"]["leaderWorkerTemplate"]
        assert group["size"] == recipe.hardware.nodes
        pods = [group["leaderTemplate"], group["workerTemplate"]]
    for rank, (pod, command) in enumerate(zip(pods, commands(recipe), strict=True)):
        (container,) = pod["spec"]["containers"]
        assert container["command"] == ["/bin/sh", "-c"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == recipe.hardware.count // recipe.hardware.nodes
        env = {**engines, "LWS_WORKER_INDEX": str(rank), "LWS_LEADER_ADDRESS": "10.0.0.1"}
        assert _run(container["args"][0], env) == command.argv(rank, "10.0.0.1")
    assert service["spec"]["selector"].items() <= pods[0]["metadata"]["labels"].items()


@pytest.mark.parametrize("recipe", WORKS, ids=lambda r: r.id)
def test_every_recipe_renders_in_every_format_and_sets_its_step_explicitly(recipe):
    step = "--max-num-batched-tokens" if recipe.engine.name == "vllm" else "--chunked-prefill-size"
    for command in commands(recipe):
        assert step in command.args
    assert "&id" not in render(recipe, "k8s")
    assert len(list(yaml.safe_load_all(render(recipe, "k8s")))) == 2
    assert yaml.safe_load(render(recipe, "compose"))["services"]
    assert all(isinstance(json.loads(line), list) for line in render(recipe, "argv").splitlines())


def test_a_plugin_recipe_installs_dsv4_in_its_container_and_others_do_not():
    for name, installs in (("a100-80g-x8-flash-vllm-context", True), ("h200-x8-pro-vllm-context-800k", False)):
        assert ("pip install" in render(find_recipe(name)[0], "k8s")) is installs


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
    assert _run(render(evil, "shell"), engines)[-1] == raw["extra_args"][1]
    (container,) = next(yaml.safe_load_all(render(evil, "k8s")))["spec"]["template"]["spec"]["containers"]
    assert _run(container["args"][0], engines)[-1] == raw["extra_args"][1]
    assert container["env"] == [{"name": "NAME", "value": "a b'c$(id)"}]
