# SPDX-License-Identifier: Apache-2.0
"""Random schedules through one engine: mixed lengths, prompts used again, clients that leave, a
pool that is too small.

Every request must get what a fresh run of it alone gives, which is what HF transformers gives; with
drafts too. `make schedules` runs 200 of them; CI runs a few.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsv4.reference.tiny import write_tiny
from tests.support.comparison import ROOT
from tests.support.hf_oracle import load_hf
from tests.support.vllm_engine import RUNNER_V2, TOLERANCE, Oracle, compare, engine_args, environment

TEXTS = [torch.randint(3, 259, (560,), generator=torch.Generator().manual_seed(seed)).tolist() for seed in range(3)]


@dataclass(frozen=True)
class Kind:
    """How an engine is started. share: of the schedules that are asked for"""

    pool_bytes: int
    env: dict[str, str]
    drafts: dict[str, Any] | None = None
    share: float = 1


KINDS = {
    "summary": Kind(7 << 20, {"DSV4_STATE": "summary"}),
    "paged": Kind(16 << 20, {"DSV4_STATE": "paged"}),
    "mtp": Kind(9 << 20, {}, {"method": "mtp", "num_speculative_tokens": 3}),
    # In the Triton interpreter, which takes three times as long.
    "dspark": Kind(22 << 20, RUNNER_V2, {"method": "dspark", "num_speculative_tokens": 5}, 0.3),
}


class Engine:
    """The driver process, and what it told so far."""

    def __init__(self, folder: Path, kind: Kind) -> None:
        # Blocks for about two of the largest requests: schedules of five are preempted.
        args = engine_args(
            folder,
            max_model_len=640,
            max_num_batched_tokens=96,
            max_num_seqs=5,
            kv_cache_memory_bytes=kind.pool_bytes,
            prefix_cache_retention_interval=256,
            speculative_config=kind.drafts,
        )
        command = [sys.executable, "-m", "tests.support.vllm_schedule_driver"]
        self.log = (folder / "driver.log").open("w+")
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            cwd=ROOT,
            env=environment(**kind.env),
        )
        self._send(args)
        self.kind = kind
        self.preemptions, self.hits, self.compared, self.total, self.schedules = 0, 0, 0, 0, 0
        self.accepted: dict[str, Any] = {}

    def _send(self, what: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()

    def run(self, schedule: list[dict]) -> dict:
        self._send(schedule)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            raise AssertionError(f"the engine ended: {self.log.read()[-4000:]}")
        result = json.loads(line)
        self.preemptions, self.accepted = result["preemptions"], result["accepted"]
        self.hits += sum(o["cached"] > 0 for o in result["outputs"])
        self.schedules += 1
        return result

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)
        self.log.close()


@pytest.fixture(
    scope="module",
    params=[
        "summary",
        "paged",
        pytest.param("mtp", marks=pytest.mark.long),
        pytest.param("dspark", marks=pytest.mark.long),
    ],
)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Engine, Oracle]]:
    kind, name = KINDS[request.param], request.param
    folder = write_tiny(  # two windows, one CSA, one HCA
        tmp_path_factory.mktemp("schedules") / "tiny",
        "flash",
        num_layers=4,
        draft="dspark" if name == "dspark" else "mtp",
        agree=kind.drafts is not None,
    )
    engine = Engine(folder, kind)
    yield engine, Oracle(load_hf(folder))
    engine.close()


LENGTHS = st.one_of(
    st.sampled_from([1, 3, 4, 5, 127, 128, 129, 255, 256, 257, 258, 260, 511, 512, 513, 516]), st.integers(1, 550)
)
REQUESTS = st.fixed_dictionaries(
    {
        "step": st.integers(0, 8),
        "text": st.integers(0, len(TEXTS) - 1),
        "length": LENGTHS,
        "own": st.lists(st.integers(3, 258), max_size=3),
        "max_tokens": st.integers(1, 24),
        "abort": st.one_of(st.none(), st.integers(1, 8)),
    }
)


def test_any_schedule_gives_each_request_what_it_gets_alone(
    engine: tuple[Engine, Oracle], pytestconfig: pytest.Config
) -> None:
    process, oracle = engine
    count = max(1, int(process.kind.share * pytestconfig.getoption("--schedules")))

    # Hypothesis draws its schedules from the text of this function: reformatted, the few of a CI
    # run held no preemption.
    # fmt: off
    @settings(max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(REQUESTS, min_size=1, max_size=5))
    def one(requests: list[dict]) -> None:
        schedule = [
            {"step": r["step"], "prompt": TEXTS[r["text"]][: r["length"]] + r["own"], "max_tokens": r["max_tokens"], "abort": r["abort"]}
            for r in requests
        ]
        result = process.run(schedule)
        c = compare({"phases": [result["outputs"]]}, oracle)
        process.compared += c.compared
        process.total += c.total
        assert c.worst <= TOLERANCE
    # fmt: on

    one()
    print(
        f"{process.schedules} schedules, {process.preemptions} preemptions, {process.hits} prefix hits, {process.compared} of {process.total} positions"
    )
    assert process.hits > 0 or process.kind.share < 1
    if process.kind.drafts is None:
        assert process.preemptions > 0
    else:  # whose requests are fewer steps beside each other; test_vllm_drafts preempts them
        assert all(process.accepted["kept_by_position"])
        assert process.accepted["kept"] < process.accepted["tokens"]
    assert process.compared >= 0.7 * process.total
