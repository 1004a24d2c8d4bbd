# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest
import torch

from dsv4.reference.tiny import write_tiny
from tests.support.comparison import TIE_MARGIN, Oracle
from tests.support.hf_oracle import load_hf, prompt_without_ties


@pytest.fixture(scope="session")
def flash_oracle(tiny_flash: Path) -> Oracle:
    return Oracle(load_hf(tiny_flash))


@pytest.fixture(scope="session")
def pro_oracle(tiny_pro: Path) -> Oracle:
    return Oracle(load_hf(tiny_pro))


@pytest.fixture(scope="session")
def flash_text(flash_oracle: Oracle) -> list[int]:
    """1100 random ids on which no choice of the model is a near-tie; its prefixes are prompts of
    every length."""
    return prompt_without_ties(flash_oracle.model, 1100, margin=TIE_MARGIN)


@pytest.fixture(scope="session")
def pro_text(pro_oracle: Oracle) -> list[int]:
    return prompt_without_ties(pro_oracle.model, 1100, margin=TIE_MARGIN)


@pytest.fixture(scope="session")
def agreeing_flash(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Flash, with a draft that is right every second time."""
    return write_tiny(tmp_path_factory.mktemp("agree") / "tiny", "flash", agree=True)


@pytest.fixture(scope="session")
def agreeing_oracle(agreeing_flash: Path) -> Oracle:
    return Oracle(load_hf(agreeing_flash))


@pytest.fixture(scope="session")
def draft_text() -> list[int]:
    """1100 random ids, whose ends are prompts of every length."""
    return torch.randint(3, 512, (1100,), generator=torch.Generator().manual_seed(5)).tolist()
