# SPDX-License-Identifier: Apache-2.0
"""Bad input by the thousand for the `dsv4` command: `python -m tests.support.fuzz --cases 10000`
(`make fuzz`); tests/cli/test_fuzz.py runs a few of each kind.

Case i of a kind is made from the seed "kind:i" alone, so that `--kind config --first 4711 --cases 1
--verbose` repeats it. A good answer is an exit code of 0, 1 or 2; for 1 and 2 one message of a few
lines; never a traceback; within SECONDS and MIB.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import yaml

from dsv4.cli import main as cli
from dsv4.data import data_folder

SECONDS, MIB = 5.0, 256  # of CPU per case (12 times that by the clock); growth of this process over all cases of a kind
LINES, CHARACTERS = 62, 8000  # of one message: 60 lines are what dsv4 lists of what is wrong with tensors

NASTY: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 64, 127, 128, 129, 2**31, 2**53, 2**63, 2**64, -(2**63), 10**30, 10**400, 0.5, -0.0,
    1e-320, 1e308, float("nan"), float("inf"), "", " ", "a", "0", "1e9", "true", "null", "\x00", "\ud800", "é", "..",
    "../../etc/passwd", "/", "/dev/zero", "/dev/null", "x" * 5000, "\n\n", "[bold]x[/bold]", "{}", "%s", "${HOME}", [], [None],
    [[]], [0] * 3, [128] * 300, ["F32"] * 3, {}, {"": None}, {"a": {"b": {}}}, {"__class__": 1},
]  # fmt: skip


@dataclass
class Result:
    """kinds of exit codes, and what was wrong: (case, why, input, answer)."""

    codes: Counter[int] = field(default_factory=Counter)
    bad: list[tuple[int, str, str, str]] = field(default_factory=list)
    slowest_s: float = 0.0
    grown_mib: float = 0.0


# ---- mutations ----------------------------------------------------------------------------------


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of everything inside a tree of lists and dicts."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield (*path, key)
            yield from places(value[key], (*path, key))


def mutate_tree(tree: Any, rng: random.Random) -> Any:
    """A copy with one to three values replaced, removed, doubled, renamed or nested."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        found = list(places(tree))
        if not found:
            return rng.choice(NASTY)
        *parents, key = rng.choice(found)
        holder = tree
        for step in parents:
            holder = holder[step]
        action = rng.randrange(8)
        if action < 4:
            holder[key] = copy.deepcopy(rng.choice(NASTY))
        elif action == 4:
            del holder[key]
        elif action == 5 and isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
            holder[key] = rng.choice(
                (-holder[key], holder[key] + 1, holder[key] * 2, str(holder[key]), holder[key] + 0.5)
            )
        elif action == 6 and isinstance(holder, dict):
            holder[str(rng.choice(NASTY))[:80]] = holder.pop(key)
        else:
            holder[key] = [holder[key]] * rng.choice((1, 2, 50))
    return tree if rng.random() < 0.98 else rng.choice(NASTY)


def mutate_bytes(raw: bytes, rng: random.Random) -> bytes:
    """Cut, flipped, doubled, or filled with something else."""
    data = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(data) + 1)
        action = rng.randrange(6)
        if action == 0:
            del data[at:]
        elif action == 1 and data:
            data[at % len(data)] = rng.randrange(256)
        elif action == 2:
            data[at:at] = rng.choice(
                (b"\x00", b"\xff\xfe", b"{", b"[" * 3000, b'"', b",", b"9" * 5000, b"\xed\xa0\x80", b"&a *a")
            )
        elif action == 3:
            data[at:at] = data[: rng.randrange(1, 200)]
        elif action == 4:
            del data[at : at + rng.randrange(1, 100)]
        else:
            data[at : at + 4] = struct.pack("<i", rng.choice((-1, 0, 2**31 - 1)))
    return bytes(data)


def as_json(tree: Any) -> bytes:
    return json.dumps(tree).encode()  # NaN and Infinity as Python writes them, lone surrogates escaped


# ---- kinds: what is written, and the command that reads it ---------------------------------------


