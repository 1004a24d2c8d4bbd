# SPDX-License-Identifier: Apache-2.0
"""Every recipe in every format, judged by tools that are not ours: shellcheck, Kubernetes' own
schemas and the Compose specification.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from dsv4.planning.manifests import of_recipe, render
from dsv4.planning.recipe.schema import Recipe, shipped_recipes

WORKS = [r for r in shipped_recipes() if r.can_work]
KUBERNETES = ("1.31", "1.37")  # the oldest that is still served by clouds, and the newest known
COMPOSE = distribution("check-jsonschema").locate_file("check_jsonschema/builtin_schemas/vendor/compose-spec.json")
ENUMS = {"v1", "apps/v1", "Pod", "Deployment", "Service", "PersistentVolumeClaim"}
SHELLCHECK = Path(sys.executable).parent / "shellcheck"
# A LeaderWorkerSet, as https://lws.sigs.k8s.io/docs/reference/leaderworkerset.v1/ has it.
GROUP = {"size", "leaderTemplate", "workerTemplate", "restartPolicy", "resizePolicy", "subGroupPolicy"}
SET = {"replicas", "leaderWorkerTemplate", "startupPolicy", "rolloutStrategy", "networkConfig"}


def objects(recipe: Recipe) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(render(of_recipe(recipe), "k8s")))


def core_objects(recipe: Recipe) -> list[dict[str, Any]]:
    """What Kubernetes itself defines, the pods of a LeaderWorkerSet as pods of their own."""
    found = []
    for o in objects(recipe):
        if o["kind"] == "LeaderWorkerSet":
            group = o["spec"]["leaderWorkerTemplate"]
            for name in ("leaderTemplate", "workerTemplate"):
                pod = {"apiVersion": "v1", "kind": "Pod", **group[name]}
                pod["metadata"] = {"name": name.lower(), **pod["metadata"]}
                found.append(pod)
        elif o["kind"] != "ComputeDomain":
            found.append(o)
    return found


def fields(o: Any) -> Any:
    """Keys and types of `o` without its values: objects that agree in them are valid together."""
    if isinstance(o, dict):
        return frozenset((key, fields(value)) for key, value in o.items())
    if isinstance(o, list):
        return frozenset(map(fields, o))
    return o if isinstance(o, str) and o in ENUMS else type(o).__name__


@pytest.mark.parametrize("version", KUBERNETES)
def test_kubernetes_knows_every_field(version):
    distinct = {fields(o): o for recipe in WORKS for o in core_objects(recipe)}
    assert {"PersistentVolumeClaim", "Deployment", "Service", "Pod"} == {o["kind"] for o in distinct.values()}
    for o in distinct.values():
        kubernetes_validate.validate(o, version, strict=True)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "template", "spec", "containers", 0, "readinessProbe", "timeoutSecond"), 10),
        (("spec", "template", "spec", "containers", 0, "ports", 0, "containerPort"), "http"),
        (("spec", "strategy", "kind"), "Recreate"),
    ],
)
def test_kubernetes_refuses_what_it_does_not_know(path, value):
    (deployment,) = (o for o in core_objects(WORKS[0]) if o["kind"] == "Deployment")
    *way, last = path
    inner: Any = deployment
    for key in way:
        inner = inner[key]
    inner[last] = value
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, KUBERNETES[0], strict=True)


def test_groups_of_pods_have_the_fields_of_their_definition():
    sets = [o for r in WORKS for o in objects(r) if o["kind"] == "LeaderWorkerSet"]
    assert sets
    for o in sets:
        assert o["apiVersion"] == "leaderworkerset.x-k8s.io/v1"
        assert o["spec"].keys() <= SET
        group = o["spec"]["leaderWorkerTemplate"]
        assert group.keys() <= GROUP
        assert group["size"] >= 2
        assert group.get("restartPolicy", "None") in ("RecreateGroupOnPodRestart", "None")


def test_compose_knows_every_field():
    schema = json.loads(Path(str(COMPOSE)).read_text())
    judge = jsonschema.validators.validator_for(schema)(schema)
    for recipe in WORKS:
        text = render(of_recipe(recipe), "compose")
        assert [e.message for e in judge.iter_errors(yaml.safe_load(text))] == [], recipe.id
    broken = yaml.safe_load(text)
    next(iter(broken["services"].values()))["helthcheck"] = {}
    assert list(judge.iter_errors(broken))


def shellcheck(scripts: list[Path]) -> str:
    return subprocess.run([SHELLCHECK, "--shell=sh", *scripts], capture_output=True, text=True, check=False).stdout


def test_shellcheck_finds_nothing(tmp_path):
    scripts = []
    for recipe in WORKS:
        scripts.append(tmp_path / f"{recipe.id}.sh")
        scripts[-1].write_text(render(of_recipe(recipe), "shell"))
        for o in core_objects(recipe):
            pod = o["spec"].get("template", o).get("spec", {})
            for i, container in enumerate(pod.get("containers", [])):
                scripts.append(tmp_path / f"{recipe.id}-{o['metadata']['name']}-{i}.sh")
                scripts[-1].write_text(container["args"][0])
        for role, service in yaml.safe_load(render(of_recipe(recipe), "compose"))["services"].items():
            scripts.append(tmp_path / f"{recipe.id}-compose-{role}.sh")
            scripts[-1].write_text(service["command"][0].replace("$$", "$"))
    assert len(scripts) >= 3 * len(WORKS)
    assert shellcheck(scripts) == ""
    wrong = tmp_path / "wrong.sh"
    wrong.write_text("vllm serve $MODEL\n")
    assert "SC2086" in shellcheck([wrong])
