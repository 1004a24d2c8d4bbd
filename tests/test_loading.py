# SPDX-License-Identifier: Apache-2.0
"""Nothing of a checkpoint is left out, or loaded where it does not fit."""

from __future__ import annotations

import re
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from dsv4.errors import CheckpointError, CompatError
from dsv4.loading import DTYPES, ExpertTensor, ReleasedLoader, expert_tensor, hand_over, parameter_name
from dsv4.model.config import DraftKind, LayerSpec, V4Config
from dsv4.model.tensors import Component, TensorSpec, tensor_specs
from dsv4.ops.compressor.projected import EntryInputs, entry_widths
from dsv4.ops.quant.reference import dequantize_expert
from dsv4.reference.tiny import tiny_config

CONFIG = V4Config.from_dict(tiny_config("flash", num_layers=4))
SPECS = tensor_specs(CONFIG, include_draft=False)
SINK, NORM = "model.layers.0.attn.attn_sink", "model.norm.weight"
TORCH = {name: dtype for dtype, name in DTYPES.items()}


def stored(spec: TensorSpec) -> Tensor:
    """A tensor as a checkpoint stores it, without memory where its values do not matter."""
    if spec.component is Component.TID2EID:
        return torch.zeros(spec.shape, dtype=torch.int64)
    return torch.empty(spec.shape, dtype=TORCH[spec.dtype], device="meta")


def target(name: str) -> str:
    expert = expert_tensor(name)
    return parameter_name(name)[0] if expert is None else f"{expert.layer}.{expert.stem}_{name.rsplit('.', 1)[1]}"


def params() -> dict[str, nn.Parameter]:
    """Every parameter of the model, with a loader that takes whatever comes."""
    found = {}
    for name in SPECS:
        param = nn.Parameter(torch.empty(0), requires_grad=False)
        param.weight_loader = lambda *args, **kwargs: None
        found[target(name).replace("_scale", "_weight_scale_inv") if ".experts." in name else target(name)] = param
    return found


PARAMS = params()


def loader(**options: object) -> ReleasedLoader:
    return ReleasedLoader(PARAMS, CONFIG, 0, **options)


def loaded_without(gone: str) -> ReleasedLoader:
    one = loader()
    one.given = {name: header for name, header in HEADERS.items() if name != gone}
    return one


WHOLE = loader()
WHOLE.load((name, stored(spec)) for name, spec in SPECS.items())
HEADERS: Mapping[str, object] = dict(WHOLE.given)


def test_a_whole_checkpoint_is_whole() -> None:
    WHOLE.finish("here")
    one = loader()
    drafted = {"mtp.0.norm.weight": torch.ones(2)}
    assert one.load([*drafted.items(), *((name, stored(spec)) for name, spec in SPECS.items())]) == set(PARAMS)
    one.finish("here")


def test_every_tensor_that_is_missing_is_named() -> None:
    """Each of them alone: also one expert's w3, one linear of a fused pair, one scale."""
    for name in SPECS:
        with pytest.raises(CheckpointError, match=rf"^here: 1 missing.*\n  {re.escape(name)} is missing$"):
            loaded_without(name).finish("here")


@pytest.mark.parametrize(
    "layer", [layer for layer in CONFIG.layers if layer.compress_ratio], ids=lambda x: x.kind.value
)
def test_a_layers_input_goes_through_one_product(layer: LayerSpec) -> None:
    """The parts of it are as wide as tensors of the checkpoint, in the order in which they are
    split again."""
    parts: dict[int | None, int] = {}
    for name, spec in SPECS.items():
        parameter, shard = parameter_name(name) if expert_tensor(name) is None else ("", None)
        if parameter == f"model.layers.{layer.index}.attn.entry_proj.weight":
            parts[shard] = spec.shape[0]
    widths = entry_widths(CONFIG, layer)
    assert parts == dict(enumerate(widths))
    split = EntryInputs.split(torch.arange(float(sum(widths)))[None], widths)
    assert torch.cat([part for part in split if part is not None], 1).shape[1] == sum(widths)
    assert [part is None for part in split] == [False, layer.overlap == 1, layer.overlap == 1]


