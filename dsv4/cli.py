# SPDX-License-Identifier: Apache-2.0
"""The `dsv4` command.

Exit codes: 0 = ok; 1 = a check failed (the report says which); 2 = bad input (one message on stderr, nothing done).
Every command takes --json. Commands are imported when called, so that planning never loads torch.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from dsv4 import env
from dsv4.compat import dsv4_version
from dsv4.errors import CheckpointError, Dsv4Error

CHECK_FAILED = 1
BAD_INPUT = 2

# name: (where the command is, its line in `dsv4 --help`)
COMMANDS = {
    "plan": ("dsv4.recipes_cli:plan", "Prove that a checkpoint, a context and a machine fit, and print the launch command."),
    "launch": ("dsv4.recipes_cli:launch", "Print how to start an engine from a recipe."),
    "recipes": ("dsv4.recipes_cli:recipes", "List and check the shipped recipes."),
    "check": ("dsv4.cli:check", "Validate a checkpoint folder from its safetensors headers alone."),
    "tiny": ("dsv4.tiny_cli:tiny", "Write a small random checkpoint in the released format."),
    "doctor": ("dsv4.doctor:doctor", "Say what would serve DeepSeek-V4 here, and prove what a server uses."),
}


class LazyGroup(click.Group):
    """A group whose commands are imported when they are called; `--help` imports none."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        try:
            command = getattr(importlib.import_module(module), attribute)
        except ModuleNotFoundError as e:
            raise click.ClickException(f"{cmd_name} needs {e.name}, which is not installed; pip install {_provider(e.name)}") from e
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


def _provider(module: str | None) -> str:
    return "'dsv4[plan]'" if module == "matplotlib" else (module or "it").partition(".")[0]


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(dsv4_version(), prog_name="dsv4")
@click.pass_context
def dsv4(ctx: click.Context) -> None:
    """Serve DeepSeek-V4 through stock vLLM and stock SGLang.

    Exit codes: 0 ok, 1 a check failed, 2 bad input.
    """
    if ctx.invoked_subcommand != "doctor":  # doctor reports a bad variable as one finding among others
        env.check_environ()


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--config", type=click.Path(exists=True, path_type=Path), help="Another config.json than the folder's own.")
@click.option("--require-draft", is_flag=True, help="Fail when the speculative draft (mtp.*) is absent.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def check(folder: Path, config: Path | None, require_draft: bool, as_json: bool) -> None:
    """Validate the checkpoint in FOLDER from its safetensors headers alone.

    Names every missing, extra, misshapen or mis-typed tensor, and every absent or truncated shard.
    """
    from dsv4.checkpoint import validate
    from dsv4.config import V4Config

    expected = V4Config.from_path(config or folder)
    try:
        report = validate(folder, expected, require_draft)
    except CheckpointError as e:
        if as_json:
            click.echo(json.dumps({"folder": str(folder), "ok": False, "error": str(e)}, indent=2))
        else:
            click.echo(f"dsv4: {e}", err=True)
        sys.exit(CHECK_FAILED)
    facts = {
        "folder": str(folder),
        "ok": True,
        "tensors": len(report.headers),
        "bytes": report.total_bytes,
        "shards": len(report.files),
        "layers": expected.num_hidden_layers,
        "experts": expected.expert_dtype,
        "expert_scales": report.expert_scale_dtype,
        "draft": report.draft,
        "ignored": list(report.ignored),
    }
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    console().print(
        f"{folder}: complete: {len(report.headers):,} tensors, {report.total_bytes / 1e9:,.2f} GB in {len(report.files)} shards;"
        f" {expected.num_hidden_layers} layers, {expected.expert_dtype} experts, draft: {report.draft}"
    )


def console() -> Console:
    """Console for human output: no markup surprises in paths, no wrapping when piped."""
    return Console(highlight=False, markup=False, soft_wrap=True)


def main(argv: list[str] | None = None) -> None:
    """Entry point: every expected error is one message on stderr and exit code 2, never a traceback."""
    try:
        result: Any = dsv4.main(args=argv, prog_name="dsv4", standalone_mode=False)
    except Dsv4Error as e:
        _fail(str(e))
    except click.ClickException as e:
        e.show()
        sys.exit(BAD_INPUT)
    except (click.Abort, KeyboardInterrupt):
        click.echo("dsv4: interrupted", err=True)
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()  # the reader left; there is nobody to tell
        sys.exit(CHECK_FAILED)
    except OSError as e:
        _fail(f"{e.filename or 'system'}: {e.strerror or e}")
    sys.exit(result if isinstance(result, int) else 0)


def _fail(message: str) -> None:
    click.echo(f"dsv4: {message}", err=True)
    sys.exit(BAD_INPUT)


if __name__ == "__main__":
    main()
