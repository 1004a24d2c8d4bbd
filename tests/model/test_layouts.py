# SPDX-License-Identifier: Apache-2.0
"""A checkpoint that is not as released is called what it is, with something to do about it, in a
few lines: at Flash's own size, where a wrong layout touches tens of thousands of tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from dsv4.errors import CheckpointError
from dsv4.model.checkpoint import TensorHeader, compare, read_headers
from dsv4.model.config import V4Config
from dsv4.model.tensors import tensor_specs

GOLDEN = Path(__file__).parents[1] / "golden" / "configs"
Headers = dict[str, TensorHeader]


def renamed(change: Callable[[str], str]) -> Callable[[Headers], Headers]:
    return lambda headers: {change(name): header for name, header in headers.items()}


def added(*endings: str) -> Callable[[Headers], Headers]:
    """Each expert's tensors under other names."""

    def change(headers: Headers) -> Headers:
        kept = {name: h for name, h in headers.items() if ".experts." not in name}
        linears = [name.removesuffix(".weight") for name in headers if ".experts." in name and name.endswith(".weight")]
        return kept | {linear + end: TensorHeader("", "U8", (1,)) for linear in linears for end in endings}

    return change


def typed(dtype: str, of: Callable[[str, TensorHeader], bool]) -> Callable[[Headers], Headers]:
    return lambda hs: {n: replace(h, dtype=dtype) if of(n, h) else h for n, h in hs.items()}


def hf_name(name: str) -> str:
    for old, new in ((".attn.", ".self_attn."), (".ffn.", ".mlp."), ("embed.", "embed_tokens.")):
        name = name.replace(old, new)
    return f"model.{name}"


def is_expert(name: str, header: TensorHeader) -> bool:
    return ".ffn.experts." in name and name.endswith(".weight")


LAYOUTS: dict[str, tuple[Callable[[Headers], Headers], str]] = {
    "model.": (renamed(lambda n: f"model.{n}"), "every name begins with model.: take that prefix away"),
    "V3's scales": (
        renamed(lambda n: n.replace(".scale", ".weight_scale_inv")),
        "as DeepSeek-V3's, .weight_scale_inv: rename them to .scale",
    ),
    "V3's scales and model.": (
        renamed(lambda n: "model." + n.replace(".scale", ".weight_scale_inv")),
        "begins with model.",
    ),
    "HF": (renamed(hf_name), "these are HF transformers' names: transformers serves them"),
    "buffers": (
        lambda hs: hs | {f"layers.{i}.attn.rotary_emb.inv_freq": TensorHeader("", "F32", (32,)) for i in range(43)},
        "take them out of the files and the index",
    ),
    "NVFP4": (added(".weight", ".weight_scale", ".weight_scale_2", ".input_scale"), "a conversion to NVFP4 (ModelOpt)"),
    "compressed-tensors": (added(".weight_packed", ".weight_scale"), "a conversion to compressed-tensors, packed"),
    "W8A8": (added(".weight", ".weight_scale"), "a conversion to compressed-tensors or W8A8"),
    "GPTQ": (added(".qweight", ".qzeros", ".scales", ".g_idx"), "a conversion to GPTQ"),
    "AWQ": (added(".qweight", ".qzeros", ".scales"), "a conversion to AWQ"),
    "MLX": (added(".weight", ".scales", ".biases"), "a conversion to MLX: mlx-lm serves it"),
    "bitsandbytes": (added(".weight", ".weight.absmax"), "a conversion to bitsandbytes: transformers serves it"),
    "BF16 experts": (typed("BF16", is_expert), "experts are BF16: dsv4 serves fp4 (I8) and fp8 (F8_E4M3) ones"),
    "FP8 experts": (typed("F8_E4M3", is_expert), 'set "expert_dtype" to "fp8" in config.json'),
    "dequantised": (
        typed("BF16", lambda n, h: h.dtype == "F8_E4M3"),
        "every FP8 linear is BF16: this is a dequantised copy",
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_is_called_what_it_is_in_a_few_lines(layout: str) -> None:
    file = GOLDEN / "DeepSeek-V4-Flash.json"
    config = V4Config.from_dict(json.loads(file.read_text()), str(file))
    specs = tensor_specs(config)
    change, words = LAYOUTS[layout]
    headers = change({name: TensorHeader("", spec.dtype, spec.shape) for name, spec in specs.items()})
    with pytest.raises(CheckpointError) as error:
        compare("here", config, specs, headers)
    title, *lines = str(error.value).splitlines()
    assert words in title
    assert len(lines) <= 61
    assert len(str(error.value)) < 12_000


@pytest.mark.parametrize(
    ("file", "words"), [("m.gguf", "llama.cpp serves them"), ("pytorch_model.bin", "convert them")]
)
def test_a_folder_of_another_format_says_so(file: str, words: str, tmp_path: Path) -> None:
    (tmp_path / file).touch()
    with pytest.raises(CheckpointError, match=f"nor a .*: .*{words}".replace(": .*", ".*")):
        read_headers(tmp_path)
