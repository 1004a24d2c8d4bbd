# SPDX-License-Identifier: Apache-2.0
"""What the documents say is held to the code: pictures, sizes, sections that sources point to, and
links."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from served import SGLANG_CHAT_ARGS, VLLM_CHAT_ARGS

from dsv4.model.tensors import Component, tensor_specs
from dsv4.planning.deployment import find_checkpoint

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
MODEL = (DOCS / "model.md").read_text(encoding="utf-8")
SOURCES = [f for folder in ("dsv4", "dsv4_vllm", "dsv4_sglang", "tests") for f in sorted((ROOT / folder).rglob("*.py"))]


def test_pictures_are_what_the_code_draws(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(DOCS / "pictures.py"), str(tmp_path)], check=True, cwd=ROOT)
    drawn = {file.name: file.read_text() for file in tmp_path.iterdir()}
    assert len(drawn) == 4
    for name, picture in drawn.items():
        assert (DOCS / name).read_text() == picture, f"{name}: run python docs/pictures.py"


@pytest.mark.parametrize(("name", "column"), [("flash", 1), ("pro", 2)])
def test_the_models_bytes(name: str, column: int) -> None:
    section = MODEL[MODEL.index("### 2.4 Bytes") : MODEL.index("## 3. Forward pass")]
    rows = [line.split("|")[1:-1] for line in section.splitlines() if line.startswith("| ") and line[2] != "|"]
    told = {row[0].strip(): int(row[column].replace(",", "")) for row in rows}
    held: dict[Component, int] = defaultdict(int)
    for spec in tensor_specs(find_checkpoint(name).config).values():
        held[spec.component] += spec.nbytes
    assert told == {
        "routed experts": held[Component.ROUTED_EXPERTS],
        "attention": held[Component.ATTENTION],
        "MTP": held[Component.MTP],
        "shared experts": held[Component.SHARED_EXPERTS],
        "embedding, and the same for the head": held[Component.EMBED],
        "compressors and indexers": held[Component.COMPRESSOR] + held[Component.INDEXER],
        "hyper-connections": held[Component.MHC],
        "routers, hash tables, norms": held[Component.ROUTER] + held[Component.TID2EID] + held[Component.NORM],
        "whole checkpoint": sum(held.values()),
    }


def test_every_section_that_a_source_points_to_exists() -> None:
    sections = set(re.findall(r"^#{2,3} ([0-9.]+?)\.? ", MODEL, re.MULTILINE))
    pointed = {
        (number, file.name)
        for file in SOURCES
        for text in re.findall(
            r"docs/model\.md,? ((?:[0-9]+(?:\.[0-9]+)?(?:, | and )?)+)", file.read_text(encoding="utf-8")
        )
        for number in re.findall(r"[0-9]+(?:\.[0-9]+)?", text)
    }
    assert len(pointed) > 20
    assert {where for where in pointed if where[0] not in sections} == set()
    outside = [
        f.name for f in SOURCES if re.search(r"\bspec(ification)? (section )?[0-9]", f.read_text(encoding="utf-8"))
    ]
    assert outside == [], "these cite a specification that is not in the repository"


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *(f"docs/{f.name}" for f in sorted(DOCS.glob("*.md")))]
)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = [t for t in re.findall(r"\]\(([^)\s]+)\)", text) if not t.startswith("http")]
    for target in targets:
        file, _, anchor = target.partition("#")
        where = (ROOT / page).parent / file if file else ROOT / page
        assert where.exists(), f"{page}: {target}"
        if anchor:
            titles = re.findall(r"^#+ (.+)$", where.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles}, f"{page}: {target}"


def test_the_readme_serves_agents_as_the_tests_do() -> None:
    readme = (ROOT / "README.md").read_text()
    for args in (VLLM_CHAT_ARGS, SGLANG_CHAT_ARGS):
        missing = [arg for arg in args if f" {arg}" not in readme.replace("`--", " --").replace("\n", " ")]
        assert not missing


def test_reliabilitys_figures_are_those_of_their_records() -> None:
    page = (DOCS / "reliability.md").read_text(encoding="utf-8")
    for kind, found in json.loads((ROOT / "benchmarks" / "results" / "fuzz.json").read_text()).items():
        name, exits = {"arguments": "command lines"}.get(kind, kind), found["exits"]
        codes = " | ".join(f"{exits[code]:,}" for code in "012")
        assert f"| {name} | {codes} | {found['bad']} | {found['slowest_s']:.1f} s | {found['grown_mib']} MiB |" in page


def test_the_speed_of_drafts_is_that_of_its_record() -> None:
    page = " ".join((DOCS / "reliability.md").read_text(encoding="utf-8").split())
    record = json.loads((ROOT / "benchmarks" / "results" / "vllm_drafts.json").read_text())
    assert (
        f"With {record['num_speculative_tokens']} drafted, a step yields {record['acceptance']['tokens_per_step']} tokens"
        in page
    )
    for batch in (1, 8):
        found = record[f"decode_batch_{batch}"]
        both = f"{found['with_tokens_per_s']} tokens/s instead of {found['without_tokens_per_s']} at batch {batch}"
        assert both in page
