# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of V4 that are not as released, recognised by the names and dtypes of their tensors,
with what to do about each."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dsv4.model.config import V4Config
from dsv4.model.tensors import TensorSpec

NATIVE = "the engine's own V4 (DSV4_MODE=off) may serve it on GPUs that it supports"
RELEASED = "or use the released checkpoint"


class Stored(Protocol):
    """What is known of a stored tensor here."""

    @property
    def dtype(self) -> str: ...


@dataclass(frozen=True)
class Quantisation:
    """A community format. endings: of names that it alone has, all of which must be found."""

    name: str
    endings: tuple[str, ...]
    served_by: str


# The first that fits is meant: GPTQ has every name that AWQ has.
QUANTISATIONS = (
    Quantisation("NVFP4 (ModelOpt)", (".weight_scale_2",), NATIVE),
    Quantisation("compressed-tensors, packed", (".weight_packed",), NATIVE),
    Quantisation("GPTQ", (".qweight", ".g_idx"), "a vLLM or SGLang with GPTQ experts may serve it, with DSV4_MODE=off"),
    Quantisation("AWQ", (".qweight", ".qzeros"), "a vLLM or SGLang with AWQ experts may serve it, with DSV4_MODE=off"),
    Quantisation("bitsandbytes", (".absmax",), "transformers serves it"),
    Quantisation("MLX", (".scales", ".biases"), "mlx-lm serves it, on Apple's machines"),
    Quantisation("static FP8 activations", (".input_scale",), NATIVE),
    Quantisation("compressed-tensors or W8A8", (".weight_scale",), NATIVE),
)
_BUFFERS = re.compile(r"(inv_freq|cos_cached|sin_cached|cos_sin_cache|freqs_cis|kv_cache|position_ids|causal_mask)$")
_HF = (".self_attn.", ".mlp.", "embed_tokens.", "lm_head.", ".input_layernorm.", ".post_attention_layernorm.")
_V3_SCALE = "weight_scale_inv"


def of_names(extra: Collection[str], missing: Collection[str], specs: Mapping[str, TensorSpec]) -> str | None:
    """What names that are no tensors of the model belong to, and what to do; None when unknown."""
    if not extra:
        return None
    for quantisation in QUANTISATIONS:
        if all(any(name.endswith(end) for name in extra) for end in quantisation.endings):
            return f"this is a conversion to {quantisation.name}: {quantisation.served_by}, {RELEASED}"
    if any(part in name for name in extra for part in _HF):
        return f"these are HF transformers' names: transformers serves them, {RELEASED}"
    renamed = {name: name.removeprefix("model.") for name in extra}
    if _share(new in specs for name, new in renamed.items() if name != new) > 0.5:
        return "every name begins with model.: take that prefix away from names and index, " + RELEASED
    renamed = {name: name.replace(_V3_SCALE, "scale").removeprefix("model.") for name in extra}
    if _share(new in specs for name, new in renamed.items() if name.endswith(_V3_SCALE)) > 0.5:
        return f"scales are named as DeepSeek-V3's, .{_V3_SCALE}: rename them to .scale, {RELEASED}"
    if not missing and all(_BUFFERS.search(name) for name in extra):
        return "buffers that a framework computes were saved too: take them out of the files and the index"
    return None


def of_dtypes(config: V4Config, specs: Mapping[str, TensorSpec], headers: Mapping[str, Stored]) -> str | None:
    """What dtypes that are not the model's belong to, and what to do; None when unknown."""
    expert = "layers.0.ffn.experts.0.w1.weight"
    found = headers[expert].dtype if expert in headers and expert in specs else None
    if found is not None and found != specs[expert].dtype:
        other = {"I8": "fp4", "F8_E4M3": "fp8"}.get(found)
        if other is not None:
            return f'experts are {other}, config.json says {config.expert_dtype}: set "expert_dtype" to "{other}" in config.json'
        return f"experts are {found}: dsv4 serves fp4 (I8) and fp8 (F8_E4M3) ones; quantise them, {RELEASED}"
    linears = [n for n, s in specs.items() if s.dtype == "F8_E4M3" and n in headers]
    plain = [n for n in linears if headers[n].dtype in ("BF16", "F16", "F32")]
    if linears and len(plain) == len(linears):
        return f"every FP8 linear is {headers[plain[0]].dtype}: this is a dequantised copy; quantise it, {RELEASED}"
    return None


def of_files(folder: Path) -> str | None:
    """What a folder without safetensors holds, and what to do; None when it holds no weights."""
    for pattern, name, advice in (
        ("*.gguf", "GGUF files", "llama.cpp serves them"),
        ("*.bin", "PyTorch files (*.bin)", "convert them to safetensors"),
        ("*.pt", "PyTorch files (*.pt)", "convert them to safetensors"),
        ("*.npz", "MLX files", "mlx-lm serves them"),
    ):
        if any(folder.glob(pattern)):
            return f"it holds {name}: {advice}, {RELEASED}"
    return None


def _share(found: Iterable[bool]) -> float:
    known = list(found)
    return sum(known) / len(known) if known else 0.0
