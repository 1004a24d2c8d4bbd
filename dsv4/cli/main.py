# SPDX-License-Identifier: Apache-2.0
"""The `dsv4` command.

Exit codes: 0 = ok; 1 = a check failed (the report says which); 2 = bad input (one message on
stderr, nothing done). Every command takes --json. Commands are imported when called, so that
planning never loads torch.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import click

from dsv4.cli.output import BAD_INPUT, CHECK_FAILED
from dsv4.errors import Dsv4Error
from dsv4.machine import env
from dsv4.machine.compat import dsv4_version

# name: (where the command is, its line in `dsv4 --help`)
COMMANDS = {
    "plan": (
        "dsv4.cli.planning:plan",
        "Prove that a checkpoint, a context and a machine fit, and print the launch command.",
    ),
    "launch": ("dsv4.cli.planning:launch", "Print how to start an engine from a recipe."),
    "recipes": ("dsv4.cli.planning:recipes", "List and check the shipped recipes."),
    "check": ("dsv4.cli.checkpoint:check", "Validate a checkpoint folder from its safetensors headers alone."),
    "tiny": ("dsv4.cli.tiny:tiny", "Write a small random checkpoint in the released format."),
    "doctor": ("dsv4.cli.doctor:doctor", "Say what would serve DeepSeek-V4 here, and prove what a server uses."),
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
            raise click.ClickException(
                f"{cmd_name} needs {e.name}, which is not installed; pip install {_provider(e.name)}"
            ) from e
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


def main(argv: list[str] | None = None) -> None:
    """Entry point: every expected error is one message on stderr and exit code 2, never a
    traceback.
    """
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
