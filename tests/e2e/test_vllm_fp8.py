# SPDX-License-Identifier: Apache-2.0
"""fp8_ds_mla pages in the real engine against the reference model with the same quantisation. See
`replay`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dsv4.model.kv_layout import IndexFormat
from tests.support.replay import assert_equals_quantised_reference
from tests.support.vllm_engine import engine_args, request, run


@pytest.mark.parametrize(
    ("variant", "budget", "index"),
    [("flash", 48, "fp8"), ("flash", 2048, "fp8"), ("pro", 48, "fp8"), ("pro", 2048, "fp8"), ("flash", 200, "mxfp4")],
)
def test_packed_pages_equal_the_quantised_reference(
    variant: str,
    budget: int,
    index: str,
    tmp_path: Path,
    tiny_flash: Path,
    tiny_pro: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = {"flash": tiny_flash, "pro": tiny_pro}[variant]
    record = tmp_path / "recorded.pt"
    engine = engine_args(folder, max_num_batched_tokens=budget, kv_cache_dtype="fp8_ds_mla", max_num_seqs=1)
    engine["attention_config"] = {"indexer_kv_dtype": index}
    prompt = torch.randint(3, 259, (515,), generator=torch.Generator().manual_seed(7)).tolist()
    result = run(engine, [[request(prompt, 12)]], record=str(record))
    assert (result["workers"][0]["kv_format"], result["workers"][0]["index_format"]) == ("fp8_ds_mla", index)
    assert_equals_quantised_reference(result["phases"][0][0], record, folder, monkeypatch, IndexFormat(index))
