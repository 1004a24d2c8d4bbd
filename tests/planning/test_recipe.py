# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsv4.data import MAX_YAML_BYTES, data_folder, read_yaml
from dsv4.errors import RecipeError
from dsv4.machine.compat import SUPPORTED, TESTED_VERSIONS, is_supported
from dsv4.planning.deployment import PLUGIN_DRAFTS, Speculation
from dsv4.planning.memory.proof import prove
from dsv4.planning.recipe import check as recipe_check
from dsv4.planning.recipe.check import InstalledEngine, check
from dsv4.planning.recipe.proofs import rewrite
from dsv4.planning.recipe.schema import Recipe, json_schema, parse_recipe, read_recipe, recipe_paths, shipped_recipes
from dsv4.planning.rules import violations

EXAMPLE = data_folder() / "h200" / "h200-x8-pro-vllm-context-800k.yaml"


@pytest.fixture
def raw() -> dict:
    return yaml.safe_load(EXAMPLE.read_text())


def _set(raw: dict, path: str, value: object) -> dict:
    changed = copy.deepcopy(raw)
    *parents, last = path.split(".")
    target = changed
    for key in parents:
        target = target[key]
    target[last] = value
    return changed


def test_committed_json_schema_is_the_generated_one():
    committed = json.loads((data_folder() / "recipe.schema.json").read_text())
    assert committed == json_schema(), "run dsv4 recipes check --write-schema"


@pytest.mark.parametrize("path", recipe_paths(), ids=lambda p: p.stem)
def test_every_recipe_passes_schema_rules_and_memory(path):
    (report,) = check([path], [])
    assert [(r.name, r.details) for r in report.rungs if r.outcome == "fail"] == []
    assert path.read_text().startswith("# yaml-language-server: $schema=../recipe.schema.json\n")


def test_tested_versions_are_supported_ones():
    assert set(TESTED_VERSIONS) == set(SUPPORTED)
    assert all(is_supported(engine, v) for engine, versions in TESTED_VERSIONS.items() for v in versions)


def test_ids_are_unique_and_every_file_is_in_its_cards_folder():
    ids = [r.id for r in shipped_recipes()]
    assert len(ids) == len(set(ids))
    assert all(p.parent.name == read_recipe(p).hardware.gpu for p in recipe_paths())


def test_nothing_is_verified_without_a_committed_record():
    for r in shipped_recipes():
        assert r.status != "verified" or (Path(__file__).parents[2] / str(r.record)).is_file()


def test_cards_without_a_native_v4_are_served_by_the_plugin_and_claim_no_more_than_derived():
    plugin = [r for r in shipped_recipes() if r.deployment().gpu.needs_plugin]
    assert plugin
    for r in plugin:
        assert r.engine.serves_with == "plugin"
        assert {e.kind for e in r.evidence} == {"derived"}


COVERED = [
    ("b200", 4),
    ("b200", 8),
    ("b300", 8),
    ("gb200", 8),
    ("gb300", 4),
    ("h200", 4),
    ("h200", 8),
    ("h200", 16),
    ("h100", 8),
    ("h100", 16),
    ("h20", 8),
    ("a100-80g", 4),
    ("a100-80g", 8),
    ("l40s", 8),
    ("l20", 8),
    ("rtx-pro-6000", 2),
    ("rtx-pro-6000", 4),
    ("rtx-pro-6000", 8),
    ("rtx-4090-48g", 4),
    ("rtx-4090-48g", 8),
]


@pytest.mark.parametrize(("gpu", "count"), COVERED)
def test_every_promised_topology_has_a_recipe_that_works(gpu, count):
    assert [r for r in shipped_recipes(gpu) if r.hardware.count == count and r.can_work]


def test_h200_x8_pro_has_an_800k_and_a_1m_plan_on_both_engines():
    found = {
        (r.engine.name, r.lengths.max_model_len)
        for r in shipped_recipes("h200")
        if r.checkpoint.id == "pro" and r.hardware.count == 8
    }
    assert {(e, n) for e in ("vllm", "sglang") for n in (819_200, 1_048_576)} <= found


def test_what_cannot_work_says_why():
    (recipe,) = [r for r in shipped_recipes("h100") if not r.can_work]
    assert "needs 16x H100" in recipe.why_not[0].why


