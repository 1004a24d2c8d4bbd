# SPDX-License-Identifier: Apache-2.0
"""A small random checkpoint in the released format, to run the real engines without the real
weights.

Format, head_dim, window and compress ratios are V4's own; everything else is small. Weights are
random, yet scaled so that hidden states stay O(1), logits spread over a few units, and every part
of the model shows in the logits.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor

from dsv4.errors import CheckpointError, ConfigError
from dsv4.model.checkpoint import INDEX_FILE
from dsv4.model.config import (
    ARCHITECTURE,
    CSA_RATIO,
    DRAFT_STAGES_DSPARK,
    FP8_BLOCK,
    HCA_RATIO,
    MODEL_TYPE,
    DraftKind,
    ExpertDtype,
    V4Config,
)
from dsv4.model.tensors import ScaleDtype, TensorSpec, tensor_specs

Variant = Literal["flash", "pro"]

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
# Text that the chat encoding and its parsers use as single tokens. As in the released tokenizer
# they are no "special" tokens: they must survive skip_special_tokens, or reasoning and tool calls
# would vanish from the reply.
CHAT_TOKENS = (
    "<｜User｜>", "<｜Assistant｜>", "<｜latest_reminder｜>", "<think>", "</think>", "｜DSML｜",
    "<｜action｜>", "<｜query｜>", "<｜authority｜>", "<｜domain｜>", "<｜title｜>", "<｜read_url｜>",
)  # fmt: skip

_DTYPES = {
    "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu, "I8": torch.int8, "I64": torch.int64,
    "BF16": torch.bfloat16, "F32": torch.float32,
}  # fmt: skip
_FP8_CODE_STD = 16.0  # of e4m3 codes: far from 448 (saturation) and from 2^-6 (subnormals)
_FP4_CODE_STD = 2.926  # of e2m1 codes drawn uniformly
_E8M0_BIAS = 127
_SHARD_BYTES = 8 << 20


@dataclass(frozen=True)
class TinyDims:
    """The sizes that make the checkpoint small; each must suit 128 x 128 blocks at tensor-parallel
    size 2."""

    hidden_size: int = 256
    num_attention_heads: int = 8
    o_groups: int = 2
    o_lora_rank: int = 128
    q_lora_rank: int = 128
    index_n_heads: int = 16  # fewer give index scores of exactly 0, hence ties (docs/model.md, 7)
    index_topk: int = 16  # selection matters from token 68 on
    n_routed_experts: int = 8
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 256
    vocab_size: int = 512
    num_hash_layers: int = 3  # at most; the released models'


def tiny_config(
    variant: Variant = "flash",
    num_layers: int = 6,
    experts: ExpertDtype = "fp4",
    draft: DraftKind = "mtp",
    dims: TinyDims | None = None,
) -> dict[str, Any]:
    """config.json of a tiny checkpoint, in the released flat shape. Raises ConfigError for an
    unknown choice."""
    for name, value, known in (
        ("variant", variant, Variant),
        ("experts", experts, ExpertDtype),
        ("draft", draft, DraftKind),
    ):
        if value not in get_args(known):
            raise ConfigError(f"tiny: {name} is {value!r}; choose one of {', '.join(get_args(known))}")
    if num_layers < 1:
        raise ConfigError(f"tiny: num_layers is {num_layers}; give at least 1")
    dims = dims or TinyDims()
    raw: dict[str, Any] = {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "compress_ratios": _compress_ratios(variant, num_layers, draft),
        "compress_rope_theta": 160000,
        "eos_token_id": 1,
        "expert_dtype": experts,
        "hc_eps": 1e-06,
        "hc_mult": 4,
        "hc_sinkhorn_iters": 20,
        "head_dim": 512,
        "hidden_act": "silu",
        "index_head_dim": 128,
        "initializer_range": 0.02,
        "max_position_embeddings": 1048576,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_hidden_layers": num_layers,
        "num_key_value_heads": 1,
        "num_nextn_predict_layers": 0 if draft == "none" else 1,
        "qk_rope_head_dim": 64,
        "quantization_config": {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "scale_fmt": "ue8m0",
            "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
        },
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 16,
            "original_max_position_embeddings": 65536,
            "type": "yarn",
        },
        "rope_theta": 10000,
        "routed_scaling_factor": 1.5 if variant == "flash" else 2.5,
        "scoring_func": "sqrtsoftplus",
        "sliding_window": 128,
        "swiglu_limit": 10.0,
        "tie_word_embeddings": False,
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
        "transformers_version": "4.57.1",
        "use_cache": True,
        **vars(dims),
        "num_hash_layers": min(dims.num_hash_layers, num_layers),
    }
    if draft == "dspark":
        targets = list(range(max(0, num_layers - 3), num_layers))
        raw |= {
            "dspark_block_size": 5,
            "dspark_noise_token_id": 2,
            "dspark_target_layer_ids": targets,
            "dspark_markov_rank": 32,
        }
    return dict(sorted(raw.items()))


def write_tiny(
    out: str | Path,
    variant: Variant = "flash",
    num_layers: int = 6,
    seed: int = 0,
    experts: ExpertDtype = "fp4",
    fp8_scale_dtype: ScaleDtype = "F8_E8M0",
    draft: DraftKind = "mtp",
    dims: TinyDims | None = None,
    progress: bool = False,
    agree: bool = False,
) -> Path:
    """Write a tiny checkpoint to the folder `out`, whole or not at all, and return its path.

    variant: layer mix and routed_scaling_factor of Flash or Pro. seed: same seed, same bytes.
    fp8_scale_dtype: of the block scales when experts are FP8. progress: show a bar. agree: a token
    mostly decides the next one, and the draft knows how, so that it is right often. Raises
    CheckpointError when `out` exists and is not empty, ConfigError for an unknown choice.
    """
    out = Path(out).absolute()
    raw = tiny_config(variant, num_layers, experts, draft, dims)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out}: already exists and is not empty; remove it or give another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        _write_weights(part, V4Config.from_dict(raw, "tiny"), seed, fp8_scale_dtype, progress, agree)
        _write_json(part / "config.json", raw)
        sampling = {"bos_token_id": 0, "eos_token_id": 1, "do_sample": True, "temperature": 1.0, "top_p": 1.0}
        _write_json(part / "generation_config.json", {"_from_model_config": True, **sampling})
        _write_tokenizer(part, raw["vocab_size"])
        part.chmod(0o755)  # mkdtemp, and safetensors' writer, make things private
        for file in part.iterdir():
            file.chmod(0o644)
        if out.exists():
            out.rmdir()
        os.rename(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return out


def _compress_ratios(variant: Variant, num_layers: int, draft: DraftKind) -> list[int]:
    # docs/model.md, 1.2: two bootstrap layers, then CSA and HCA in turn, then the draft's slots.
    first = 0 if variant == "flash" else HCA_RATIO
    backbone = [first if i < 2 else (HCA_RATIO if i % 2 else CSA_RATIO) for i in range(num_layers)]
    return backbone + [0] * {"none": 0, "mtp": 1, "dspark": DRAFT_STAGES_DSPARK}[draft]


def _write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# --------------------------------------------------------------------------------------------
# Weights


def _write_weights(
    folder: Path, config: V4Config, seed: int, fp8_scale_dtype: ScaleDtype, progress: bool, agree: bool
) -> None:
    specs = tensor_specs(config, fp8_scale_dtype)
    tensors = {
        spec.name: _random(spec, config, seed)
        for spec in track(specs.values(), "random weights", disable=not progress, transient=True)
    }
    if agree:
        _let_agree(tensors, config)
    shards = split_torch_state_dict_into_shards(tensors, max_shard_size=_SHARD_BYTES)
    for file, names in shards.filename_to_tensors.items():
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
    total = sum(spec.nbytes for spec in specs.values())
    _write_json(
        folder / INDEX_FILE,
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(shards.tensor_to_filename.items()))},
    )


def _random(spec: TensorSpec, config: V4Config, seed: int) -> Tensor:
    """Random contents of one tensor. Seeded by its name, so that layers do not depend on how many
    there are."""
    # torch's CPU generator looks at the low 32 bits only, so both go through the checksum
    rng = torch.Generator().manual_seed(zlib.crc32(spec.name.encode(), seed))
    leaf = spec.name.removesuffix(".weight").removesuffix(".scale").rsplit(".", 1)[-1]
    if spec.name.endswith(".scale"):
        # the scale carries the weight's size; it varies by block so that a misplaced scale shows
        return _block_scale(spec, config, leaf, rng)
    if spec.dtype == "I8":  # two e2m1 codes per byte, all 16 equally often
        return torch.randint(-128, 128, spec.shape, dtype=torch.int8, generator=rng)
    if spec.dtype == "F8_E4M3":
        return (_FP8_CODE_STD * torch.randn(spec.shape, generator=rng)).to(torch.float8_e4m3fn)
    if leaf == "tid2eid":
        return (
            torch.rand(spec.shape[0], config.n_routed_experts, generator=rng)
            .argsort(-1)[:, : spec.shape[1]]
            .contiguous()
        )
    return _plain(spec, leaf, rng).to(_DTYPES[spec.dtype])


_NEXT = 7  # what is added to a token's id where it decides the next


def _let_agree(tensors: dict[str, Tensor], config: V4Config) -> None:
    """Change `tensors` so that an embedding, louder than what layers add, is read by the head as
    the next token; and the draft alike: MTP passes the embedding of its token on, DSpark's Markov
    head knows what follows.
    """
    embed = 3 * tensors["embed.weight"].float()
    tensors["embed.weight"] = embed.bfloat16()
    tensors["head.weight"] = (0.1 * embed.roll(_NEXT, 0)).to(tensors["head.weight"].dtype)
    if config.draft == "mtp":
        size, weight = config.hidden_size, tensors["mtp.0.e_proj.weight"]
        tensors["mtp.0.e_proj.weight"] = torch.eye(size).to(weight.dtype)
        tensors["mtp.0.e_proj.scale"] = _powers(tensors["mtp.0.e_proj.scale"], 1)
        tensors["mtp.0.h_proj.scale"] = _powers(tensors["mtp.0.h_proj.scale"], -10)
    if config.draft == "dspark":
        head = f"mtp.{config.num_draft_layers - 1}.markov_head.markov_w"
        before = torch.randn(tensors[f"{head}1.weight"].shape, generator=torch.Generator().manual_seed(0))
        tensors[f"{head}1.weight"] = before.bfloat16()
        tensors[f"{head}2.weight"] = (before.roll(_NEXT, 0)).bfloat16()


def _powers(scale: Tensor, exponent: int) -> Tensor:
    """Block scales of 2 ** exponent, like `scale`."""
    return torch.full(scale.shape, exponent + _E8M0_BIAS, dtype=torch.uint8).view(torch.float8_e8m0fnu)


# Standard deviation of a linear's outputs for inputs of RMS 1 (gain), by the leaf of its name; 1
# unless listed.
_GAIN = {
    "w1": 6.0,  # so that gate and up often leave the clamp's [-10, 10]
    "w3": 6.0,
    "w2": 0.05,  # silu(gate) * up has RMS ~20
    "wgate": 1.5,  # pooling must prefer some tokens
    "wo_b": 3.0,  # averaging over keys shrinks the attention output
    "gate": 2.0,  # experts' scores must differ by more than rounding
    "head": 2.0,  # logits over a few units
}


def _gain(leaf: str) -> float:
    return _GAIN.get(leaf, 1.0)


def _block_scale(spec: TensorSpec, config: V4Config, leaf: str, rng: torch.Generator) -> Tensor:
    fan_in = _fan_in(spec, config, leaf)
    fp4 = spec.is_routed_expert and config.expert_dtype == "fp4"
    std = _gain(leaf) / math.sqrt(fan_in) / (_FP4_CODE_STD if fp4 else _FP8_CODE_STD)
    exponent = round(math.log2(std)) + torch.randint(-1, 2, spec.shape, generator=rng)
    if spec.dtype == "F32":
        return torch.exp2(exponent.float())
    return (exponent + _E8M0_BIAS).to(torch.uint8).view(torch.float8_e8m0fnu)


def _fan_in(spec: TensorSpec, c: V4Config, leaf: str) -> int:
    by_leaf = {
        "wq_b": c.q_lora_rank,
        "wo_a": c.heads_per_group * c.head_dim,
        "wo_b": c.o_groups * c.o_lora_rank,
        "w2": c.moe_intermediate_size,
        "main_proj": c.hidden_size * len(c.dspark_target_layer_ids),
    }
    return by_leaf.get(leaf, c.hidden_size)


def _plain(spec: TensorSpec, leaf: str, rng: torch.Generator) -> Tensor:
    """Contents of an unquantised tensor, fp32."""
    noise = torch.randn(spec.shape, generator=rng)
    special: dict[str, Callable[[], Tensor]] = {
        "embed": lambda: noise,
        "attn_sink": lambda: noise,
        "bias": lambda: 0.3 * noise,  # large enough to change the choice, so that using it in the weights shows
        "ape": lambda: 0.5 * noise,
        # Softer than this, attention averages its window and hides a missing key.
        "kv_norm": lambda: 1.5 + 0.15 * noise,
        # Mixes have RMS 1. Comb logits get RMS ~2.7: below 2 the 20th Sinkhorn iteration would be
        # invisible.
        "hc_attn_scale": lambda: torch.tensor([1.0, 1.0, 2.5]) + 0.1 * noise,
        "hc_ffn_scale": lambda: torch.tensor([1.0, 1.0, 2.5]) + 0.1 * noise,
        "hc_attn_base": lambda: _hc_base(noise),
        "hc_ffn_base": lambda: _hc_base(noise),
        "hc_head_base": lambda: 0.5 * noise,
        "hc_head_scale": lambda: 1.0 + 0.1 * noise,
    }
    if leaf in special:
        return special[leaf]()
    if leaf.endswith("norm"):
        return 1.0 + 0.1 * noise
    return _gain(leaf) / math.sqrt(spec.shape[-1]) * noise


def _hc_base(noise: Tensor) -> Tensor:
    num_pre_post = 8
    return torch.cat([0.5 * noise[:num_pre_post], noise[num_pre_post:]])


# --------------------------------------------------------------------------------------------
# Tokenizer


def _write_tokenizer(folder: Path, vocab_size: int) -> None:
    """A byte-level BPE tokenizer without merges: one token per byte, V4's own tokens, and
    decode-only letter pairs.

    The pairs fill the vocabulary, so that every id the model can sample decodes to text.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    own = (BOS, EOS, PAD, *CHAT_TOKENS)
    names = [*own, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    letters = "etaoinshrdlucmfwypvbgkjqxz"
    pairs = [a + b for a in letters for b in letters]
    if not len(names) <= vocab_size <= len(names) + len(pairs):
        raise ConfigError(
            f"tiny: vocab_size is {vocab_size}; the tokenizer needs {len(names)} to {len(names) + len(pairs)}"
        )
    names += pairs[: vocab_size - len(names)]
    tokenizer = Tokenizer(BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in (BOS, EOS, PAD)])
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in CHAT_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "add_bos_token": False,
            "add_eos_token": False,
            "bos_token": BOS,
            "clean_up_tokenization_spaces": False,
            "eos_token": EOS,
            "legacy": True,
            "model_max_length": 1048576,
            "pad_token": EOS,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": None,
        },
    )
