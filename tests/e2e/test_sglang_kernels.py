# SPDX-License-Identifier: Apache-2.0
"""The real engine served by the Triton kernels, in the interpreter, equals HF."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.comparison import Oracle, assert_equal, request
from tests.support.sglang_engine import engine_args, run


@pytest.mark.slow
def test_kernels_equal_hf(tiny_flash: Path, flash_oracle: Oracle, flash_text: list[int]) -> None:
    """fp32 and plain rows: a prefill past the selection's reach through scratch memory, decode on
    the rings, two requests."""
    engine = engine_args(tiny_flash, context_length=512, max_total_tokens=2048)
    env = {"DSV4_OPS": "triton", "TRITON_INTERPRET": "1"}
    result = run(engine, [[request(flash_text[:76], 2), request(flash_text[:9], 2)]], env=env, interpret=True)
    impls = {op: choice["impl"] for worker in result["workers"] for op, choice in worker["ops"].items()}
    assert {"attention.sparse", "compressor.update", "indexer.topk", "mhc.pre"} <= set(impls)
    assert {impl for op, impl in impls.items() if op != "moe.experts"} == {"triton"}, impls
    assert_equal(result, flash_oracle)
