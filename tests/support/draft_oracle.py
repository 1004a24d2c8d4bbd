# SPDX-License-Identifier: Apache-2.0
"""What both drafts propose, from HF transformers' own blocks: independent of dsv4's operators and
of its reference.

HF knows no draft, but its window-only decoder layer with score routing is a draft's block. The
equations around it are written here from docs/model.md, 3.9 and 3.10, again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.support.hf_oracle import dequantise, load_hf, read_tensors, rename_experts

_OF_A_BLOCK = ("attn", "ffn", "hc_attn", "hc_ffn")


@dataclass
class DraftOracle:
    """model: HF's backbone; blocks: HF decoder layers with the draft's weights; extra: its other
    tensors in fp32, by released names without `mtp.`"""

    raw: dict[str, Any]
    model: Any
    blocks: list[Any]
    extra: dict[str, Tensor]

    # ---- the backbone -----------------------------------------------------------------------

    @torch.inference_mode()
    def streams(self, ids: list[int]) -> list[Tensor]:
        """Output of every backbone layer: [T, n, D]."""
        found: list[Tensor] = []
        hooks = [
            layer.register_forward_hook(lambda _m, _i, out: found.append(out[0])) for layer in self.model.model.layers
        ]
        self.model(input_ids=torch.tensor([ids]), use_cache=False)
        for hook in hooks:
            hook.remove()
        return found

    def embed(self, ids: list[int]) -> Tensor:
        return self.model.model.embed_tokens(torch.tensor(ids))

    # ---- MTP --------------------------------------------------------------------------------

    @torch.inference_mode()
    def mtp(self, streams: Tensor, next_ids: list[int]) -> tuple[Tensor, Tensor]:
        """The block's streams [T, n, D] and logits [T, V], of streams at positions 0.. and the ids
        one further.
        """
        e = _norm(self.embed(next_ids), self.extra["0.enorm.weight"], self.eps)
        h = torch.stack([_norm(s, self.extra["0.hnorm.weight"], self.eps) for s in streams.unbind(1)], 1)
        x = (e @ self.extra["0.e_proj.weight"].T).unsqueeze(1) + h @ self.extra["0.h_proj.weight"].T
        length = x.shape[0]
        distance = torch.arange(length)[:, None] - torch.arange(length)
        mask = torch.where((distance >= 0) & (distance < 128), 0.0, -torch.inf)
        out = self._run(self.blocks[0], x, torch.arange(length), mask, None)
        return out, self.logits(out, 0)[1]

    @torch.inference_mode()
    def mtp_chain(self, ids: list[int], k: int) -> tuple[list[int], Tensor]:
        """k drafted tokens after ids and their logits."""
        streams, tokens, logits = self.streams(ids[:-1])[-1], ids[1:], []
        for _ in range(k):
            out, scores = self.mtp(streams, tokens)
            logits.append(scores[-1])
            tokens = [*tokens, int(scores[-1].argmax())]
            streams = torch.cat([streams, out[-1:]])
        return tokens[len(ids) - 1 :], torch.stack(logits)

    # ---- DSpark -----------------------------------------------------------------------------

    @torch.inference_mode()
    def dspark(self, ids: list[int]) -> tuple[list[int], Tensor, Tensor]:
        """The block's drafted tokens, logits [N, V] and confidences [N] after ids."""
        raw, size = self.raw, self.raw["dspark_block_size"]
        layers = self.streams(ids[:-1])
        main = torch.cat([layers[i].mean(dim=1) for i in raw["dspark_target_layer_ids"]], dim=-1)
        main = _norm(main @ self.extra["0.main_proj.weight"].T, self.extra["0.main_norm.weight"], self.eps)
        n = len(ids) - 1
        x = self.embed([ids[-1]] + [raw["dspark_noise_token_id"]] * (size - 1))
        x = x.unsqueeze(1).repeat(1, raw["hc_mult"], 1)
        for block in self.blocks:
            x = self._run(block, x, torch.arange(n, n + size), None, self._context(block, main))
        last = len(self.blocks) - 1
        hidden, logits = self.logits(x, last)
        w1, w2 = (self.extra[f"{last}.markov_head.markov_{w}.weight"] for w in ("w1", "w2"))
        probe = self.extra[f"{last}.confidence_head.proj.weight"].squeeze(0)
        previous, tokens, sure = ids[-1], [], []
        for i in range(size):
            bias = w1[previous]
            logits[i] = logits[i] + w2 @ bias
            sure.append(1 / (1 + torch.exp(-(torch.cat([hidden[i], bias]) * probe).sum())))
            previous = int(logits[i].argmax())
            tokens.append(previous)
        return tokens, logits, torch.stack(sure)

    def _context(self, block: Any, main: Tensor) -> Tensor:
        """The last 128 rows of a stage's window: [1, 1, C, 512]."""
        from transformers.models.deepseek_v4.modeling_deepseek_v4 import apply_rotary_pos_emb

        attn, positions = block.self_attn, torch.arange(main.shape[0])
        rows = attn.kv_norm(attn.kv_proj(main))[None, None]
        return apply_rotary_pos_emb(rows, *self._rope(positions))[:, :, -128:]

    # ---- both -------------------------------------------------------------------------------

    @property
    def eps(self) -> float:
        return float(self.raw["rms_norm_eps"])

    def logits(self, streams: Tensor, stage: int) -> tuple[Tensor, Tensor]:
        """The collapsed streams [T, D] before the norm, and logits [T, V]."""
        fn, base, scale = (self.extra[f"{stage}.hc_head_{part}"] for part in ("fn", "base", "scale"))
        flat = streams.flatten(1)
        flat = flat * torch.rsqrt(flat.square().mean(-1, keepdim=True) + self.eps)
        weight = torch.sigmoid(flat @ fn.T * scale + base) + self.raw["hc_eps"]
        hidden = (weight.unsqueeze(-1) * streams).sum(1)
        return hidden, _norm(hidden, self.extra[f"{stage}.norm.weight"], self.eps) @ self.model.lm_head.weight.T

    def _rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        probe = torch.zeros(1)
        return self.model.model.rotary_emb(probe, position_ids=positions[None], layer_type="main")

    def _run(self, block: Any, x: Tensor, positions: Tensor, mask: Tensor | None, context: Tensor | None) -> Tensor:
        return block(
            x[None],
            position_embeddings={"main": self._rope(positions)},
            position_ids=positions[None],
            attention_mask=None if mask is None else mask[None, None],
            past_key_values=None if context is None else _Before(context),
        )[0]


