# SPDX-License-Identifier: Apache-2.0
"""Every DSV4_* variable: the one table, typed access, and the refusal of names and values that are
not in it. DSV4_API_KEY stands beside it: a secret has no table.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from dsv4.errors import EnvError, nearest

PREFIX = "DSV4_"
API_KEY = "DSV4_API_KEY"  # of a server that is asked; any text, and never shown
_ON = "1"
_OFF = "0"


@dataclass(frozen=True)
class Variable:
    """One environment variable. choices: every value it may have; a flag is on at "1" and off at
    "0".
    """

    name: str
    default: str
    choices: tuple[str, ...]
    meaning: str

    @property
    def is_flag(self) -> bool:
        return self.choices == (_OFF, _ON)


VARIABLES = {
    v.name: v
    for v in (
        Variable(
            "DSV4_MODE",
            "auto",
            ("auto", "on", "off"),
            "who serves DeepSeek-V4: auto = dsv4 where the engine's own V4 cannot run or is slower, on = always dsv4, off = never",
        ),
        Variable(
            "DSV4_OPS",
            "auto",
            ("auto", "triton", "reference"),
            "implementation of the operators: auto = the fastest that runs here, or force one",
        ),
        Variable(
            "DSV4_CHECK",
            _OFF,
            (_OFF, _ON),
            "check operators' slots, lengths and ids before each call, and that each sublayer's output is finite; slow, without CUDA graphs, for debugging",
        ),
        Variable(
            "DSV4_STATE",
            "auto",
            ("auto", "summary", "paged"),
            "compressor state in vLLM: summary = one small block per request, paged = native vLLM's mapping,"
            " auto = on a GPU what holds more requests of max_model_len (paged with model runner V1), summary on a CPU",
        ),
        Variable(
            "DSV4_SHARE_INDEX",
            "auto",
            ("auto", "on", "off"),
            "tensor-parallel ranks score index keys for each other, a share of the tokens each: auto = in long steps"
            " over long contexts, where it pays by arithmetic",
        ),
        Variable(
            "DSV4_CPU_PLATFORM",
            "auto",
            ("auto", "on", "off"),
            "the CPU reference platform: auto = only where no accelerator is present, on = even beside one, off = never",
        ),
        Variable("DSV4_ALLOW_UNTESTED", _OFF, (_OFF, _ON), "try engine versions outside the tested range"),
    )
}


def get(name: str, environ: Mapping[str, str] | None = None) -> str:
    """Value of `name`, or its default when unset or empty. Raises EnvError for a value that is not
    one of its choices.
    """
    variable = VARIABLES[name]
    value = (os.environ if environ is None else environ).get(name, "").strip().lower() or variable.default
    if value not in variable.choices:
        raise EnvError(f"{name}={value}: expected one of {', '.join(variable.choices)} ({variable.meaning})")
    return value


def flag(name: str, environ: Mapping[str, str] | None = None) -> bool:
    """Whether the flag `name` is on. Raises EnvError for a value other than 0 and 1."""
    if not VARIABLES[name].is_flag:
        raise ValueError(f"{name} is no flag")
    return get(name, environ) == _ON


def api_key(environ: Mapping[str, str] | None = None) -> str | None:
    """The key that a server was started with, where the environment tells: DSV4_API_KEY, or vLLM's
    own variable."""
    environ = os.environ if environ is None else environ
    return environ.get(API_KEY) or environ.get("VLLM_API_KEY") or None


def check_environ(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Values of every DSV4_* variable, defaults included.

    Raises EnvError naming every unknown name, with the nearest known one, and every bad value: a
    misspelt variable would otherwise be ignored in silence.
    """
    environ = os.environ if environ is None else environ
    problems = [
        _unknown(name) for name in sorted(environ) if name.startswith(PREFIX) and name not in (*VARIABLES, API_KEY)
    ]
    values = {}
    for name in VARIABLES:
        try:
            values[name] = get(name, environ)
        except EnvError as e:
            problems.append(str(e))
    if problems:
        raise EnvError("; ".join(problems))
    return values


def _unknown(name: str) -> str:
    near = nearest(name, VARIABLES, n=1, cutoff=0.6)
    return f"{name}: unknown variable; " + (f"did you mean {near[0]}?" if near else f"known are {', '.join(VARIABLES)}")
