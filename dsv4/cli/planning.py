# SPDX-License-Identifier: Apache-2.0
"""`dsv4 plan`, `dsv4 launch` and `dsv4 recipes`. Exit codes: 0 done, 1 a check failed or nothing
fits, 2 bad input.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from dsv4.cli import speed, what_if
from dsv4.cli.output import json_option, named, print_json
from dsv4.errors import HardwareError, PlanError, RecipeError
from dsv4.machine.compat import Engine
from dsv4.machine.hardware import GIB, Gpu, all_gpus, describe_gpu, detect_machine, find_gpu
from dsv4.model.kv_layout import StateMapping
from dsv4.planning.deployment import Checkpoint, find_checkpoint, parse_context
from dsv4.planning.launch import deployment_commands
from dsv4.planning.memory.proof import Proof, Verdict, prove
from dsv4.planning.planner import DEFAULT_STEP_TOKENS, Candidate, Preference, Question
from dsv4.planning.planner import plan as make_plan
from dsv4.planning.recipe.schema import Recipe, find_recipe, json_schema, proof_section, recipe_paths, shipped_recipes

if TYPE_CHECKING:
    from dsv4.planning.manifests import Overrides

DEFAULT_CONTEXT = "128k"  # what published deployments and their users ask for, far below the model's 1m


def _override_options(f: Callable[..., None]) -> Callable[..., None]:
    """What `plan --format` and `launch` let a user change of a launch."""
    for option in (
        click.option("--wheel", help="Path in the container, or URL, of dsv4's wheel, where its plugin serves."),
        click.option("--image", help="Another container image."),
        click.option("--served-name", help="Name that clients ask for."),
        click.option("--model-path", help="Folder of the model as the engine sees it, instead of the repository."),
        click.option("--port", type=click.IntRange(1, 65_535), help="8000 when left out."),
        click.option(
            "--host", help="This machine alone (127.0.0.1) when left out; Kubernetes: every address, with a key."
        ),
    ):
        f = option(f)
    return f


def _overrides(options: Mapping[str, Any], context: int = 0) -> Overrides:
    """Those of `options` that change a launch."""
    from dsv4.planning.manifests import Overrides

    renamed = {"model" if k == "model_path" else k: v for k, v in options.items() if v is not None}
    known = {f.name for f in fields(Overrides)}
    return Overrides(context=context, **{k: v for k, v in renamed.items() if k in known})


class _Command(click.Command):
    """A command whose bad options are one line, as every other bad input (dsv4.cli.main prints it
    and exits 2).
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as e:
            raise PlanError(f"{' '.join(e.format_message().split())} See {ctx.command_path} --help.") from e