# Bad input
# ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("lengths.max_model_len", 1_048_577, "lengths.max_model_len: Input should be less than or equal to 1048576"),
        ("lengths.max_model_len", 0, "greater than or equal to 1"),
        ("lengths.max_model_len", "800k", "lengths.max_model_len: Input should be a valid integer"),
        ("batching.max_num_batch_tokens", 4096, "unknown field; did you mean max_num_batched_tokens?"),
        ("modle", "flash", "unknown field"),
        ("engine.versions", ">=0.20,<0.21", "no tested vllm is in '>=0.20,<0.21'; dsv4 is tested with 0.32.0, 0.33.0"),
        ("engine.versions", "the newest", "is not a PEP 440 range"),
        ("engine.name", "tensorrt", "engine.name: Input should be 'vllm' or 'sglang'"),
        ("hardware.gpu", "h2000", "h2000: unknown GPU; nearest: h200"),
        ("hardware.count", 7, "tp x dp x pp is 8, hardware.count is 7"),
        ("hardware.count", -8, "hardware.count"),
        ("hardware.count", 10**30, "less than or equal to 576"),
        ("batching.max_num_batched_tokens", 10**12, "less than or equal to 65536"),
        ("cache.swa_full_tokens_ratio", -0.1, "cache.swa_full_tokens_ratio"),
        ("parallel.tp", True, "parallel.tp"),
        ("checkpoint.id", "v3", "unknown checkpoint"),
        ("memory.fraction", 1.5, "memory.fraction: Input should be less than 1"),
        ("extra_args", ["--max-model-len", "4096"], "--max-model-len restates a typed field"),
        ("extra_args", ["--tensor-parallel-size=4"], "--tensor-parallel-size restates a typed field"),
        ("status", "verified", "status verified needs the path of a committed record"),
        ("evidence", [], "evidence"),
        ("env", {"A": 1}, "env.A: Input should be a valid string"),
        ("env", {"A;rm": "x"}, "String should match pattern"),
        ("id", "../../etc/passwd", "id: String should match pattern"),
    ],
)  # fmt: skip
def test_a_bad_field_is_one_line_that_names_it(raw, path, value, message):
    with pytest.raises(RecipeError) as e:
        parse_recipe(_set(raw, path, value), "r.yaml")
    assert message in str(e.value)
    assert str(e.value).startswith("r.yaml: ")
    assert "\n" not in str(e.value)


def test_a_missing_section_is_named(raw):
    del raw["batching"]
    with pytest.raises(RecipeError, match=r"r\.yaml: batching: Field required"):
        parse_recipe(raw, "r.yaml")


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(8)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "line 1 uses a YAML anchor or alias"),
        ("base: &b {x: 1}\nchild:\n  <<: *b\n", "anchor or alias"),
        ("[" * 5000, "nests deeper than a recipe can"),
        ("{" * 30 + "}" * 30, "nests deeper"),
        ("a: 1\na: 2\n", "key a is given twice"),
        ("!!python/object/apply:os.system ['true']\n", "is not valid YAML"),
        ("a: [1, 2\n", "is not valid YAML"),
        ("\x00\x01", "is not"),
        ("", "is not a recipe"),
        ("- 1\n- 2\n", "is not a recipe"),
        ("just text", "is not a recipe"),
        ("schema_version: 2\n", "schema_version"),
        ("x" * (MAX_YAML_BYTES + 1), "is this a recipe?"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_on_one_line(tmp_path, text, message):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=r"r\.yaml: ") as e:
        read_recipe(path)
    assert message in str(e.value)
    assert "\n" not in str(e.value)


def test_bytes_that_are_no_text_and_absent_files_and_folders_are_refused(tmp_path):
    binary = tmp_path / "b.yaml"
    binary.write_bytes(b"\xff\xfe\x00weights")
    for path in (binary, tmp_path / "absent.yaml", tmp_path):
        with pytest.raises(RecipeError, match=r"is not YAML text|cannot be read"):
            read_yaml(path)


# Rules
# ----------------------------------------------------------------------------------------------


