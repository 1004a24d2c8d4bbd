# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest

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
