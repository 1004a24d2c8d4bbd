# SPDX-License-Identifier: Apache-2.0
"""What both engines are asked alike: does this command line parse, is each name known, are the
variables read.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import types
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NoReturn, get_args

from dsv4.planning.recipe.question import Answer, BlockPools, Case, KvQuestion, TokenPools

FOREIGN_ENV = (
    "NCCL_",
    "CUDA_",
    "GLOO_",
    "HF_",
    "OMP_",
    "PYTORCH_",
    "TORCH_",
    "UCX_",
    "NVSHMEM_",
    "FLASHINFER_",
    "DSV4_",
)


def symbol(path: str) -> Any:
    """`a.b:c.d`, or the first of several such paths separated by spaces that exists (engines move
    things).
    """
    errors = []
    for one in path.split():
        module, _, name = one.partition(":")
        try:
            found: Any = importlib.import_module(module)
            for part in name.split(".") if name else ():
                found = getattr(found, part)
            return found
        except (ImportError, AttributeError) as e:
            errors.append(f"{one}: {e}")
    raise ImportError("; ".join(errors))


def literals(t: Any) -> Iterator[str]:
    """The strings that a Literal, or a union of them, allows."""
    for arg in get_args(t):
        if isinstance(arg, str):
            yield arg
        else:
            yield from literals(arg)


def value_of(args: Sequence[str], flag: str) -> str | None:
    """The argument after `flag`, None where the flag is not given."""
    return args[args.index(flag) + 1] if flag in args else None


class _RefusedError(Exception):
    """The engine's parser called error()."""


def refuse_by_exception(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """`parser`, raising what it would print before it ends the process."""
    parser.error = types.MethodType(_refuse, parser)  # type: ignore[method-assign]
    return parser


def _refuse(self: argparse.ArgumentParser, message: str) -> NoReturn:
    raise _RefusedError(message)


class EngineProbe:
    """One engine in this process: its version, its parser, the variables it knows, and its KV
    planner.
    """

    version = ""
    parser: argparse.ArgumentParser
    env_names: frozenset[str]

    def answer(self, case: Case) -> Answer:
        """What the engine says to `case`; a failure of its KV planner is part of the answer."""
        errors = [e for args in case.argvs for e in (*self._parse(args), *self._registries(args))]
        errors = [*dict.fromkeys(errors), *self._env(case.env)]
        if case.kv is None:
            return Answer(errors=tuple(errors))
        try:
            return Answer(errors=tuple(errors), kv=self.kv(case.kv))
        except Exception as e:
            return Answer(errors=tuple(errors), kv_error=f"{type(e).__name__}: {e}")

    def _registries(self, args: Sequence[str]) -> list[str]:
        raise NotImplementedError

    def kv(self, q: KvQuestion) -> BlockPools | TokenPools:
        """What the engine's own planner makes of `q`."""
        raise NotImplementedError

    def _parse(self, args: Sequence[str]) -> Iterator[str]:
        for arg in args:
            if arg.startswith("--"):
                action = self.parser._option_string_actions.get(arg.split("=")[0].split(".")[0])
                if action is None:
                    yield f"{arg}: no such option"
                elif "deprecated" in (action.help or "").lower()[:40] or "Deprecated" in type(action).__name__:
                    yield f"{arg}: deprecated ({' '.join((action.help or '').split())[:80]})"
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                self.parser.parse_args(list(args))
        except (_RefusedError, SystemExit, ValueError) as e:
            yield " ".join(str(e).split())[:300]

    def _env(self, names: Iterable[str]) -> Iterator[str]:
        for name in names:
            if name not in self.env_names and not name.startswith(FOREIGN_ENV):
                yield f"environment variable {name}: unknown to this version, it would be ignored"

    def _one_of(self, args: Sequence[str], flag: str, known: Iterable[str], what: str) -> list[str]:
        value = value_of(args, flag)
        options = sorted(set(known))
        return (
            []
            if value is None or value in options
            else [f"{flag} {value}: not among {what} ({', '.join(options)[:200]})"]
        )