def drafting(method: str, num_tokens: int) -> dict:
    return {"method": method, "num_tokens": num_tokens, "sampling": "greedy"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parallel.tp": 16, "hardware.count": 16}, "cuts the shared expert to 192 columns"),
        ({"cache.index_dtype": "mxfp4"}, "mxfp4 index keys exist on compute capability 10.x only"),
        ({"speculative": drafting("dspark", 5)}, "pro carries a mtp draft, not dspark"),
        ({"checkpoint.id": "pro-0813", "speculative": drafting("mtp", 1)}, "carries a dspark draft, not mtp"),
        ({"speculative": drafting("mtp", 0)}, "speculative method mtp with 0 draft tokens"),
        ({"kernels.moe": "deep_gemm_mega_moe"}, "mega MoE needs compute capability 10.x"),
        ({"batching.max_num_seqs": 8192}, "exceeds max_num_batched_tokens 4096"),
        (
            {"parallel.ep": False, "parallel.tp": 4, "parallel.dp": 4, "hardware.count": 16, "hardware.nodes": 2},
            "turn EP on",
        ),
        ({"parallel.ep": False, "kernels.all_to_all": "deepep_low_latency"}, "needs expert parallelism"),
        ({"hardware.nodes": 3}, "do not divide over 3 nodes"),
        ({"hardware.count": 16, "parallel.dp": 2}, "nodes have at most 8"),
        ({"hardware.gpu": "a100-80g", "parallel.dp": 2, "parallel.tp": 4}, "plugin, which has no DP attention"),
    ],
)
def test_a_broken_rule_is_named(raw, changes, message):
    for path, value in changes.items():
        raw = _set(raw, path, value)
    recipe = parse_recipe(raw, "r.yaml")
    assert any(message in v for v in violations(recipe.deployment(), recipe.env)), violations(
        recipe.deployment(), recipe.env
    )


def test_deepep_dispatch_bound_counts_draft_tokens():
    recipe = next(r for r in shipped_recipes("h200") if r.kernels.all_to_all == "deepep")
    d = recipe.deployment()
    assert violations(d, recipe.env) == []
    tight = {"SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK": str(d.max_num_seqs - 1)}
    assert "would abort" in violations(d, tight)[0]


# The ladder
# ----------------------------------------------------------------------------------------------


def _check_changed(tmp_path: Path, raw: dict, path: str, value: object) -> list[tuple[str, str]]:
    file = tmp_path / EXAMPLE.name
    file.write_text(yaml.safe_dump(_set(raw, path, value)))
    (report,) = check([file], [])
    return [(r.name, " ".join(r.details)) for r in report.rungs if r.outcome == "fail"]


def test_a_proof_that_is_off_by_more_than_1_percent_fails(tmp_path, raw):
    weights = raw["memory"]["proof"]["weights_gib"]
    assert _check_changed(tmp_path, raw, "memory.proof.weights_gib", round(weights * 1.005, 2)) == []
    ((name, detail),) = _check_changed(tmp_path, raw, "memory.proof.weights_gib", round(weights * 1.02, 2))
    assert name == "memory"
    assert "recomputed 101.94" in detail


def test_a_plan_that_does_not_fit_fails_whatever_its_proof_says(tmp_path, raw):
    failed = dict(_check_changed(tmp_path, raw, "batching.max_num_batched_tokens", 65_536))
    assert "does not fit" in failed["memory"]


def test_a_mislabelled_cannot_work_fails(tmp_path, raw):
    failed = dict(_check_changed(tmp_path, raw, "status", "cannot_work"))
    assert "marked cannot_work" in failed["refusal"]


def test_a_record_must_be_committed(tmp_path, raw):
    raw = _set(raw, "status", "verified")
    failed = dict(_check_changed(tmp_path, raw, "record", "benchmarks/results/none.json"))
    assert "is not committed" in failed["schema"]


def test_an_absent_engine_is_reported_as_skipped():
    (report,) = check([EXAMPLE], [])
    assert [(r.name, r.outcome) for r in report.rungs if r.outcome != "ok"] == [
        ("vllm-0.32.0", "skipped"),
        ("vllm-0.33.0", "skipped"),
    ]
    assert "vllm 0.33.0 is not installed here" in report.rungs[-1].details


def test_rewriting_proofs_changes_nothing_when_they_are_right(tmp_path):
    file = tmp_path / EXAMPLE.name
    file.write_text(EXAMPLE.read_text())
    rewrite(file)
    assert file.read_text() == EXAMPLE.read_text()


def test_schema_fields_have_no_defaults_that_hide_a_choice():
    assert {n for n, f in Recipe.model_fields.items() if not f.is_required()} == set()


