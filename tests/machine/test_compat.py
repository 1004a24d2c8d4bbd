# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from dsv4.errors import CompatError
from dsv4.machine import compat
from dsv4.machine.compat import Probe

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1", "0.33.0", "0.33.0+cu130", "0.33.1.dev4+g1234", "0.32.0rc1"])
def test_tested_vllm_versions_pass(version):
    compat.check_version("vllm", version)


@pytest.mark.parametrize("version", ["0.31.9", "0.34.0", "0.34.0.dev1", "1.0", "0.4.2", "main", ""])
def test_other_vllm_versions_are_refused_with_found_supported_and_fix(version):
    with pytest.raises(CompatError) as caught:
        compat.check_version("vllm", version)
    for part in (f"vLLM {version}", ">=0.32,<0.34", "pip install 'vllm>=0.32,<0.34'", "DSV4_ALLOW_UNTESTED=1"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("version", "supported"), [("0.5.21", False), ("0.5.22", True), ("0.5.23.post1", True), ("0.5.24", False)]
)
def test_sglang_range(version, supported):
    assert compat.is_supported("sglang", version) is supported


def test_untested_versions_pass_on_request():
    compat.check_version("vllm", "9.9", allow_untested=True)


def test_package_metadata_repeats_the_table():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for engine in compat.ENGINES:
        assert project["optional-dependencies"][engine] == [f"{engine}{compat.SUPPORTED[engine]}"]


def test_the_supported_range_spans_the_tested_lines():
    assert compat.SUPPORTED == {"vllm": ">=0.32,<0.34", "sglang": ">=0.5.22,<0.5.24"}
    assert compat._range(("1.9.1", "2.10.0"), 2) == ">=1.9,<2.11"


def test_the_environment_holds_every_tested_version():
    """One version of each engine is installed from the lock file, the other is unpacked by the
    Makefile."""
    locked = dict(re.findall(r"^(vllm|sglang)==(\S+)", (ROOT / "requirements" / "lock.txt").read_text(), re.MULTILINE))
    unpacked = dict(
        re.findall(r"^(VLLM_NEXT|SGLANG_PREV)_VERSION := (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    )
    held = {"vllm": (locked["vllm"], unpacked["VLLM_NEXT"]), "sglang": (unpacked["SGLANG_PREV"], locked["sglang"])}
    assert {e: tuple(v.partition("+")[0] for v in versions) for e, versions in held.items()} == compat.TESTED_VERSIONS


def test_absent_engine_has_no_version(monkeypatch):
    def absent(name):
        raise compat.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(compat.importlib.metadata, "version", absent)
    assert compat.installed_version("vllm") is None
    assert compat.dsv4_version() == "(not installed)"


@pytest.mark.parametrize(
    ("probe", "missing"),
    [
        (Probe("dsv4.model.config:LayerSpec", "field", ("index", "kind")), []),
        (
            Probe("dsv4.model.config:LayerSpec", "field", ("index", "compress_ratio")),
            ["dsv4.model.config:LayerSpec.compress_ratio"],
        ),
        (Probe("dsv4.model.config:LayerKind", "attribute", ("SWA", "MLA")), ["dsv4.model.config:LayerKind.MLA"]),
        (Probe("dsv4.model.config", "attribute", ("V4Config", "V5Config")), ["dsv4.model.config:V5Config"]),
        (
            Probe("dsv4.machine.compat:check_version", "parameter", ("engine", "strict")),
            ["dsv4.machine.compat:check_version.strict"],
        ),
        (Probe("dsv4.model.config:Gone", "field", ("index",)), ["dsv4.model.config:Gone"]),
        (Probe("dsv4.gone", "attribute", ("x",)), ["dsv4.gone (No module named 'dsv4.gone')"]),
        (
            Probe("dsv4.machine.compat:check_version", "field", ("engine",)),
            ["dsv4.machine.compat:check_version.engine"],
        ),
    ],
)
def test_probe_names_exactly_what_is_missing(probe, missing):
    assert compat.missing_symbols([probe]) == missing


def test_failed_probe_says_what_is_missing_and_what_to_do(monkeypatch):
    monkeypatch.setitem(compat.PROBES, "vllm", (Probe("dsv4.model.config:LayerKind", "attribute", ("MLA",)),))
    with pytest.raises(
        CompatError,
        match=r"vLLM 0.32.0 lacks what dsv4 .* uses: dsv4.model.config:LayerKind.MLA; install a tested version",
    ):
        compat.check_structure("vllm", "0.32.0")


@pytest.mark.slow
def test_installed_vllm_has_everything_that_is_probed():
    pytest.importorskip("vllm")
    compat.check_structure("vllm", compat.installed_version("vllm"))


@pytest.mark.slow
def test_installed_sglang_has_everything_that_is_probed():
    pytest.importorskip("sglang")
    compat.check_structure("sglang", compat.installed_version("sglang"))
