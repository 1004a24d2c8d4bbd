# SPDX-License-Identifier: Apache-2.0
"""Options that vLLM takes only with more devices than a test has: refused by name all the same."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch

from dsv4.errors import DeploymentError
from dsv4.model.config import DraftKind, V4Config
from dsv4.reference.tiny import tiny_config
from dsv4_vllm import support

PRO = Path(__file__).parents[1] / "golden" / "configs" / "DeepSeek-V4-Pro.json"


def deployment(folder: Path, **changes: Any) -> Any:
    """A deployment that is served, but for `changes`, by the name of an option's field."""
    parallel: dict[str, Any] = {
        "tensor_parallel_size": 1,
        "decode_context_parallel_size": 1,
        "prefill_context_parallel_size": 1,
        "data_parallel_size": 1,
        "use_ubatching": False,
        "enable_elastic_ep": False,
        "enable_eplb": False,
        "pipeline_parallel_size": 1,
    }
    raw = json.loads((folder / "config.json").read_text())
    return SimpleNamespace(
        model_config=SimpleNamespace(
            hf_config=SimpleNamespace(to_dict=lambda: raw),
            model=str(folder),
            dtype=torch.bfloat16,
            enable_prompt_embeds=False,
            enable_sleep_mode=changes.get("enable_sleep_mode", False),
        ),
        parallel_config=SimpleNamespace(**(parallel | {k: v for k, v in changes.items() if k in parallel})),
        cache_config=SimpleNamespace(kv_offloading_size=None, kv_cache_dtype_skip_layers=[], cache_dtype="auto"),
        load_config=SimpleNamespace(load_format="auto"),
        aux_output_config=SimpleNamespace(enabled=False),
        attention_config=SimpleNamespace(),
        device_config=SimpleNamespace(device_type="cpu"),
        offload_config=SimpleNamespace(
            uva=SimpleNamespace(cpu_offload_gb=changes.get("cpu_offload_gb", 0)),
            prefetch=SimpleNamespace(offload_group_size=changes.get("offload_group_size", 0)),
        ),
        speculative_config=None,
        lora_config=None,
        kv_transfer_config=None,
        weight_transfer_config=None,
        additional_config={},
    )


def test_the_deployment_itself_is_served(tiny_flash: Path) -> None:
    assert support.check_deployment(deployment(tiny_flash)).num_hidden_layers > 0


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"prefill_context_parallel_size": 2}, "--prefill-context-parallel-size"),
        ({"use_ubatching": True}, "--enable-dbo"),
        ({"enable_elastic_ep": True}, "--enable-elastic-ep"),
        ({"data_parallel_size": 2}, "--data-parallel-size"),
        ({"cpu_offload_gb": 4.0}, "--cpu-offload-gb"),
        ({"offload_group_size": 2}, r"--cpu-offload-gb \(--offload-group-size\)"),
        ({"enable_sleep_mode": True}, "--enable-sleep-mode"),
    ],
)
def test_what_is_not_tested_is_refused(tiny_flash: Path, change: dict[str, Any], flag: str) -> None:
    with pytest.raises(DeploymentError, match=rf"^{flag}.*DSV4_MODE=off"):
        support.check_deployment(deployment(tiny_flash, **change))


def drafting(folder: Path, **asked: Any) -> Any:
    """A deployment that asks for drafts, four requests a step."""
    found = deployment(folder)
    options: dict[str, Any] = {
        "rejection_sample_method": "standard",
        "kv_cache_dtype": None,
        "enable_adaptive_verification": False,
        "num_speculative_tokens_per_batch_size": None,
    }
    found.speculative_config = SimpleNamespace(**(options | asked))
    found.scheduler_config = SimpleNamespace(max_num_batched_tokens=20, max_num_seqs=4)
    return found


@pytest.fixture(scope="module")
def with_draft(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """config.json of checkpoints with each draft."""
    folders = {}
    for draft in get_args(DraftKind):
        folders[draft] = folder = tmp_path_factory.mktemp(draft)
        (folder / "config.json").write_text(json.dumps(tiny_config(draft=draft)))
    return folders


@pytest.mark.parametrize(
    ("carried", "asked", "says"),
    [
        ("mtp", {"method": "dspark", "num_speculative_tokens": 5}, 'carries an MTP block .* use "method": "mtp"'),
        ("dspark", {"method": "mtp", "num_speculative_tokens": 1}, 'carries a DSpark draft .* use "method": "dspark"'),
        ("none", {"method": "mtp", "num_speculative_tokens": 1}, "carries no draft .* use no --speculative-config"),
        ("mtp", {"method": "ngram", "num_speculative_tokens": 1}, 'method ngram, .* use "method": "mtp"'),
        ("dspark", {"method": "dspark", "num_speculative_tokens": 4}, "tokens 4, .* trained on blocks of 5 .* use 5$"),
        ("mtp", {"method": "mtp", "num_speculative_tokens": 8}, "num_speculative_tokens 8; use 1 to 7"),
        ("mtp", {"method": "mtp", "num_speculative_tokens": 5}, "^--max-num-batched-tokens 20: .* takes 24"),
        (
            "mtp",
            {"method": "mtp", "num_speculative_tokens": 1, "rejection_sample_method": "synthetic"},
            "rejection_sample_method: it keeps tokens that the model would not say",
        ),
        ("mtp", {"method": "mtp", "num_speculative_tokens": 1, "kv_cache_dtype": "fp8"}, "kv_cache_dtype: all layers"),
        (
            "dspark",
            {"method": "dspark", "num_speculative_tokens": 5, "enable_adaptive_verification": True},
            "enable_adaptive_verification: it is not tested",
        ),
    ],
)
def test_drafts_that_cannot_be_served_are_refused(
    with_draft: dict[str, Path], carried: str, asked: dict[str, Any], says: str
) -> None:
    with pytest.raises(DeploymentError, match=says):
        support.check_deployment(drafting(with_draft[carried], **asked))


def test_drafts_over_pipeline_stages_are_refused(with_draft: dict[str, Path]) -> None:
    asked = drafting(with_draft["mtp"], method="mtp", num_speculative_tokens=1)
    asked.parallel_config.pipeline_parallel_size = 2
    with pytest.raises(DeploymentError, match=r"^--speculative-config with --pipeline-parallel-size: without async"):
        support.check_deployment(asked)


@pytest.mark.parametrize(("method", "tokens"), [("mtp", 4), ("dspark", 5)])
def test_drafts_that_the_checkpoint_carries_are_served(with_draft: dict[str, Path], method: str, tokens: int) -> None:
    asked = drafting(with_draft[method], method=method, num_speculative_tokens=tokens)
    asked.scheduler_config.max_num_batched_tokens = 24
    assert support.check_deployment(asked).draft == method


def test_batch_invariance_is_refused(tiny_flash: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    with pytest.raises(DeploymentError, match=r"^VLLM_BATCH_INVARIANT: attention is split"):
        support.check_deployment(deployment(tiny_flash))


def test_ranks_that_cut_the_shared_experts_blocks_are_refused() -> None:
    """Pro's 3072 channels are 24 blocks of 128; its 128 heads and 16 output groups divide by 16."""
    config = V4Config.from_path(PRO)
    assert config.why_not_sharded(8) is None
    found = config.why_not_sharded(16)
    assert found is not None
    assert "3072 channels in blocks of 128" in found
    assert "[1, 2, 4, 8]" in found
