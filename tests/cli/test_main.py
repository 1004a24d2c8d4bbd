# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from dsv4.cli import main as cli

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture
def dsv4(capsys, monkeypatch):
    """Run `dsv4 ARGS` in this process: (exit code, stdout, stderr)."""
    for name in cli.env.VARIABLES:
        monkeypatch.delenv(name, raising=False)

    def run(*args: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            cli.main([str(arg) for arg in args])
        captured = capsys.readouterr()
        return caught.value.code, captured.out, captured.err

    return run


def test_check_of_a_good_folder_exits_0(dsv4, tiny_flash):
    code, out, err = dsv4("check", tiny_flash)
    assert (code, err) == (0, "")
    assert "complete: 585 tensors" in out


def test_check_prints_json(dsv4, tiny_flash):
    code, out, _ = dsv4("check", tiny_flash, "--json")
    facts = json.loads(out)
    assert code == 0
    assert (facts["ok"], facts["tensors"], facts["experts"], facts["draft"]) == (True, 585, "fp4", "mtp")
    assert facts["schema_version"] == 1


def test_check_of_a_mismatch_exits_1_and_says_it_on_stderr(dsv4, tiny_flash):
    code, out, err = dsv4("check", tiny_flash, "--config", GOLDEN / "configs" / "DeepSeek-V4-Pro.json")
    assert (code, out) == (1, "")
    assert err.startswith(f"dsv4: {tiny_flash}: ")
    assert "embed.weight has shape [512, 256], config.json implies [129280, 7168]" in err


def test_check_of_a_mismatch_in_json_exits_1_with_the_same_error(dsv4, tiny_flash):
    code, out, _ = dsv4("check", tiny_flash, "--json", "--config", GOLDEN / "configs" / "DeepSeek-V4-Pro.json")
    facts = json.loads(out)
    assert (code, facts["ok"], facts["schema_version"]) == (1, False, 1)
    assert "embed.weight has shape" in facts["error"]


def test_tiny_writes_what_check_accepts(dsv4, tmp_path):
    code, out, _ = dsv4("tiny", tmp_path / "t", "--layers", 1, "--variant", "pro", "--experts", "fp8", "--json")
    assert code == 0
    facts = json.loads(out)
    assert (facts["folder"], facts["schema_version"]) == (str(tmp_path / "t"), 1)
    assert dsv4("check", tmp_path / "t", "--require-draft")[0] == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["check", "/no/such/folder"], "does not exist"),
        (["check", str(GOLDEN)], "config.json: cannot be read"),
        (["tiny", str(GOLDEN)], "already exists and is not empty"),
        (["tiny", "out", "--layers", "0"], "0 is not in the range"),
        (["tiny", "out", "--variant", "huge"], "'huge' is not one of 'flash', 'pro'"),
        (["tiny"], "Missing argument 'OUT'"),
        (["chekc"], "No such command 'chekc'"),
        (["check", "--jsonn", "."], "--jsonn"),
    ],
)
def test_bad_input_exits_2_with_one_message_and_no_traceback(dsv4, args, message):
    code, out, err = dsv4(*args)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


def test_unwritable_place_exits_2_with_the_path(dsv4, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = dsv4("tiny", tmp_path / "file" / "out")
    assert code == 2
    assert f"{tmp_path / 'file'}" in err


def test_unknown_variable_stops_every_command(dsv4, tiny_flash, monkeypatch):
    monkeypatch.setenv("DSV4_OSP", "reference")
    code, _, err = dsv4("check", tiny_flash)
    assert (code, err) == (2, "dsv4: DSV4_OSP: unknown variable; did you mean DSV4_OPS?\n")


def test_help_lists_every_command_without_importing_any(dsv4, monkeypatch):
    monkeypatch.setattr(cli.importlib, "import_module", lambda name: pytest.fail(f"imported {name}"))
    code, out, _ = dsv4("--help")
    assert code == 0
    assert all(name in out for name in cli.COMMANDS)
    assert "Exit codes: 0 ok, 1 a check failed, 2 bad input" in out


def test_a_command_whose_library_is_absent_says_what_to_install(dsv4, monkeypatch):
    def absent(name):
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr(cli.importlib, "import_module", absent)
    code, _, err = dsv4("tiny", "out")
    assert code == 2
    assert "tiny needs torch, which is not installed; pip install torch" in err


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_every_command_exists_and_takes_json(name):
    command = cli.dsv4.get_command(None, name)
    leaves = command.commands.values() if hasattr(command, "commands") else [command]
    for leaf in leaves:
        assert any("--json" in option.opts for option in leaf.params), leaf.name


def test_help_starts_within_a_second_of_cpu():
    # CPU time, not the clock: other tests run beside this one.
    start = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "dsv4", "--help"], check=True, capture_output=True, cwd=GOLDEN.parents[1])
    end = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime < 1.0
