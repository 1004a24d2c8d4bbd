# SPDX-License-Identifier: Apache-2.0
"""The real engine served by the Triton kernels, in the interpreter, generates what it generates
served by the twins."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.vllm_engine import TOLERANCE, engine_args, request, run

# The interpreter must be set before triton is imported.
TWINS = {"DSV4_OPS": "reference"}
KERNELS = {"DSV4_OPS": "triton", "TRITON_INTERPRET": "1"}
POOLING = {"paged": "compressor.update", "summary": "summary.compress"}


def served(
    engine: dict[str, Any], phases: list[list[dict[str, Any]]], kernels: bool, state: str = "paged"
) -> list[dict[str, Any]]:
    """What the engine generates, after making sure which implementation made it."""
    result = run(engine, phases, env={**(KERNELS if kernels else TWINS), "DSV4_STATE": state})
    impls = {op: choice["impl"] for worker in result["workers"] for op, choice in worker["ops"].items()}
    assert {"attention.sparse", "indexer.topk", "mhc.pre"} <= set(impls) or {
        "attention.sparse",
        "indexer.topk",
        "mhc.post_pre",
    } <= set(impls)
    assert set(POOLING.values()) & set(impls) == {POOLING[state]}
    # The experts are vLLM's own on every accelerator; on a CPU their twin serves.
    assert {impl for op, impl in impls.items() if op != "moe.experts"} == {"triton" if kernels else "reference"}, impls
    return result["phases"][0]


@pytest.mark.slow
@pytest.mark.parametrize("state", ["summary", pytest.param("paged", marks=pytest.mark.long)])
def test_kernels_generate_what_the_twins_generate(tiny_flash: Path, state: str) -> None:
    """fp32 and plain rows, where nothing but the order of sums differs: a prefill past the
    selection's reach, decode, two requests."""
    ids = random.Random(0)
    prompts = [[ids.randrange(100, 400) for _ in range(n)] for n in (72, 5)]
    phases = [[request(p, max_tokens=2) for p in prompts]]
    engine = engine_args(tiny_flash, max_model_len=256, max_num_batched_tokens=48)
    twins = served(engine, phases, kernels=False)
    for a, b in zip(twins, served(engine, phases, kernels=True, state=state), strict=True):
        assert a["tokens"] == b["tokens"]
        for name in ("prompt_logprobs", "logprobs"):
            assert max(abs(x - y) for x, y in zip(a[name], b[name], strict=True)) < TOLERANCE


@pytest.mark.slow
def test_kernels_serve_packed_pages(tiny_flash: Path) -> None:
    """fp8_ds_mla pages and fp8 index keys, where roundings that fall the other way are amplified by
    a random model.

    Kernels and twins must differ by much less than quantisation itself changes: measured medians
    are 0.007 and 0.17. A kernel that writes or reads wrong bytes changes at least as much as
    quantisation does.
    """
    ids = random.Random(1)
    phases = [[request([ids.randrange(100, 400) for _ in range(40)], max_tokens=2)]]
    packed, plain = (
        engine_args(tiny_flash, max_model_len=128, kv_cache_dtype="fp8"),
        engine_args(tiny_flash, max_model_len=128),
    )
    twins, kernels, exact = (
        torch.tensor(served(engine, phases, kernels)[0]["prompt_logprobs"])
        for engine, kernels in ((packed, False), (packed, True), (plain, False))
    )
    assert (kernels - twins).abs().median() < (twins - exact).abs().median() / 8
