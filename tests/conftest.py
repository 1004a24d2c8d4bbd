# SPDX-License-Identifier: Apache-2.0
"""Fixtures shared by every test: the two tiny checkpoints, written once per session."""

from __future__ import annotations

import os
from pathlib import Path

# Before torch is imported: engines and oracles run beside each other on few cores, where OpenMP
# threads that spin for their partners cost far more than they bring (measured: 20 times slower on
# two busy cores).
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from dsv4.reference.tiny import write_tiny

# Shared checks explain a failure as a test's own assert does.
pytest.register_assert_rewrite(
    *(f"tests.support.{name}" for name in ("comparison", "refusal_checks", "replay", "serve_checks"))
)

# Tensors here are small: a second thread gains nothing, and triples the time as soon as something
# else runs.
torch.set_num_threads(1)

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def tiny_flash(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint with Flash's layer mix: two sliding layers, then CSA and HCA in turn, and
    an MTP draft."""
    return write_tiny(tmp_path_factory.mktemp("checkpoints") / "tiny-flash", "flash")


@pytest.fixture(scope="session")
def tiny_pro(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint with Pro's layer mix: two HCA layers, then CSA and HCA in turn, and an MTP
    draft."""
    return write_tiny(tmp_path_factory.mktemp("checkpoints") / "tiny-pro", "pro")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run the tests marked long too, as `make long` does")
    parser.addoption(
        "--schedules", type=int, default=15, help="random schedules per KV mapping in tests/e2e/test_vllm_schedules.py"
    )
    parser.addoption(
        "--requests", type=int, default=25, help="generated requests per endpoint in tests/e2e/test_requests.py"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--long"):
        return
    skip = pytest.mark.skip(reason="long: minutes of one more engine, version or setting; `make long` runs it")
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker(skip)
