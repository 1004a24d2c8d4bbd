# SPDX-License-Identifier: Apache-2.0
"""What a compiled kernel executes, counted in its SASS or AMD assembly: no GPU is needed, and none
could say it more exactly. That is work, not time."""

from __future__ import annotations

import re
from dataclasses import dataclass

_SASS = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.+?)\s*;?\s*(?:/\*|$)", re.MULTILINE)
_BRANCH = re.compile(r"\bBRA(?:\.\w+)*\s.*?(0x[0-9a-f]+)")
_GCN = re.compile(r"^\s+([a-z][a-z0-9]*_\w+)\s*(.*)$")
_LABEL = re.compile(r"^(\.L\w+):")

# By what an instruction begins with, in SASS and in AMD's assembly.
_KINDS = {
    "barriers": r"BAR\.|s_barrier",
    "matrix": r"[HIQ]G?MMA|OMMA|UTC\w*MMA|v_mfma",
    "async_copies": r"LDGSTS|UTMALDG|buffer_load\w*_lds|global_load_lds",
    "narrow_shared": r"(?:LDS|STS)\.[US]?(?:8|16)|ds_(?:read|write|load|store)_[ui]?b?(?:8|16)\b|ds_(?:read|write)_[ui](?:8|16)",
}


@dataclass(frozen=True)
class Code:
    """A stretch of instructions, as one warp runs it. matrix: products of matrix units;
    narrow_shared: loads and stores of one or two bytes in shared memory."""

    instructions: int
    barriers: int = 0
    matrix: int = 0
    async_copies: int = 0
    narrow_shared: int = 0

    @classmethod
    def of(cls, instructions: list[str]) -> Code:
        found = {kind: sum(bool(re.match(p, i)) for i in instructions) for kind, p in _KINDS.items()}
        return cls(len(instructions), **found)


@dataclass(frozen=True)
class Program:
    """whole: all of a kernel; loops: its innermost ones, in the order of the code."""

    whole: Code
    loops: tuple[Code, ...]


def read_sass(text: str) -> Program:
    """The kernel of a listing by `cuobjdump -sass`."""
    lines = [(int(at, 16), re.sub(r"^@!?U?P\w+\s+", "", what)) for at, what in _SASS.findall(text)]
    lines = [(at, what) for at, what in lines if not what.startswith("NOP")]
    jumps = [(int(found[1], 16), at) for at, what in lines if (found := _BRANCH.match(what))]
    return _program([at for at, _ in lines], [what for _, what in lines], jumps)


def read_amdgcn(text: str) -> Program:
    """The kernel of AMD's assembly."""
    labels: dict[str, int] = {}
    code: list[str] = []
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(code)
        elif (found := _GCN.match(line)) and not found[1].startswith("s_nop"):
            code.append(f"{found[1]} {found[2]}")
    targets = [(labels.get(what.split()[1]), at) for at, what in enumerate(code) if re.match(r"s_c?branch", what)]
    return _program(list(range(len(code))), code, [(to, at) for to, at in targets if to is not None])


def _program(places: list[int], code: list[str], jumps: list[tuple[int, int]]) -> Program:
    ends: dict[int, int] = {}  # a loop with several ways back is one
    for to, at in jumps:
        if to < at:
            ends[to] = max(at, ends.get(to, 0))
    innermost = sorted(
        (first, last)
        for first, last in ends.items()
        if not any(first <= a and b <= last and (a, b) != (first, last) for a, b in ends.items())
    )
    bodies = [[c for p, c in zip(places, code, strict=True) if first <= p <= last] for first, last in innermost]
    return Program(Code.of(code), tuple(Code.of(body) for body in bodies))
