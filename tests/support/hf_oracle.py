# SPDX-License-Identifier: Apache-2.0
"""HF transformers' DeepseekV4ForCausalLM in fp32 on the dequantised weights of a checkpoint: the
independent oracle.

Nothing here comes from dsv4: reading, dequantising and renaming are written again, so that a
mistake in dsv4 cannot hide in its own oracle. HF is exact only in fp32, with attention "eager" and
right padding (docs/model.md, 4.3 and 4.4).
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])

# Source: docs/model.md, 2.3. Applied in order to the whole name.
_RENAMES = (
    (r"^embed\.", "model.embed_tokens."),
    (r"^head\.", "lm_head."),
    (r"^norm\.", "model.norm."),
    (r"^hc_head_(\w+)$", r"model.hc_head.hc_\1"),
    (r"^layers\.", "model.layers."),
    (r"\.attn_norm\.", ".input_layernorm."),
    (r"\.ffn_norm\.", ".post_attention_layernorm."),
    (r"\.hc_attn_", ".attn_hc."),
    (r"\.hc_ffn_", ".ffn_hc."),
    (r"\.attn\.indexer\.compressor\.", ".attn.compressor.indexer."),
    (r"\.attn\.indexer\.weights_proj\.", ".attn.compressor.indexer.scorer.weights_proj."),
    (r"\.attn\.indexer\.", ".attn.compressor.indexer."),
    (r"(\.compressor(?:\.indexer)?)\.norm\.", r"\1.kv_norm."),
    (r"\.ape$", ".position_bias"),
    (r"\.attn_sink$", ".sinks"),
    (r"\.wq_a\.", ".q_a_proj."),
    (r"\.wq_b\.", ".q_b_proj."),
    (r"\.wkv\.", ".kv_proj."),
    (r"\.wgate\.", ".gate_proj."),
    (r"\.wo_a\.", ".o_a_proj."),
    (r"\.wo_b\.", ".o_b_proj."),
    (r"\.q_norm\.", ".q_a_norm."),
    (r"\.gate\.bias$", ".gate.e_score_correction_bias"),
    (r"\.shared_experts\.w1\.", ".shared_experts.gate_proj."),
    (r"\.shared_experts\.w2\.", ".shared_experts.down_proj."),
    (r"\.shared_experts\.w3\.", ".shared_experts.up_proj."),
    (r"\.attn\.", ".self_attn."),
    (r"\.ffn\.", ".mlp."),
)
_EXPERT = re.compile(r"^(?P<layer>.*\.mlp\.experts)\.(?P<expert>\d+)\.(?P<linear>w[123])\.weight$")


def load_hf(folder: str | Path, dtype: torch.dtype = torch.float32) -> Any:
    """The checkpoint in `folder` as an HF DeepseekV4ForCausalLM, eager attention, eval mode, on the
    CPU."""
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    folder = Path(folder)
    raw = json.loads((folder / "config.json").read_text())
    raw.pop("quantization_config")
    raw["compress_ratios"] = raw["compress_ratios"][: raw["num_hidden_layers"]]  # HF would count the draft's slot
    config = DeepseekV4Config(**raw)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    with torch.device("meta"):
        model = DeepseekV4ForCausalLM(config)
    rope = model.model.rotary_emb
    missing, unexpected = model.load_state_dict(hf_state_dict(folder), strict=False, assign=True)
    assert not unexpected, unexpected
    assert not missing, missing
    model.model.rotary_emb = type(rope)(config)  # its tables are no weights
    for layer in model.model.layers:
        for module in layer.self_attn.modules():
            if isinstance(getattr(module, "rotary_emb", None), type(rope)):
                module.rotary_emb = type(rope)(config)
    return model.to(dtype).eval()


def hf_state_dict(folder: Path) -> dict[str, Tensor]:
    """Backbone weights in fp32 under HF's names; `mtp.*` left out, as HF has no draft."""
    raw = read_tensors(folder)
    return rename_experts(
        {
            name: dequantise(tensor, raw.get(name.removesuffix(".weight") + ".scale"))
            for name, tensor in raw.items()
            if not name.startswith("mtp.") and not name.endswith(".scale")
        }
    )


