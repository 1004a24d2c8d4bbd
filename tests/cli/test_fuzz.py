# SPDX-License-Identifier: Apache-2.0
"""Bad input gets one message and the right exit code, whatever it is. `make fuzz` asks 10,000 cases
of each kind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from dsv4.machine import env
from tests.support import fuzz

Make = Callable[[Random], list[str]]
KINDS = ("config.json", "safetensors headers", "safetensors index", "recipes", "arguments")


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Make]:
    return fuzz.kinds(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("kind", KINDS)
def test_every_answer_is_good(kinds: dict[str, Make], kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in env.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert list(kinds) == list(KINDS)
    result = fuzz.run(kinds[kind], kind, range(150))
    assert not result.bad, "\n".join(
        f"{kind}:{number}: {why}\n{argv}\n{text}" for number, why, argv, text in result.bad
    )
    assert sum(result.codes.values()) == 150
    assert result.grown_mib < fuzz.MIB


FOUND = [
    ("config.json", 6610),  # lists in lists, 3000 deep: RecursionError
    ("config.json", 4561),  # a value of 10,000 characters, printed whole
    ("safetensors index", 14),  # a list for a shard's name: told as a path that is too long, exit code 2
    ("recipes", 5385),  # no number where the proof has some: TypeError
]


@pytest.mark.parametrize(("kind", "number"), FOUND)
def test_what_the_long_run_found_stays_mended(kinds: dict[str, Make], kind: str, number: int) -> None:
    assert not fuzz.run(kinds[kind], kind, range(number, number + 1)).bad


def test_an_index_does_not_lead_out_of_its_folder(tiny_flash: Path, tmp_path: Path) -> None:
    for file in tiny_flash.iterdir():
        (tmp_path / file.name).symlink_to(file)
    index = tmp_path / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    outside = raw["weight_map"]["embed.weight"] = f"../{tiny_flash.name}/{raw['weight_map']['embed.weight']}"
    index.unlink()
    index.write_text(json.dumps(raw))
    code, _, err = fuzz.answer(["check", str(tmp_path)])
    assert code == 1
    assert f"'embed.weight' is in '{outside}', which is no *.safetensors file of this folder" in err


def test_the_same_number_is_the_same_case(kinds: dict[str, Make]) -> None:
    first, again = (kinds["arguments"](Random("arguments:7")) for _ in range(2))
    assert first == again


def test_a_traceback_silence_and_slowness_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge can say no."""

    def broken(argv: list[str]) -> None:
        if argv == ["loop"]:
            while True:
                pass
        raise SystemExit(2) if argv == ["silent"] else ZeroDivisionError("x")

    monkeypatch.setattr(fuzz.cli, "main", broken)
    monkeypatch.setattr(fuzz, "SECONDS", 0.2)
    why = [fuzz.judge("arguments", *fuzz.answer([word])) for word in ("loop", "silent", "raise")]
    assert why == ["no answer in 0.2 s of CPU", "exit code 2 and nothing on stderr", "ZeroDivisionError: x"]