def test_what_belongs_to_another_stage_or_rank_is_left_to_it() -> None:
    def owns(parameter: str, expert: ExpertTensor | None) -> bool:
        return not parameter.startswith("model.layers.1.") and (expert is None or expert.expert < 4)

    elsewhere = {n for n in SPECS if n.startswith("layers.1.") or ((e := expert_tensor(n)) and e.expert >= 4)}
    ours = {name: param for name, param in PARAMS.items() if owns(name, None)}
    for given in (set(SPECS), set(SPECS) - elsewhere):  # an engine may read what is not ours, or not
        one = ReleasedLoader(ours, CONFIG, 0, owns)
        assert one.load((name, stored(SPECS[name])) for name in SPECS if name in given) == set(ours)
        one.finish("here")
    lost = "layers.0.ffn.experts.3.w3.scale"
    one = ReleasedLoader(ours, CONFIG, 0, owns)
    one.load((name, stored(spec)) for name, spec in SPECS.items() if name != lost)
    with pytest.raises(CheckpointError, match=f"{lost} is missing"):
        one.finish("here")


def test_seventy_thousand_unknown_names_make_a_short_message() -> None:
    one = loader()
    one.load((name, stored(spec)) for name, spec in SPECS.items())
    one.load((f"model.language.layers.{i}.w{j}.b{j}x", torch.ones(1)) for i in range(1000) for j in range(70))
    with pytest.raises(CheckpointError) as error:
        one.finish("here")
    message = str(error.value)
    assert "70000 extra" in message
    assert "model.language.layers.{0-999}.w3.b3x is not a tensor of this model" in message
    assert message.count("\n") < 70


@pytest.mark.parametrize(
    ("tensor", "words"),
    [(torch.ones(1, dtype=torch.bfloat16), "has shape [1]"), (torch.ones(256), "has dtype F32, expected BF16")],
    ids=["shape", "dtype"],
)
def test_what_does_not_fit_is_not_loaded(tensor: Tensor, words: str) -> None:
    """No broadcast, and no numeric cast."""
    norm = nn.Parameter(torch.full((256,), 7.0), requires_grad=False)
    one = ReleasedLoader(PARAMS | {NORM: norm}, CONFIG, 0)
    one.load((n, tensor if n == "norm.weight" else stored(s)) for n, s in SPECS.items())
    assert norm.eq(7).all()
    with pytest.raises(CheckpointError, match=re.escape(f"norm.weight {words}")):
        one.finish("here")


@pytest.mark.parametrize(("row", "column", "value"), [(0, 0, 8), (511, 1, -1), (17, 1, 1 << 40)])
def test_a_hash_table_that_names_no_expert_is_refused_while_it_is_loaded(row: int, column: int, value: int) -> None:
    name = "layers.1.ffn.gate.tid2eid"
    table = torch.zeros(SPECS[name].shape, dtype=torch.int64)
    table[row, column] = value
    with pytest.raises(CheckpointError, match=rf"{name} holds expert ids from .*{value}.*experts 0 to 7"):
        loader().load([(name, table)])


def test_parameters_and_released_tensors_are_of_one_model() -> None:
    with pytest.raises(CompatError, match=r"nothing in a checkpoint for: model\.new"):
        ReleasedLoader(PARAMS | {"model.new": PARAMS[NORM]}, CONFIG, 0)
    with pytest.raises(CompatError, match=r"no parameter for .*attn_sink"):
        ReleasedLoader({name: p for name, p in PARAMS.items() if name != SINK}, CONFIG, 0)


def test_a_head_per_rank_of_the_sink_and_the_whole_of_the_norm() -> None:
    ours = {name: nn.Parameter(torch.zeros(2), requires_grad=False) for name in (SINK, NORM)}
    hand_over(ours, "layers.0.attn.attn_sink", torch.arange(4.0), tp_rank=1)
    hand_over(ours, "norm.weight", torch.tensor([5.0, 6.0]), tp_rank=1)
    assert ours[SINK].tolist() == [2.0, 3.0]
    assert ours[NORM].tolist() == [5.0, 6.0]


