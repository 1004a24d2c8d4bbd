# SPDX-License-Identifier: Apache-2.0
"""The options of the engine on the path, by the group that it puts them in: `python -m
tests.support.engine_flags vllm|sglang` prints {group: [--flag, ...]} as JSON."""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import sys


def vllm() -> dict[str, list[str]]:
    """By the groups of its --help."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    return {str(g.title): [a.option_strings[0] for a in g._group_actions] for g in parser._action_groups}


def sglang() -> dict[str, list[str]]:
    """By the structures of its configuration: its --help has one group."""
    from sglang.srt.arg_groups import fields

    found = {}
    for module in pkgutil.iter_modules(fields.__path__):
        for kind in vars(importlib.import_module(f"{fields.__name__}.{module.name}")).values():
            if isinstance(kind, type) and hasattr(kind, "_NS_PATH"):
                found[kind.__name__] = [
                    f"--{name.replace('_', '-')}" for name in kind.__annotations__ if name[0] != "_"
                ]
    return found


if __name__ == "__main__":
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # engines log to file descriptor 1
    json.dump({"vllm": vllm, "sglang": sglang}[sys.argv[1]](), answer)
