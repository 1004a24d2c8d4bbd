# SPDX-License-Identifier: Apache-2.0
"""Makes a tiny model of random weights write a given text, so that an engine's parsers meet V4's
own: `vllm_forced` and `sglang_forced` raise the logits.

The file that TEST_FORCED names holds the token ids that the next request gets. Their logits are
raised, not set: where a grammar forbids a token, the grammar wins. One request at a time.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

VARIABLE = "TEST_FORCED"
BONUS = 1e6


def wanted(position: int) -> int | None:
    """The token to be generated at `position`, 0 the first; None: the model's own."""
    ids = json.loads(Path(os.environ[VARIABLE]).read_text())
    return ids[position] if position < len(ids) else None