class _Before:
    """HF's cache as its attention asks it: rows that come before the block's own."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        both = torch.cat([self.rows, keys], 2)
        return both, both


def load_draft_oracle(folder: str | Path) -> DraftOracle:
    """The checkpoint in `folder` with its draft, in fp32."""
    from transformers import DeepseekV4Config
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4DecoderLayer

    folder = Path(folder)
    raw = json.loads((folder / "config.json").read_text())
    tensors = read_tensors(folder)
    values = {
        name: dequantise(tensor, tensors.get(name.removesuffix(".weight") + ".scale"))
        for name, tensor in tensors.items()
        if name.startswith("mtp.") and not name.endswith(".scale")
    }
    stages = 1 + max(int(name.split(".")[1]) for name in values)
    plain = {k: v for k, v in raw.items() if k != "quantization_config"}
    plain |= {"num_hidden_layers": stages, "compress_ratios": [0] * stages, "num_hash_layers": 0}
    config = DeepseekV4Config(**plain)
    config._attn_implementation = config._experts_implementation = "eager"
    blocks = []
    used: set[str] = set()
    for stage in range(stages):
        with torch.device("meta"):
            block = DeepseekV4DecoderLayer(config, stage)
        own = {name: v for name, v in values.items() if name.startswith(f"mtp.{stage}.")}
        state = rename_experts({name.replace(f"mtp.{stage}.", "layers.0.", 1): v for name, v in own.items()})
        state = {name.removeprefix("model.layers.0."): v for name, v in state.items()}
        missing, _ = block.load_state_dict(state, strict=False, assign=True)
        assert not missing, missing
        blocks.append(block.float().eval())
        used |= {name for name in own if name.split(".")[2].startswith(_OF_A_BLOCK)}
    extra = {name.removeprefix("mtp."): v.float() for name, v in values.items() if name not in used}
    return DraftOracle(raw, load_hf(folder), blocks, extra)


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight
