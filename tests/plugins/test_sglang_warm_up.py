# SPDX-License-Identifier: Apache-2.0
"""SGLang has the model compile its kernels once, on a GPU, before it captures anything."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.environ import envs
from sglang.srt.model_executor.runner import base_runner

from dsv4_sglang import model as v4


@pytest.mark.parametrize(("device", "compilations"), [("cuda", 1), ("cpu", 0)])
def test_the_engine_asks_for_it_once(monkeypatch: pytest.MonkeyPatch, device: str, compilations: int) -> None:
    served: Any = object.__new__(v4.DeepseekV4PluginForCausalLM)
    object.__setattr__(served, "v4_config", "the config")
    runner = SimpleNamespace(device=device, model=served)
    asked: list[tuple[Any, Any]] = []
    monkeypatch.setattr(v4, "compile_kernels", lambda config, given: asked.append((config, given)))
    monkeypatch.setattr(base_runner, "should_run_flashinfer_autotune", lambda given: False)
    assert not envs.SGLANG_PP_PARALLEL_DEEPGEMM_WARMUP.get()
    nothing = dict.fromkeys(
        ("_pre_initialize_flashinfer_allreduce_workspace", "_pre_initialize_fi_a2a_workspace",
         "_pre_initialize_pcie_ipc_workspace"), lambda: None,
    )  # fmt: skip
    for _ in range(2):
        base_runner.BaseRunner._warmup(SimpleNamespace(model_runner=runner, **nothing))
    assert asked == [("the config", runner)] * compilations