def test_an_engine_that_cannot_be_imported_fails_its_rung(tmp_path):
    (tmp_path / "vllm-0.33.0.dist-info").mkdir()
    (tmp_path / "vllm-0.33.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.33.0\n")
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("raise RuntimeError('broken wheel')\n")
    (report,) = check([EXAMPLE], [InstalledEngine("vllm", "0.33.0", tmp_path)])
    rung = report.rungs[-1]
    assert (rung.name, rung.outcome) == ("vllm-0.33.0", "fail")
    assert "cannot be imported to check with: RuntimeError: broken wheel" in rung.details[0]


@pytest.mark.parametrize(
    "printed", ["", "{}", '{"version": "0.33.0"}', '{"version": "0.33.0", "cases": {"a": {"error": []}}}']
)
def test_an_answer_that_cannot_be_read_fails_its_rung(monkeypatch, printed):
    done = subprocess.CompletedProcess([], 0, stdout=printed, stderr="")
    monkeypatch.setattr(recipe_check.subprocess, "run", lambda *args, **kwargs: done)
    (report,) = check([EXAMPLE], [InstalledEngine("vllm", "0.33.0", None)])
    rung = report.rungs[-1]
    assert (rung.name, rung.outcome) == ("vllm-0.33.0", "fail")
    assert "answered what cannot be read" in rung.details[0]


def test_more_stages_than_layers_are_refused(raw):
    raw = _set(_set(raw, "hardware.count", 64), "parallel", {"tp": 1, "dp": 1, "ep": False, "pp": 64})
    with pytest.raises(RecipeError, match=r"parallel\.pp is 64, pro has 61 layers"):
        parse_recipe(raw, "r.yaml")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_files_are_refused_or_read_never_worse(tmp_path, data):
    lines = EXAMPLE.read_text().splitlines()
    for _ in range(data.draw(st.integers(1, 3))):
        i = data.draw(st.integers(0, len(lines) - 1))
        key = lines[i].split(":")[0]
        lines[i] = data.draw(
            st.sampled_from(
                [
                    "",
                    key,
                    f"{key}: ",
                    f"{key}: -1",
                    f"{key}: 1e999",
                    f"{key}: .nan",
                    f"{key}: 2026-13-45",
                    f"{key}: [",
                    "\t" + lines[i],
                    lines[i] * 2,
                    f"{key}: !!binary x",
                    f"{key}: 0o7",
                    f"{key}: null",
                    f"{key}: {{a: 1}}",
                    f"{key}: 99999999999999999999",
                ]
            )
        )
    file = tmp_path / EXAMPLE.name
    file.write_text("\n".join(lines))
    (report,) = check([file], [])
    assert all("\n" not in d for r in report.rungs for d in r.details)


def test_the_plugins_drafts_are_planned_where_they_are_served():
    """In vLLM both methods, on summaries or pages; in SGLang not every one."""
    recipes = {r.id: r for r in shipped_recipes("a100-80g")}
    for name in ("a100-80g-x8-flash-vllm-latency", "a100-80g-x8-flash-0731-vllm-latency"):
        recipe = recipes[name]
        with_drafts = recipe.deployment()
        without = replace(with_drafts, speculation=Speculation())
        proofs = [prove(d, 4) for d in (with_drafts, without)]
        assert violations(with_drafts, recipe.env) == []
        assert proofs[0].weights_bytes > proofs[1].weights_bytes
        assert proofs[0].decoding_bytes >= proofs[1].decoding_bytes
    for missing in {"mtp", "dspark"} - PLUGIN_DRAFTS["sglang"]:
        drafts = Speculation(method=missing, num_tokens=5)
        recipe = next(r for r in recipes.values() if r.engine.name == "sglang" and "0731" in r.id)
        assert any("drafts with" in v for v in violations(replace(recipe.deployment(), speculation=drafts), {}))


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"method": "none", "num_tokens": 0}, "method none needs a why"),
        ({"method": "mtp", "num_tokens": 1}, "method mtp needs sampling"),
        ({"method": "mtp", "num_tokens": 1, "sampling": "greedy", "why": "none"}, "and no why"),
    ],
)
def test_a_recipe_says_how_it_drafts_or_why_not(raw, section, says):
    with pytest.raises(RecipeError, match=says):
        parse_recipe(_set(raw, "speculative", section), "r.yaml")
