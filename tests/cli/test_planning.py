# SPDX-License-Identifier: Apache-2.0
"""`dsv4 plan`, `launch` and `recipes` as a new user runs them, in processes of their own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENGINES = ("torch", "triton", "vllm", "sglang", "transformers", "numpy")

# Refuses what a laptop without torch does not have, whatever is installed here.
BLOCKER = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {ENGINES[:5]!r}:
            raise ImportError("refused: " + name)
sys.meta_path.insert(0, Refuse())
from dsv4.cli.main import main
main()
"""


def _run(
    *args: str, cwd: Path | None = None, path: Path = ROOT, program: str = BLOCKER
) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("DSV4_")} | {"PYTHONPATH": str(path)}
    return subprocess.run(
        [sys.executable, "-c", program, *args], env=env, cwd=cwd, capture_output=True, text=True, timeout=120
    )


def _examples(page: Path) -> list[str]:
    blocks = re.findall(r"^```console\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    lines = [line[2:] for block in blocks for line in block.splitlines() if line.startswith("$ ")]
    return [line for line in lines if re.match(r"dsv4 (plan|launch|recipes)\b", line)]


EXAMPLES = [
    (page.name, line) for page in (ROOT / "README.md", ROOT / "docs" / "planner.md") for line in _examples(page)
]


@pytest.mark.parametrize(("page", "line"), EXAMPLES)
def test_examples_of_the_docs_run_without_torch(page, line, tmp_path):
    program = tmp_path / "dsv4"
    program.write_text(f"#!{sys.executable}\n{BLOCKER}")
    program.chmod(0o755)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-euc", line], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout or "--plot" in line


def test_the_docs_have_examples():
    assert len(EXAMPLES) >= 10


PLAN = ("plan", "--model", "pro", "--gpu", "h200", "--count", "8", "--context", "800k")


def test_plan_imports_neither_torch_nor_an_engine():
    program = "import sys\nfrom dsv4.cli.main import main\ntry:\n    main()\nfinally:\n    print(sorted(sys.modules), file=sys.stderr)\n"
    done = _run(*PLAN, program=program)
    assert done.returncode == 0
    loaded = {name.split(".")[0].strip("'") for name in done.stderr.strip("[]\n").split(", ")}
    assert loaded.isdisjoint({*ENGINES, "matplotlib", "pynvml"} - {"numpy"})


def test_plan_answers_in_under_a_second_of_cpu():
    best = float("inf")
    for _ in range(3):
        before = os.times()
        wall = time.perf_counter()
        assert _run(*PLAN).returncode == 0
        after = os.times()
        cpu = after.children_user + after.children_system - before.children_user - before.children_system
        best = min(best, cpu, time.perf_counter() - wall)
    assert best < 1.0


def test_plan_prints_the_proof_and_where_the_step_stops():
    out = _run(*PLAN, "--engine", "vllm", "--proofs", "9").stdout
    assert "Proof of vllm TP8, in GiB on the fullest rank:" in out
    assert re.search(r"\(log\) +\d+\.\d\d-\d+\.\d\dx +vLLM's own \"Maximum", out)
    assert re.search(r"stops fitting above max_num_batched_tokens \d{1,2},\d{3}", out)


def test_plan_as_json_has_terms_with_sources():
    answer = json.loads(_run(*PLAN, "--json").stdout)
    first = answer["configurations"][0]
    assert first["works"]
    assert first["proof"]["verdict"] == "fits"
    assert all(term["source"] for term in first["proof"]["terms"])


def test_plan_names_missing_gib_and_the_knob():
    done = _run(
        "plan",
        "--model",
        "pro",
        "--gpu",
        "h200",
        "--count",
        "8",
        "--engine",
        "vllm",
        "--max-num-batched-tokens",
        "32768",
    )
    text = " ".join(done.stdout.split())
    assert re.search(r"GiB short; lower max_num_batched_tokens to \d+: frees \d+\.\d GiB and fits", text)


def test_where_nothing_fits_the_plan_leads_with_what_does():
    done = _run("plan", "--model", "pro", "--gpu", "h100", "--count", "8")
    lines = done.stdout.splitlines()
    assert done.returncode == 1
    assert lines[3:5] == ["Nothing fits as asked. What does:", "  sglang TP8: use 16 GPUs (TP8 x PP2)"]


def test_a_plan_fits_80_columns_and_its_commands_are_shell():
    for args in (PLAN, ("plan", "--gpu", "h100", "--count", "16", "--model", "pro", "--verbose")):
        out = _run(*args, "--proofs", "9").stdout
        assert max(len(line) for line in out.splitlines()) <= 80
        command = re.search(r"start(?: head)?: ((?:.*\\\n)*.*)", out)
        words = subprocess.run(
            ["bash", "-c", f"printf '%s\\n' {command[1]}"], capture_output=True, text=True, check=True
        ).stdout.splitlines()
        assert words[1] == "serve"
        assert not [w for w in words if w == "\\"]


def test_the_default_context_is_named():
    out = _run("plan", "--gpu", "h200", "--proofs", "0").stdout
    assert "131,072 tokens a request" in out
    assert out.splitlines()[-1] == "No --context was given: 128k was planned; DeepSeek-V4 goes to 1m."
    assert "No --context" not in _run(*PLAN).stdout


def test_sources_are_printed_when_asked_for():
    assert "https://" not in _run(*PLAN).stdout
    assert "https://github.com/" in _run(*PLAN, "--verbose").stdout


def test_cards_and_contexts_are_read_as_people_write_them():
    out = _run("plan", "--gpu", "H200 SXM", "--context", "1e5", "--proofs", "0").stdout
    assert out.startswith("flash (deepseek-ai/DeepSeek-V4-Flash) on 8 x h200\n100,000 tokens a request")


def test_any_card_is_planned_by_its_memory_and_capability():
    out = _run("plan", "--gpu-memory", "40", "--capability", "8.6", "--count", "8", "--context", "64k").stdout
    assert "on 8 x gpu-40g" in out
    assert "dsv4's plugin serves" in " ".join(out.split())


def test_the_shell_completes_recipes_and_cards():
    for words, found in (
        ("dsv4 launch h200-x8-pro-vllm", "h200-x8-pro-vllm-context-1m"),
        ("dsv4 plan --gpu mi3", "mi300x"),
    ):
        env = {**os.environ, "PYTHONPATH": str(ROOT), "_DSV4_COMPLETE": "bash_complete", "COMP_WORDS": words}
        done = subprocess.run(
            [sys.executable, "-c", BLOCKER], env=env | {"COMP_CWORD": str(len(words.split()) - 1)},
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert f"plain,{found}" in done.stdout.splitlines()


def test_a_plot_without_matplotlib_says_so_before_it_plans(tmp_path):
    program = BLOCKER.replace("('torch',", "('matplotlib', 'torch',").replace(
        "from dsv4.cli.main", "import importlib.util; find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name == 'matplotlib' else find(name, *a)\n"
        "import dsv4.planning.planner as planner; planner.deployments = None\nfrom dsv4.cli.main"
    )  # fmt: skip
    done = _run("plan", "--gpu", "h200", "--plot", str(tmp_path / "x.svg"), program=program)
    assert done.returncode == 2
    assert "needs matplotlib" in done.stderr


def test_plot_writes_the_same_svg_twice(tmp_path):
    files = [tmp_path / f"{i}.svg" for i in range(2)]
    for file in files:
        done = _run("plan", "--gpu", "h200", "--count", "8", "--plot", str(file))
        assert done.returncode == 0, done.stderr
    first, second = (file.read_bytes() for file in files)
    assert first == second
    assert first.startswith(b"<?xml")


BAD = [
    (["plan", "--gpu", "h300"], "--gpu h300: unknown GPU; nearest: h200"),
    (["plan", "--gpu", "h200", "--count", "0"], "--count 0: impossible"),
    (["plan", "--gpu", "h200", "--count", "x"], "'x' is not a valid integer"),
    (["plan", "--gpu", "h200", "--count", "12", "--nodes", "5"], "does not divide over 5 nodes"),
    (["plan", "--gpu", "h200", "--nodes", "-1"], "impossible"),
    (["plan", "--gpu", "h200", "--context", "2m"], "DeepSeek-V4 ends at 1,048,576"),
    (["plan", "--gpu", "h200", "--proofs", "-1"], "--proofs"),
    (["plan", "--gpu-memory", "24"], "--capability"),
    (["plan", "--gpu-memory", "24", "--capability", "7.0"], "needs 8.0"),
    (["plan", "--gpu", "h200", "--model", "deepseek-ai/DeepSeek-V4.1-Flash"], "is DeepSeek-V4.1"),
    (["plan", "--gpu", "h200", "--context", "many"], "is not a number of tokens"),
    (["plan", "--gpu", "h200", "--engine", "trt"], "'trt' is not one of 'vllm', 'sglang'"),
    (["plan", "--gpu", "h200", "--model", "v3"], "--model v3: unknown checkpoint"),
    (["plan", "--gpu", "h200", "--contxt", "1m"], "No such option"),
    (["plan", "--gpu", "h200", "--plot", "x.pdf"], "ends in .svg or .png"),
    (["plan", "--gpu", "h200", "--plot", "/nowhere/x.svg"], "/nowhere/x.svg"),
    (["launch", "h200-x8-pro-vllm"], "no such recipe; nearest: h200-x8-pro-vllm"),
    (["launch", "h100-x8-pro-vllm-context"], "cannot work: weights alone are 101.9 GiB"),
    (["launch", "h200-x16-pro-vllm-throughput", "--format", "nomad"], "'nomad' is not one of"),
    (["launch"], "Missing argument"),
    (["launch", "h200-x8-pro-vllm-context-800k", "--port", "0"], "--port"),
    (["plan", "--gpu", "h100", "--count", "8", "--model", "pro", "--format", "k8s"], "nothing fits"),
    (["plan", "--gpu", "mi300x", "--format", "k8s"], "--image mi300x: no pinned image"),
    (["recipes", "show", "/etc/passwd"], "/etc/passwd"),
    (["recipes", "show", "absent.yaml"], "cannot be read"),
    (["recipes", "check", "zzz"], "zzz: no such recipe"),
    (["recipes", "list", "--gpu", "tpu"], "unknown GPU"),
    (["recipes", "check", "--engine-path", "/nowhere"], "/nowhere"),
    (["recipes", "check", "--engine-path", "."], "holds no vllm or sglang"),
]  # fmt: skip


@pytest.mark.parametrize(("args", "message"), BAD, ids=lambda a: " ".join(a) if isinstance(a, list) else "")
def test_bad_input_is_one_line_and_exit_2(args, message, tmp_path):
    done = _run(*args, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_without_a_gpu_plan_asks_for_one():
    done = _run("plan", "--model", "flash")
    if done.returncode == 2:
        assert re.search(r"give --gpu", done.stderr)
        assert done.stderr.count("\n") == 1
    else:  # a machine with GPUs answers for them
        assert "flash" in done.stdout


def test_a_yaml_bomb_is_one_line_and_exit_2(tmp_path):
    file = tmp_path / "bomb.yaml"
    file.write_text("a: &a [1,1]\nb: [*a,*a]\n")
    done = _run("launch", str(file))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "anchor or alias" in done.stderr


def test_check_prints_one_line_per_recipe_and_names_skipped_engines():
    done = _run("recipes", "check", "--no-engines")
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    listed = _run("recipes", "list").stdout.splitlines()
    refused = sum(" refusal " in line for line in lines)
    assert listed.pop() == f"{len(lines) - refused} recipes; {refused} more say why a machine cannot serve it"
    assert len(lines) == len(listed) > 80
    assert all(re.match(r"\S+ +ok +schema (rules|refusal) memory", line) for line in lines)
    assert sum("vllm-0.33.0:SKIPPED" in line and "vllm 0.33.0 is not installed here" in line for line in lines) > 30


def test_check_exits_1_when_a_rung_fails(tmp_path):
    source = ROOT / "recipes" / "h200" / "h200-x8-pro-vllm-context-800k.yaml"
    file = tmp_path / source.name
    file.write_text(source.read_text().replace("max_num_batched_tokens: 4096", "max_num_batched_tokens: 32768"))
    done = _run("recipes", "check", "--no-engines", str(file))
    assert done.returncode == 1
    assert "memory:FAIL" in done.stdout


def test_launch_finds_the_recipe_of_the_same_plan_for_the_other_engine():
    out = json.loads(_run("launch", "h200-x8-pro-vllm-context-800k", "--engine", "sglang", "--json").stdout)
    assert out["argv"]["head"][:2] == ["sglang", "serve"]


def test_a_launch_is_overridden_and_a_plan_is_launched():
    out = _run(
        "launch", "h200-x8-pro-vllm-context-800k", "--context", "64k", "--port", "9000", "--served-name", "v4"
    ).stdout
    for words in ("--max-model-len 65536", "--port 9000", "--served-model-name v4", "--host 127.0.0.1"):
        assert words in out
    out = _run("plan", "--gpu", "h200", "--format", "compose").stdout
    assert out.startswith("# planned by dsv4: flash on 8 x h200")
    assert "services:" in out


JSON = [
    ([*PLAN, "--json"], {"question", "configurations", "speed"}),
    (["launch", "h200-x8-pro-vllm-context-800k", "--json"], {"id", "env", "argv"}),
    (["recipes", "list", "--json"], {"recipes"}),
    (["recipes", "show", "h200-x8-pro-vllm-context-800k", "--json"], {"recipe"}),
    (["recipes", "check", "--no-engines", "h200-x8-pro-vllm-context-800k", "--json"], {"reports"}),
    (["plan", "--gpu", "h100", "--model", "pro", "--count", "8", "--json"], {"question", "configurations", "speed"}),
]


@pytest.mark.parametrize(("args", "keys"), JSON, ids=lambda a: " ".join(a) if isinstance(a, list) else "")
def test_json_is_an_object_that_says_its_schema_version(args, keys):
    answer = json.loads(_run(*args).stdout)
    assert next(iter(answer.items())) == ("schema_version", 1)
    assert set(answer) == {"schema_version", *keys}


def test_a_shown_recipe_says_its_engine_versions():
    recipe = json.loads(_run("recipes", "show", "h200-x8-pro-vllm-context-800k", "--json").stdout)["recipe"]
    assert recipe["engine"]["versions"] == ">=0.32,<0.34"


def test_the_built_wheel_carries_the_recipes(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    installed = tmp_path / "site"
    with zipfile.ZipFile(wheel) as z:
        z.extractall(installed)
    done = _run("recipes", "list", "--json", cwd=tmp_path, path=installed)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["recipes"]) > 80
    assert _run(*PLAN, cwd=tmp_path, path=installed).returncode == 0


SPEED = ("plan", "--model", "flash", "--gpu", "h200", "--count", "8", "--proofs", "0")


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("--slo", "ttft=2s,tpot=30ms", "--price", "h200=2.5,b200=4", "--compare", "8xb200", "--concurrency", "32"),
        ("--input", "64k", "--cached", "0.9", "--output", "400", "--verbose", "--price", "3"),
        ("--slo", "tps=50", "--compare", "72xgb300"),
    ],
)
def test_speed_fits_80_columns_and_says_what_it_is(more):
    done = _run(*SPEED, *more)
    assert (done.returncode, done.stderr) == (0, "")
    text = done.stdout[done.stdout.index("How fast, estimated") :]
    assert max(map(len, text.splitlines())) <= 80
    assert "Nothing of it is dsv4's own measurement" in " ".join(text.split())


def test_speed_as_json():
    done = _run(*SPEED, "--slo", "tpot=30ms", "--price", "2.5", "--compare", "8xb200", "--json")
    speed = json.loads(done.stdout)["speed"]
    assert (speed["input_tokens"], speed["output_tokens"]) == (8192, 1024)
    first, last = speed["configurations"][0], speed["configurations"][-1]
    assert (first["gpu"], last["gpu"]) == ("h200", "b200")
    low, high = first["tpot_ms"]
    assert first["user_tok_s"] == pytest.approx([1000 / high, 1000 / low], rel=0.01)
    assert first["objective"]["kept"] == "yes"
    assert first["objective"]["requests"][0] >= 1
    assert "dollars_per_million_output_tokens" in first
    assert "dollars_per_million_output_tokens" not in last  # no price was given for it


def test_speed_is_said_of_forks_where_only_forks_have_served():
    done = _run("plan", "--gpu", "a100", "--count", "8", "--proofs", "0")
    assert "figures of forks and patches, as dsv4's kernels have not been timed" in " ".join(done.stdout.split())


def test_speed_of_an_unknown_card_is_left_out():
    done = _run("plan", "--gpu-memory", "80", "--capability", "9.0", "--count", "8", "--proofs", "0", "--json")
    assert (done.returncode, json.loads(done.stdout)["speed"]) == (0, None)


def test_an_objective_that_nothing_keeps_is_exit_1():
    assert _run(*SPEED, "--slo", "tpot=0.01ms").returncode == 1


def test_the_frontier_is_drawn(tmp_path):
    done = _run(*SPEED, "--plot", "speed.svg", "--curve", "speed", cwd=tmp_path)
    assert done.returncode == 0
    assert "output tokens/s of one user" in (tmp_path / "speed.svg").read_text()


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (("--slo", "fast"), "--slo fast: is no objective; write ttft=2s,tpot=30ms"),
        (("--price", "two"), "--price two: is no price"),
        (("--compare", "8h200"), "--compare 8h200: is no machine; write the GPUs and the card, as 8xb200"),
        (("--compare", "0xb200"), "--compare 0xb200: 0: impossible; give 1 to"),
        (("--compare", "8xb2000"), "--compare b2000: unknown GPU"),
        (("--input", "200k"), "--input 204,800 and --output 1,024: exceed the context of 131,072"),
        (("--cached", "1"), "--cached 1: is the part of the input that is cached"),
    ],
)
def test_bad_questions_of_speed_are_one_line(wrong, says):
    done = _run(*SPEED, *wrong)
    assert done.returncode == 2
    assert done.stderr.startswith(f"dsv4: {says}")
    assert done.stderr.count("\n") == 1


def test_two_pools_and_a_host_store_are_planned_and_not_launched():
    asked = [*SPEED, "--engine", "vllm", "--pools", "1P2D", "--host-memory", "500"]
    done = _run(*asked)
    assert (done.returncode, done.stderr) == (0, "")
    text = " ".join(done.stdout.split())
    assert "Two pools: 1 to prefill and 2 to decode, each engine on 8 x h200" in text
    assert "Planned, not launched" in text
    assert "dsv4's plugin refuses KV offload today." in text
    assert max(map(len, done.stdout.splitlines())) <= 80
    answer = json.loads(_run(*asked, "--json").stdout)
    assert answer["pools"][0]["decode_engines"] == 2
    assert answer["host_stores"][0]["prefixes"] > 0
    other = _run(*SPEED, "--engine", "sglang", "--host-memory", "500")
    assert (other.returncode, other.stderr.count("\n")) == (2, 1)
    wrong = _run(*SPEED, "--pools", "3")
    assert (wrong.returncode, wrong.stderr) == (
        2,
        "dsv4: --pools 3: is no pair of pools; write 1P3D for one engine that prefills and three that decode\n",
    )