def rename_experts(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Dequantised tensors by released names, under HF's: experts of a layer stacked."""
    state: dict[str, Tensor] = {}
    experts: dict[str, dict[str, dict[int, Tensor]]] = defaultdict(lambda: defaultdict(dict))
    for name, value in values.items():
        new = _rename(name)
        if match := _EXPERT.match(new):
            experts[match["layer"]][match["linear"]][int(match["expert"])] = value
        else:
            state[new] = value
    for prefix, by_linear in experts.items():
        w1, w2, w3 = (torch.stack([by_linear[w][e] for e in sorted(by_linear[w])]) for w in ("w1", "w2", "w3"))
        state[f"{prefix}.gate_up_proj"] = torch.cat([w1, w3], dim=1)  # [E, 2I, D], gate rows first
        state[f"{prefix}.down_proj"] = w2  # [E, D, I]
    return state


def dequantise(tensor: Tensor, scale: Tensor | None) -> Tensor:
    """fp32 values of a weight: FP4 pairs in int8, FP8 blocks, or plain. Integers that are no
    weights pass through."""
    if scale is None:
        return tensor if tensor.dtype == torch.int64 else tensor.float()
    factor = torch.exp2(scale.view(torch.uint8).float() - 127) if scale.dtype == torch.float8_e8m0fnu else scale.float()
    if tensor.dtype == torch.int8:
        byte = tensor.view(torch.uint8).int()
        value = torch.stack([_E2M1[byte & 15], _E2M1[byte >> 4]], dim=-1).flatten(-2)  # low nibble first
        return value * factor.repeat_interleave(32, dim=1)
    blocks = factor.repeat_interleave(128, dim=0).repeat_interleave(128, dim=1)
    return tensor.float() * blocks[: tensor.shape[0], : tensor.shape[1]]


def _rename(name: str) -> str:
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor as stored, by released name."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as shard:
            tensors.update({name: shard.get_tensor(name) for name in shard.keys()})  # noqa: SIM118 - no mapping
    return tensors


@torch.inference_mode()
def hf_logprobs(model: Any, ids: list[int] | Tensor) -> Tensor:
    """Log-probabilities of the next token after every position. ids: [T] int. Returns [T, V] in the
    model's dtype."""
    ids = torch.as_tensor(ids, dtype=torch.long).reshape(1, -1)
    logits = model(input_ids=ids, use_cache=False).logits[0]  # [T, V]
    return logits.log_softmax(-1)


@torch.inference_mode()
def hf_margins(model: Any, ids: list[int] | Tensor) -> Tensor:
    """How far each position is from choosing another expert or another compressed entry. ids: [T]
    int. Returns [T].

    The gap between the last chosen and the first refused score, over the standard deviation of the
    choice's scores; the smallest over the layers, inf where nothing is refused. fp32
    implementations differ by ~1e-6 of it, so a smaller gap makes two correct ones choose
    differently and disagree by O(1) from there on (docs/model.md, 7).
    """
    found: list[Tensor] = []

    def router(module: Any, _: Any, output: tuple[Tensor, ...]) -> None:
        if hasattr(module, "e_score_correction_bias"):
            scores = module.score_fn(output[0]) + module.e_score_correction_bias  # [T, E]
            found.append(_gap(scores, module.top_k))

    def scorer(module: Any, _: Any, output: Tensor) -> None:
        num_tokens, num_entries = output.shape[1:]
        ready = (torch.arange(num_tokens)[:, None] + 1) // 4 > torch.arange(num_entries)
        found.append(_gap(output[0].masked_fill(~ready, -torch.inf), model.config.index_topk))

    hooks = [layer.mlp.gate.register_forward_hook(router) for layer in model.model.layers]
    for layer in model.model.layers:
        indexer = getattr(getattr(layer.self_attn, "compressor", None), "indexer", None)
        if indexer is not None:
            hooks.append(indexer.scorer.register_forward_hook(scorer))
    try:
        hf_logprobs(model, ids)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(found).amin(0)


def _gap(scores: Tensor, k: int) -> Tensor:
    """scores: [T, N], -inf where not offered. Returns [T]."""
    if scores.shape[1] <= k:
        return torch.full(scores.shape[:1], torch.inf)
    top = scores.topk(k + 1).values
    spread = scores.masked_fill(scores == -torch.inf, torch.nan)
    mean = spread.nanmean(-1, keepdim=True)
    std = (spread - mean).square().nanmean(-1).sqrt()
    gap = (top[:, k - 1] - top[:, k]) / std
    return gap.masked_fill(~torch.isfinite(top[:, k]), torch.inf)


def prompt_without_ties(model: Any, length: int, seed: int = 0, margin: float = 1e-5) -> list[int]:
    """A random prompt of `length` ids on which every choice of the model is wider than `margin`
    (see hf_margins)."""
    for attempt in range(1000):
        rng = torch.Generator().manual_seed(1000 * seed + attempt)
        ids = torch.randint(3, model.config.vocab_size, (length,), generator=rng)
        if hf_margins(model, ids).min() > margin:
            return ids.tolist()
    raise AssertionError(f"no prompt of {length} ids has margins above {margin}; lower the margin")