class Kinds:
    def __init__(self, scratch: Path) -> None:
        from dsv4.reference.tiny import write_tiny

        self.scratch = scratch
        self.good = write_tiny(scratch / "good", "flash", num_layers=3)
        self.folder = scratch / "case"
        self.config = json.loads((self.good / "config.json").read_text())
        self.index = json.loads((self.good / "model.safetensors.index.json").read_text())
        self.shard = sorted(self.good.glob("*.safetensors"))[0]
        raw = self.shard.read_bytes()
        (size,) = struct.unpack("<Q", raw[:8])
        self.header, self.weights = json.loads(raw[8 : 8 + size]), raw[8 + size :]
        self.recipes = [path.read_text() for path in sorted(data_folder().glob("*/*.yaml"))]
        self.words = list(command_words())

    def fresh(self, *without: str) -> None:
        """A folder of links to the good one's files."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        for file in self.good.iterdir():
            if file.name not in without:
                (self.folder / file.name).symlink_to(file)

    def config_json(self, rng: random.Random) -> list[str]:
        self.fresh("config.json")
        raw = as_json(mutate_tree(self.config, rng))
        (self.folder / "config.json").write_bytes(raw if rng.random() < 0.8 else mutate_bytes(raw, rng))
        return ["check", str(self.folder), *rng.choice(([], ["--json"], ["--require-draft"]))]

    def headers(self, rng: random.Random) -> list[str]:
        self.fresh(self.shard.name)
        header = as_json(mutate_tree(self.header, rng))
        if rng.random() < 0.3:
            header = mutate_bytes(header, rng)
        size = (
            len(header)
            if rng.random() < 0.9
            else rng.choice((0, 1, len(header) - 1, len(header) + 9, 2**40, 2**63, 2**64 - 1))
        )
        weights = self.weights if rng.random() < 0.8 else self.weights[: rng.randrange(len(self.weights))]
        (self.folder / self.shard.name).write_bytes(struct.pack("<Q", size) + header + weights)
        return ["check", str(self.folder), *rng.choice(([], ["--json"]))]

    def index_json(self, rng: random.Random) -> list[str]:
        self.fresh("model.safetensors.index.json")
        raw = as_json(mutate_tree(self.index, rng))
        (self.folder / "model.safetensors.index.json").write_bytes(
            raw if rng.random() < 0.7 else mutate_bytes(raw, rng)
        )
        return ["check", str(self.folder), *rng.choice(([], ["--json"]))]

    def recipe(self, rng: random.Random) -> list[str]:
        text = rng.choice(self.recipes)
        if rng.random() < 0.7:
            text = yaml.safe_dump(mutate_tree(yaml.safe_load(text), rng), sort_keys=False)
        raw = text.encode(errors="surrogatepass")
        file = self.scratch / "case.yaml"
        file.write_bytes(raw if rng.random() < 0.6 else mutate_bytes(raw, rng))
        shape = rng.choice(("shell", "compose", "k8s"))
        return rng.choice((["recipes", "check", str(file), "--no-engines"], ["launch", str(file), "--format", shape]))

    def arguments(self, rng: random.Random) -> list[str]:
        """Words in any order, or a good command with some of them put in or exchanged."""
        values = [str(v) for v in NASTY if v is None or isinstance(v, str | int | float)]
        values = [v for v in values if "\x00" not in v and "\ud800" not in v and not v.startswith("/dev/z")]
        argv = list(rng.choice(([], *GOOD)))
        for _ in range(rng.randrange(1, 5)):
            word, at = rng.choice(rng.choice((self.words, values))), rng.randrange(len(argv) + 1)
            argv[at : at + rng.randrange(2)] = [word]
        argv = [word for word in argv if not word.startswith("--write")]
        if "tiny" in argv:  # never a large one
            argv += ["--layers", "1"]
        if "recipes" in argv and "check" in argv:
            argv += ["--no-engines"]
        return argv


GOOD = (
    ["plan", "--model", "flash", "--gpu", "h200", "--count", "8", "--context", "128k"],
    [
        "plan",
        "--gpu-memory",
        "24",
        "--capability",
        "8.6",
        "--count",
        "8",
        "--engine",
        "vllm",
        "--proofs",
        "2",
        "--json",
    ],
    ["plan", "--model", "pro", "--gpu", "h100", "--count", "16", "--format", "k8s", "--port", "8000"],
    ["launch", "h200-x8-pro-vllm-context-800k", "--format", "compose", "--model-path", "/models/pro"],
    ["check", ".", "--json"],
    ["doctor", "--url", "http://127.0.0.1:9", "--json"],
    ["tiny", "out", "--seed", "3"],
    ["recipes", "check", "h200-x8-pro-vllm-context-800k"],
)


def command_words() -> Iterator[str]:
    """Commands, options and plausible values."""
    context = click.Context(cli.dsv4)
    for name in cli.dsv4.list_commands(context):
        command = cli.dsv4.get_command(context, name)
        yield name
        stack = [command]
        while stack:
            each = stack.pop()
            assert each is not None
            for parameter in each.params:
                yield from parameter.opts
            if isinstance(each, click.Group):
                yield from each.commands
                stack += each.commands.values()
    yield from ("flash", "pro", "flash-0731", "h200", "h100", "a100-80g", "8", "16", "1m", "800k", "vllm", "sglang", "text", "k8s",
                "compose", "shell", "latency", "h200-x8-pro-vllm-context-800k", "8.6", "24", "http://127.0.0.1:9", "out.svg",
                "deepseek-ai/DeepSeek-V4-Pro", "a=b", "--", "-", "-h", "--help", "--version")  # fmt: skip


def kinds(scratch: Path) -> dict[str, Callable[[random.Random], list[str]]]:
    made = Kinds(scratch)
    return {
        "config.json": made.config_json, "safetensors headers": made.headers, "safetensors index": made.index_json,
        "recipes": made.recipe, "arguments": made.arguments,
    }  # fmt: skip


# ---- the run ------------------------------------------------------------------------------------


class TooSlowError(BaseException):
    """Not caught by what is tried."""


def _too_slow(*_: object) -> None:
    raise TooSlowError


# CPU, because the machine may be busy; the clock, because a command may wait.
TIMERS = ((signal.SIGPROF, signal.ITIMER_PROF, 1), (signal.SIGALRM, signal.ITIMER_REAL, 12))


def answer(argv: list[str]) -> tuple[int | None, str, str]:
    """(exit code, stdout, stderr) of `dsv4 argv` in this process; None and the traceback where it
    raised."""
    out, err = io.StringIO(), io.StringIO()
    for alarm, timer, seconds in TIMERS:
        signal.signal(alarm, _too_slow)
        signal.setitimer(timer, seconds * SECONDS)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main(argv)
    except SystemExit as e:
        return e.code if isinstance(e.code, int) else 0, out.getvalue(), err.getvalue()
    except TooSlowError:
        return None, out.getvalue(), f"no answer in {SECONDS} s of CPU"
    except BaseException:
        return None, out.getvalue(), traceback.format_exc()
    finally:
        for _, timer, _ in TIMERS:
            signal.setitimer(timer, 0)
    return 0, out.getvalue(), err.getvalue()


def judge(kind: str, code: int | None, out: str, err: str) -> str | None:
    """What is wrong with an answer."""
    if code is None:
        return err.strip().splitlines()[-1][:160]
    if code not in ((0, 1) if kind.startswith("safetensors") else (0, 1, 2)):
        return f"exit code {code}: {err.strip()[:100]}"
    if "Traceback" in out + err:
        return "a traceback"
    if code == 2 and not err.strip():
        return "exit code 2 and nothing on stderr"
    if code == 1 and not (err + out).strip():
        return "exit code 1 and no report"
    if code == 0 and err.strip():
        return "exit code 0 and a message on stderr"
    if len(err.splitlines()) > LINES or len(err) > CHARACTERS:
        return f"a message of {len(err.splitlines())} lines, {len(err)} characters"
    return None


def run(
    make: Callable[[random.Random], list[str]], kind: str, cases: range, tick: Callable[[], None] = lambda: None
) -> Result:
    """Ask every case of a kind."""
    result, here = Result(), os.getcwd()
    # Nothing that a case starts may ask a machine or a network, and what it writes stays here.
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        for number in cases:
            if number == cases.start + min(50, len(cases) // 2):
                before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # behind imports and caches
            argv = make(random.Random(f"{kind}:{number}"))
            begin = time.monotonic()
            code, out, err = answer(argv)
            result.slowest_s = max(result.slowest_s, time.monotonic() - begin)
            if why := judge(kind, code, out, err):
                result.bad.append((number, why, " ".join(argv)[:300], (err or out)[-1500:]))
            else:
                result.codes[code or 0] += 1
            tick()
    os.chdir(here)
    result.grown_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return result


@click.command()
@click.option("--cases", default=10_000, show_default=True, help="Of each kind.")
@click.option("--first", default=0, help="Number of the first case.")
@click.option("--kind", "only", help="One kind alone, by the start of its name.")
@click.option("--verbose", is_flag=True, help="Print the whole answer to what failed.")
@click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path), help="Write the record here.")
def main(cases: int, first: int, only: str | None, verbose: bool, path: Path | None) -> None:
    """Fuzz the dsv4 command. Exit 1 when an answer was bad."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn
    from rich.table import Table

    os.environ |= {"HF_HUB_OFFLINE": "1"}
    for name in cli.env.VARIABLES:
        os.environ.pop(name, None)
    console, results = Console(), {}
    with tempfile.TemporaryDirectory() as folder:
        columns = [
            *Progress.get_default_columns()[:2],
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        ]
        with Progress(*columns, console=console) as progress:
            for kind, make in kinds(Path(folder)).items():
                if only is None or kind.startswith(only):
                    task = progress.add_task(kind, total=cases)
                    tick = lambda task=task: progress.advance(task)  # noqa: E731
                    results[kind] = run(make, kind, range(first, first + cases), tick)
    table = Table("kind", "cases", "exit 0", "1", "2", "bad", "slowest", "memory grew")
    for kind, r in results.items():
        table.add_row(
            kind, str(cases), *(str(r.codes[c]) for c in (0, 1, 2)), str(len(r.bad)), f"{r.slowest_s:.2f} s", f"{r.grown_mib:.0f} MiB"
        )  # fmt: skip
    console.print(table)
    seen: Counter[str] = Counter()
    for kind, r in results.items():
        for number, why, argv, text in r.bad:
            seen[why] += 1
            if seen[why] <= 3 or verbose:
                console.print(f"{kind}:{number}: {why}\n  dsv4 {argv}", markup=False)
                if verbose:
                    console.print(text, markup=False)
    if path is not None:
        record = {
            kind: {
                "cases": cases,
                "exits": {str(code): r.codes[code] for code in (0, 1, 2)},
                "bad": len(r.bad),
                "slowest_s": round(r.slowest_s, 2),
                "grown_mib": round(r.grown_mib),
            }
            for kind, r in results.items()
        }
        path.write_text(json.dumps(record, indent=1) + "\n")
    sys.exit(bool(seen) or any(r.grown_mib > MIB for r in results.values()))


if __name__ == "__main__":
    main()
