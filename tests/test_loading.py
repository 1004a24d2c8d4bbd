# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dsv4.errors import CheckpointError
from dsv4.loading import load_released

SINK, NORM = "model.layers.0.attn.attn_sink", "model.norm.weight"


def params(*names: str, shape: tuple[int, ...] = (2,)) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(torch.zeros(shape), requires_grad=False) for name in names}


def test_a_head_per_rank_of_the_sink_and_the_whole_of_the_norm():
    ours = params(SINK, NORM)
    released = {
        "layers.0.attn.attn_sink": torch.arange(4.0),
        "norm.weight": torch.tensor([5.0, 6.0]),
        "mtp.0.norm.weight": torch.ones(2),
    }
    assert load_released(ours, released.items(), tp_rank=1) == {SINK, NORM}
    assert ours[SINK].tolist() == [2.0, 3.0]
    assert ours[NORM].tolist() == [5.0, 6.0]


def test_what_is_missing_and_what_is_unknown_is_named():
    released = {"norm.weight": torch.ones(2), "layers.0.attn.wq_c.weight": torch.ones(2)}
    with pytest.raises(
        CheckpointError,
        match=r"no parameter for \['layers.0.attn.wq_c.weight'\], no tensor for \['model.layers.0.attn.attn_sink'\]",
    ):
        load_released(params(SINK, NORM), released.items(), tp_rank=0)
    with pytest.raises(CheckpointError, match="attn_sink"):
        load_released(params(SINK, NORM), {"norm.weight": torch.ones(2)}.items(), tp_rank=0)


def test_tensors_of_another_stage_are_left_to_it():
    released = {
        "norm.weight": torch.ones(2),
        "layers.7.attn.attn_sink": torch.ones(2),
        "layers.7.ffn.experts.0.w1.weight": torch.ones(2),
    }
    assert load_released(params(NORM), released.items(), 0, lambda name: name.startswith("model.layers.7.")) == {NORM}


def test_a_shape_that_does_not_fit_is_no_broadcast():
    with pytest.raises(RuntimeError, match="shape"):
        load_released(params(NORM), {"norm.weight": torch.ones(1)}.items(), tp_rank=0)


@pytest.mark.parametrize("suffix", ["weight_scale", "weight_scale_inv"])
def test_expert_scales_reach_the_engines_loader_by_either_name(suffix: str):
    name = f"model.layers.0.ffn.experts.w13_{suffix}"
    ours = {name: nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False)}
    seen: list[tuple[str, str, int, list[int]]] = []

    def loader(param: nn.Parameter, tensor: Tensor, weight_name: str, shard_id: str, expert_id: int) -> None:
        seen.append((weight_name, shard_id, expert_id, tensor.tolist()))

    ours[name].weight_loader = loader
    scale = torch.tensor([120, 121], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    assert load_released(ours, {"layers.0.ffn.experts.3.w3.scale": scale}.items(), tp_rank=0) == {name}
    assert seen == [(name, "w3", 3, [120, 121])]
