# SPDX-License-Identifier: Apache-2.0
"""Mistakes that only the paged path can make are seen by the comparison with HF."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.vllm_engine import TOLERANCE, Oracle, compare, engine_args, request, run

MUTATIONS = {
    "window off by one": (
        "dsv4.ops.plan.caches",
        "(tokens.positions + 1).clamp(max=window)",
        "(tokens.positions + 1).clamp(max=window - 1)",
    ),
    "entry RoPE at j instead of j*m": (
        "dsv4.ops.plan.reference",
        "cos_sin(positions // m * m, ",
        "cos_sin(positions // m, ",
    ),
    "entry visible one token late": (
        "dsv4.ops.plan.caches",
        "(tokens.positions + 1) // ratio, 0)",
        "tokens.positions // ratio, 0)",
    ),
    "columns of the two windows exchanged": (
        "dsv4.ops.compressor.summary.reference",
        "x[..., :dim], x[..., dim:]",
        "x[..., dim:], x[..., :dim]",
    ),
    "what came before the step lost": (
        "dsv4.ops.compressor.summary.reference",
        "    return _merge(rows, earlier)\n",
        "    return rows\n",
    ),
    "overlap window lost, paged state": (
        "dsv4.ops.compressor.paged.reference",
        "missing = rows_at < 0",
        "missing = (rows_at < 0) | (back >= ratio)",
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_is_seen(tiny_flash: Path, flash_oracle: Oracle, flash_text: list[int], name: str) -> None:
    env = {"DSV4_STATE": "paged" if "paged" in name else "summary"}
    result = run(engine_args(tiny_flash), [[request(flash_text[:300], 2)]], env=env, mutation=MUTATIONS[name])
    assert compare(result, flash_oracle).worst > 2 * TOLERANCE