@pytest.mark.parametrize("suffix", ["weight_scale", "weight_scale_inv"])
def test_expert_scales_reach_the_engines_loader_by_either_name(suffix: str) -> None:
    name = f"model.layers.0.ffn.experts.w13_{suffix}"
    ours = {name: nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False)}
    seen: list[tuple[str, str, int, list[int]]] = []

    def take(param: nn.Parameter, tensor: Tensor, weight_name: str, shard_id: str, expert_id: int) -> None:
        seen.append((weight_name, shard_id, expert_id, tensor.tolist()))

    ours[name].weight_loader = take
    scale = torch.tensor([120, 121], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    hand_over(ours, "layers.0.ffn.experts.3.w3.scale", scale, tp_rank=0)
    assert seen == [(name, "w3", 3, [120, 121])]


@pytest.mark.parametrize("order", [("weight", "scale"), ("scale", "weight")], ids=" then ".join)
@pytest.mark.parametrize("name", ["layers.0.attn.wkv", "layers.0.ffn.experts.3.w3"])
def test_a_plain_parameter_gets_a_weight_with_its_scale_as_often_as_they_come(
    name: str, order: tuple[str, str]
) -> None:
    """Dequantised before the engine's loader, in any order and from memory that is reused."""
    seen: list[Tensor] = []
    ours = {n: p for n, p in PARAMS.items() if "weight_scale" not in n}
    plain = nn.Parameter(torch.empty(0, dtype=torch.bfloat16), requires_grad=False)
    plain.weight_loader = lambda param, tensor, *args, **kwargs: seen.append(tensor)
    fused = target(f"{name}.weight")
    one = ReleasedLoader(ours | {fused: plain}, CONFIG, 0)
    memory = {kind: torch.empty(SPECS[f"{name}.{kind}"].shape, dtype=TORCH[SPECS[f"{name}.{kind}"].dtype])
              for kind in order}  # fmt: skip
    for code in (0x18, 0x2A):
        for kind in order:
            memory[kind].view(torch.uint8).fill_(code if kind == "weight" else 120)
            one.load([(f"{name}.{kind}", memory[kind])])
            memory[kind].view(torch.uint8).fill_(255)
        weight = torch.full(SPECS[f"{name}.weight"].shape, code, dtype=torch.uint8)
        scale = torch.full(SPECS[f"{name}.scale"].shape, 120, dtype=torch.uint8).view(torch.float8_e8m0fnu)
        want = dequantize_expert(weight if "experts" in name else weight.view(torch.float8_e4m3fn), scale)
        assert torch.equal(seen[-1], want)
    assert len(seen) == 2
    assert not one.waiting


@pytest.mark.parametrize("draft", ["mtp", "dspark"])
def test_every_tensor_of_a_draft_is_loaded_once(draft: DraftKind) -> None:
    """Also the shared experts' w1, whose name the Markov head's resembles; what is missing or no
    tensor of the draft is named."""
    config = V4Config.from_dict(tiny_config("flash", num_layers=4, draft=draft))
    specs = {name: spec for name, spec in tensor_specs(config).items() if spec.is_draft}
    taken: list[str] = []
    found: dict[str, nn.Parameter] = {}
    for name in specs:
        _, stage, rest = name.split(".", 2)
        local = f"layers.{4 + int(stage)}.{rest}"
        parameter = target(local).replace("_scale", "_weight_scale_inv") if ".experts." in local else target(local)
        found[parameter] = param = nn.Parameter(torch.empty(0), requires_grad=False)
        param.weight_loader = lambda *args, parameter=parameter, **kwargs: taken.append(parameter)
    one = ReleasedLoader(found, config, 0, draft=True)
    given = [(name, stored(spec)) for name, spec in specs.items()]
    assert one.load([("norm.weight", torch.ones(2)), *given]) == set(found)
    one.finish("here")
    assert len(taken) == len(specs)
    gone = "mtp.0.ffn.shared_experts.w1.weight"
    lacking = ReleasedLoader(found, config, 0, draft=True)
    lacking.load([each for each in given if each[0] != gone] + [("mtp.0.markov_w1", torch.ones(2))])
    with pytest.raises(CheckpointError, match=rf"(?s)1 missing.*{re.escape(gone)} is missing"):
        lacking.finish("here")