def _recipe_ids(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Recipe ids for the shell: eval "$(_DSV4_COMPLETE=bash_source dsv4)"."""
    return [path.stem for path in recipe_paths() if path.stem.startswith(incomplete)]


def _gpu_ids(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    return [gpu.id for gpu in all_gpus() if gpu.id.startswith(incomplete)]


@click.command("plan", cls=_Command)
@click.option(
    "--model",
    default="flash",
    show_default=True,
    help="flash, flash-0731, pro, pro-0813, a repository, or a folder; others by their headers.",
)
@click.option("--gpu", shell_complete=_gpu_ids, help="Card, as h200 or a100-80g; detected when left out.")
@click.option("--gpu-memory", type=float, help="GiB of a card that dsv4 has no entry for; with --capability.")
@click.option("--capability", help="Compute capability of such a card, as 8.6.")
@click.option("--bandwidth", type=float, default=0.0, help="Memory bandwidth of such a card in TB/s.")
@click.option("--count", type=int, help="GPUs in all; detected, or one node, when left out.")
@click.option("--nodes", type=int, help="Nodes they are in; as few as possible when left out.")
@click.option("--context", help=f"Tokens per request, as 800k or 819200; {DEFAULT_CONTEXT} when left out.")
@click.option("--concurrency", type=int, default=1, show_default=True, help="Requests of that length at once.")
@click.option("--engine", type=click.Choice(["vllm", "sglang"]), help="Both when left out.")
@click.option(
    "--max-num-batched-tokens",
    type=int,
    default=DEFAULT_STEP_TOKENS,
    show_default=True,
    help="Tokens per step and replica.",
)
@click.option(
    "--state",
    type=click.Choice(["auto", "paged", "summary"]),
    default="auto",
    show_default=True,
    help="Compressor state in vLLM (DSV4_STATE); auto: what holds more requests where dsv4's plugin serves, paged where native does.",
)
@click.option(
    "--prefer",
    type=click.Choice(["latency", "throughput"]),
    default="throughput",
    show_default=True,
    help="What ranks first.",
)
@click.option(
    "--proofs", type=click.IntRange(min=0), default=1, show_default=True, help="Configurations to prove term by term."
)
@click.option("--verbose", is_flag=True, help="Print the source of every term of a proof.")
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Draw into an .svg or .png what --curve says.",
)
@click.option(
    "--curve",
    type=click.Choice(["memory", "speed"]),
    default="memory",
    show_default=True,
    help="Context against requests at once, or tokens/s of a user against tokens/s of a GPU.",
)
@click.option(
    "--format",
    "output",
    type=click.Choice(["text", "shell", "compose", "k8s"]),
    default="text",
    show_default=True,
    help="The plan in words, or the launch of what ranks first.",
)
@speed.speed_options
@what_if.what_if_options
@_override_options
@json_option
def plan(
    model: str,
    gpu: str | None,
    gpu_memory: float | None,
    capability: str | None,
    bandwidth: float,
    count: int | None,
    nodes: int | None,
    context: str | None,
    concurrency: int,
    engine: str | None,
    max_num_batched_tokens: int,
    state: str,
    prefer: str,
    proofs: int,
    verbose: bool,
    plot: Path | None,
    curve: str,
    output: str,
    as_json: bool,
    **given: Any,
) -> None:
    """Rank what serves MODEL on these GPUs, prove it, and say what stops the rest. Exit 1 when
    nothing fits.
    """
    with named("--context"):
        tokens = parse_context(context or DEFAULT_CONTEXT)
    with named("--model"):
        checkpoint = _checkpoint(model)
    if gpu_memory is not None or capability is not None:
        card, count = _described(gpu, gpu_memory, capability, bandwidth), count or nodes or 1
    else:
        card, count = _gpus(gpu, count, nodes)
    with named():
        question = Question(
            checkpoint=checkpoint,
            gpu=card,
            count=count,
            nodes=card.nodes_for(count) if nodes is None else nodes,
            context=tokens,
            concurrency=concurrency,
            engine=cast("Engine | None", engine),
            max_num_batched_tokens=max_num_batched_tokens,
            prefer=cast("Preference", prefer),
            state=None if state == "auto" else StateMapping(state),
        )
    if plot is not None:
        from dsv4.planning.plot import refuse

        with named("--plot"):
            refuse(plot)
    asked = speed.parse(question, given)
    found = make_plan(question)
    fast = speed.answer(question, found, asked)
    other = what_if.answer(question, found, asked.traffic, given["pools"], given["host_memory"])
    if plot is not None:
        _draw(question, found, fast, curve, plot)
    if output != "text":
        _print_launch(found, output, given)
    elif as_json:
        configurations = [_candidate_json(c) for c in found]
        print_json(
            {
                "question": _question_json(question),
                "configurations": configurations,
                "speed": speed.as_json(fast),
                **what_if.as_json(other),
            }
        )
    else:
        from dsv4.planning.text import describe

        told = speed.lines(fast, verbose) if fast else None
        click.echo(describe(question, found, proofs, verbose, told, what_if.lines(other)))
        if context is None:
            click.echo(f"\nNo --context was given: {DEFAULT_CONTEXT} was planned; DeepSeek-V4 goes to 1m.")
    if not any(c.works for c in found) or (fast is not None and fast.misses):
        raise SystemExit(1)


def _draw(question: Question, found: Sequence[Candidate], fast: speed.Speed | None, curve: str, path: Path) -> None:
    from dsv4.planning.plot import draw

    with named("--plot"):
        if curve == "memory":
            draw(question, found, path)
        elif fast is None:
            raise PlanError(f"{path}: nothing fits, or the card's speed is not known, so there is nothing to draw")
        else:
            speed.draw(question, fast, path)


def _print_launch(found: Sequence[Candidate], output: str, options: Mapping[str, Any]) -> None:
    """The launch of the best configuration. Raises PlanError where nothing fits."""
    from dsv4.planning.manifests import of_plan, render
    from dsv4.planning.text import dsv4_settings

    best = next((c.deployment for c in found if c.works), None)
    if best is None:
        raise PlanError("--format: nothing fits, so there is nothing to launch; see the plan without --format")
    settings = dsv4_settings(best)
    plugin = best.gpu.needs_plugin or bool(settings)
    with named():
        click.echo(render(of_plan(best, settings, plugin, _overrides(options)), output))


def _gpus(gpu: str | None, count: int | None, nodes: int | None) -> tuple[Gpu, int]:
    """The card and how many: as given, else one node's, else what this machine has."""
    if gpu is not None:
        with named("--gpu"):
            card = find_gpu(gpu)
        return card, card.gpus_per_node * (nodes or 1) if count is None else count
    try:
        machine = detect_machine()
    except HardwareError as e:
        raise HardwareError(f"{e}; give --gpu and --count") from e
    return machine.gpu, machine.count if count is None else count


def _checkpoint(model: str) -> Checkpoint:
    """A released one by name, a folder, or another repository of the hub."""
    from dsv4.planning.memory.folder import checkpoint_in, checkpoint_on_hub

    if Path(model).is_dir():
        return checkpoint_in(Path(model))
    try:
        return find_checkpoint(model)
    except PlanError:
        if re.fullmatch(r"[\w.-]+/[\w.-]+", model) and not re.search(r"v4\.1|v41", model.lower()):
            return checkpoint_on_hub(model)
        raise


def _described(name: str | None, memory: float | None, capability: str | None, bandwidth: float) -> Gpu:
    """A card outside the table. --gpu then only names it."""
    if memory is None or capability is None:
        raise PlanError("--gpu-memory and --capability describe a card together; give both, or --gpu alone")
    with named("--gpu-memory" if capability else "--capability"):
        return describe_gpu(memory, capability, bandwidth, name or "")


def _question_json(q: Question) -> dict[str, Any]:
    return {
        "model": q.checkpoint.id,
        "gpu": q.gpu.id,
        "count": q.count,
        "nodes": q.nodes,
        "context": q.context,
        "concurrency": q.concurrency,
        "max_num_batched_tokens": q.max_num_batched_tokens,
        "state": q.state.value if q.state else "auto",
    }


def _candidate_json(c: Candidate) -> dict[str, Any]:
    d = c.deployment
    return {
        "engine": d.engine,
        "shape": d.shape,
        "state": d.state.value,
        "tp": d.tp,
        "dp": d.dp,
        "ep": d.ep,
        "pp": d.pp,
        "replicas": d.replicas,
        "speculative": d.speculation.method,
        "works": c.works,
        "violations": list(c.violations),
        "recipe": c.recipe,
        "argv": [command.argv() for command in deployment_commands(d)],
        "max_num_batched_tokens_limit": c.step_limit,
        "missing_gib": round(c.proof.shortfall_bytes / GIB, 2),
        "knobs": [{"text": k.text, "frees_gib": round(k.frees_bytes / GIB, 2), "fits": k.fits} for k in c.knobs],
        "proof": {**proof_section(c.proof), "terms": _terms_json(c.proof)},
    }


def _terms_json(proof: Proof) -> list[dict[str, Any]]:
    return [
        {"name": t.name, "gib": [round(t.low / GIB, 2), round(t.high / GIB, 2)], "source": t.source}
        for t in proof.terms
    ]


@click.command("launch", cls=_Command)
@click.argument("recipe", shell_complete=_recipe_ids)
@click.option(
    "--engine", type=click.Choice(["vllm", "sglang"]), help="Take the recipe of the same plan for this engine."
)
@click.option(
    "--format", "output", type=click.Choice(["shell", "compose", "k8s", "argv"]), default="shell", show_default=True
)
@_override_options
@click.option("--context", help="Another context than the recipe's, as 64k.")
@json_option
def launch(recipe: str, engine: str | None, output: str, context: str | None, as_json: bool, **overrides: Any) -> None:
    """Print how to start RECIPE (an id, or a YAML file). Nothing is executed."""
    from dsv4.planning.launch import split_roles
    from dsv4.planning.manifests import of_recipe, render

    found, _ = find_recipe(recipe)
    found = _other_engine(found, engine)
    if not found.can_work:
        raise RecipeError(f"{found.id}: cannot work: {found.why_not[0].why}")
    with named("--context"):
        tokens = parse_context(context) if context else 0
    start = of_recipe(found, _overrides(overrides, tokens))
    if tokens and prove(start.deployment, found.lengths.concurrency).starts is Verdict.NO:
        raise PlanError(f"--context {context}: does not start with {found.id}'s step; see dsv4 plan")
    if as_json:
        argv = split_roles(start.commands("127.0.0.1"))
        print_json({"id": found.id, "env": start.environment(), "argv": argv})
        return
    with named():
        click.echo(render(start, output))


def _other_engine(recipe: Recipe, engine: str | None) -> Recipe:
    if engine is None or engine == recipe.engine.name:
        return recipe
    for other in shipped_recipes(recipe.hardware.gpu):
        same = (other.checkpoint.id, other.hardware.count, other.plan) == (
            recipe.checkpoint.id,
            recipe.hardware.count,
            recipe.plan,
        )
        if same and other.engine.name == engine and other.can_work:
            return other
    raise RecipeError(
        f"{recipe.id}: has no counterpart for {engine}; see dsv4 recipes list --gpu {recipe.hardware.gpu} --engine {engine}"
    )


@click.group("recipes")
def recipes() -> None:
    """Shipped recipes: list, show and check them."""


@recipes.command("list", cls=_Command)
@click.option("--gpu", shell_complete=_gpu_ids, help="Only this card.")
@click.option("--model", help="Only this checkpoint.")
@click.option("--engine", type=click.Choice(["vllm", "sglang"]), help="Only this engine.")
@json_option
def list_recipes(gpu: str | None, model: str | None, engine: str | None, as_json: bool) -> None:
    """One line per recipe."""
    with named("--gpu"):
        card = find_gpu(gpu).id if gpu else None
    with named("--model"):
        checkpoint = find_checkpoint(model).id if model else None
    rows = [
        r
        for r in shipped_recipes(card)
        if (checkpoint is None or r.checkpoint.id == checkpoint) and (engine is None or r.engine.name == engine)
    ]
    if as_json:
        print_json(
            {"recipes": [{"id": r.id, "title": r.title, "status": r.status, "evidence": _kinds(r)} for r in rows]}
        )
        return
    width = max((len(r.id) for r in rows), default=0)
    for r in rows:
        click.echo(f"{r.id:{width}}  {r.status:11}  {_kinds(r):17}  {r.title}")
    refused = sum(not r.can_work for r in rows)
    click.echo(f"{len(rows) - refused} recipes; {refused} more say why a machine cannot serve it")


def _kinds(r: Recipe) -> str:
    return "+".join(dict.fromkeys(e.kind for e in r.evidence))


@recipes.command("show", cls=_Command)
@click.argument("recipe", shell_complete=_recipe_ids)
@json_option
def show(recipe: str, as_json: bool) -> None:
    """The recipe's file."""
    found, path = find_recipe(recipe)
    if as_json:
        facts = found.model_dump(mode="json")
        facts["engine"]["versions"] = found.version_range
        print_json({"recipe": facts})  # whose own schema_version is the recipe's
    else:
        click.echo(path.read_text(encoding="utf-8").rstrip())


@recipes.command("check", cls=_Command)
@click.argument("recipe", nargs=-1, shell_complete=_recipe_ids)
@click.option(
    "--engine-path",
    "engine_paths",
    multiple=True,
    type=click.Path(file_okay=False, exists=True, path_type=Path),
    help="Folder with an unpacked engine wheel to check against; repeatable.",
)
@click.option("--no-engines", is_flag=True, help="Leave the engine rungs out.")
@click.option("--write-proofs", is_flag=True, help="Rewrite memory.proof in the files first.")
@click.option("--write-schema", is_flag=True, help="Rewrite recipe.schema.json first.")
@json_option
def check(
    recipe: tuple[str, ...],
    engine_paths: tuple[Path, ...],
    no_engines: bool,
    write_proofs: bool,
    write_schema: bool,
    as_json: bool,
) -> None:
    """Run the ladder: schema, rules, memory, and each tested engine that is at hand. Exit 1 when a
    rung fails.
    """
    from dsv4.planning.recipe import check as recipe_check

    paths = [_path_of(name) for name in recipe] or recipe_paths()
    if write_schema:
        write_schema_file()
    if write_proofs:
        from dsv4.planning.recipe.proofs import rewrite

        for path in paths:
            rewrite(path)
    reports = recipe_check.check(paths, [] if no_engines else recipe_check.find_engines(engine_paths))
    if as_json:
        print_json({"reports": [{**asdict(r), "path": str(r.path)} for r in reports]})
    else:
        width = max((len(r.id) for r in reports), default=0)
        for report in reports:
            click.echo(_report_line(report, width))
    if any(r.failed for r in reports):
        raise SystemExit(1)


def write_schema_file() -> None:
    """Write recipes/recipe.schema.json from the schema."""
    from dsv4.data import data_folder

    (data_folder() / "recipe.schema.json").write_text(json.dumps(json_schema(), indent=2) + "\n", encoding="utf-8")


def _path_of(name: str) -> Path:
    by_id = {p.stem: p for p in recipe_paths()}
    if name in by_id:
        return by_id[name]
    if name.endswith((".yaml", ".yml")) or "/" in name:
        return Path(name)
    return find_recipe(name)[1]  # raises with the nearest ids


def _report_line(report: Any, width: int) -> str:
    word = "FAIL" if report.failed else "ok"
    rungs = " ".join(f"{r.name}{'' if r.outcome == 'ok' else ':' + r.outcome.upper()}" for r in report.rungs)
    details = "; ".join(d for r in report.rungs if r.outcome != "ok" for d in r.details)
    return f"{report.id:{width}}  {word:4}  {rungs}{'  ' + details if details else ''}"
