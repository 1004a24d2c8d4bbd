# SPDX-License-Identifier: Apache-2.0
"""What both drafts of DeepSeek-V4 propose after one sequence, without paging: the truth for tests.

MTP (April checkpoints) is one block over the backbone's streams and the next token. DSpark (0731,
0813) proposes a block of tokens at once from what three layers of the backbone made of the context.
Source: docs/model.md, 3.9 and 3.10.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv4.errors import ConfigError
from dsv4.model.config import LayerSpec
from dsv4.ops.mhc import reference as mhc
from dsv4.ops.norm import rms_norm
from dsv4.ops.rope import cos_sin, inv_freq
from dsv4.reference.model import ReferenceModel


@dataclass(frozen=True)
class Proposal:
    """tokens: drafted, [k]; logits: that they are the largest of, fp32 [k, V]; confidence: DSpark's
    that each is right, fp32 [k]."""

    tokens: list[int]
    logits: Tensor
    confidence: Tensor | None = None


class ReferenceDraft(ReferenceModel):
    """The backbone with its draft, in fp32 on a CPU."""

    @torch.inference_mode()
    def propose(self, ids: list[int], k: int) -> Proposal:
        """k tokens after `ids`, whose last one the backbone has sampled and not yet seen.

        ids: at least two. k: with DSpark at most its block. Raises ConfigError where the checkpoint
        has no draft or not one of that length.
        """
        c = self.config
        if c.draft == "none":
            raise ConfigError("the checkpoint has no draft")
        if not 1 <= k <= (c.dspark_block_size if c.draft == "dspark" else k):
            raise ConfigError(f"{k} tokens to draft: a block of DSpark has {c.dspark_block_size}")
        streams = self.streams(ids[:-1])
        return self._dspark(ids, streams, k) if c.draft == "dspark" else self._mtp(ids, streams[-1], k)

    @torch.inference_mode()
    def mtp_logits(self, ids: list[int]) -> Tensor:
        """MTP's first logits at every position: fp32 [T - 1, V]; row t predicts token t + 2 from
        the streams at t and token t + 1.
        """
        return self._mtp_logits(self._mtp_block(self.streams(ids[:-1])[-1], torch.tensor(ids[1:])))

    # ---- MTP --------------------------------------------------------------------------------

    def _mtp(self, ids: list[int], streams: Tensor, k: int) -> Proposal:
        """Chained: what the block made of the last token stands for the streams of the drafted
        one.
        """
        tokens, logits = list(ids[1:]), []
        for _ in range(k):
            made = self._mtp_block(streams, torch.tensor(tokens))
            logits.append(self._mtp_logits(made[-1:])[0])
            tokens.append(int(logits[-1].argmax()))
            streams = torch.cat([streams, made[-1:]])
        return Proposal(tokens[len(ids) - 1 :], torch.stack(logits))

    def _mtp_block(self, streams: Tensor, next_tokens: Tensor) -> Tensor:
        """streams: [T, n, D] at positions 0 to T - 1; next_tokens: [T] at 1 to T. [T, n, D]."""
        (layer,) = self.config.draft_layers
        eps, prefix = self.config.rms_norm_eps, self._prefix(layer)
        embedded = rms_norm(self.weights["embed.weight"][next_tokens], self.weights[f"{prefix}.enorm.weight"], eps)
        normed = rms_norm(streams, self.weights[f"{prefix}.hnorm.weight"], eps)  # each stream by itself
        mixed = self._linear(layer, "e_proj", embedded)[:, None] + self._linear(layer, "h_proj", normed)
        return self._layer(layer, mixed, next_tokens)

    def _mtp_logits(self, streams: Tensor) -> Tensor:
        return self._head(self._collapse(streams)[1])

    def _collapse(self, streams: Tensor) -> tuple[Tensor, Tensor]:
        """The streams as one vector, before and after the draft's own last norm: [T, D] both."""
        prefix = self._prefix(self.config.draft_layers[-1])
        site = self._site(f"{prefix}.hc_head", f"{prefix}.norm")
        hidden = mhc.collapse(streams, site)
        return hidden, rms_norm(hidden, site.norm_weight, self.config.rms_norm_eps)

    # ---- DSpark -----------------------------------------------------------------------------

    def _dspark(self, ids: list[int], layers: list[Tensor], k: int) -> Proposal:
        c, (first, *_) = self.config, self.config.draft_layers
        last = self._prefix(c.draft_layers[-1])
        targets = torch.cat([layers[i].mean(1) for i in c.dspark_target_layer_ids], -1)  # [T, 3 D], of outputs
        main = self._linear(first, "main_proj", targets)
        main = rms_norm(main, self.weights[f"{self._prefix(first)}.main_norm.weight"], c.rms_norm_eps)
        block = [ids[-1]] + [c.dspark_noise_token_id] * (c.dspark_block_size - 1)
        tokens = torch.tensor(block)
        streams = self._embed(tokens)
        for layer in c.draft_layers:
            streams = self._block(layer, streams, self._over(layer, main), tokens)
        raw, hidden = self._collapse(streams)
        logits, drafted, confidence = self._head(hidden), [], []
        before = ids[-1]
        w1, w2 = (self.weights[f"{last}.markov_head.markov_{w}.weight"] for w in ("w1", "w2"))
        probe = self.weights[f"{last}.confidence_head.proj.weight"][0]
        for i in range(k):
            logits[i] += w2 @ w1[before]
            confidence.append(torch.sigmoid(probe @ torch.cat([raw[i], w1[before]])))
            before = int(logits[i].argmax())
            drafted.append(before)
        return Proposal(drafted, logits[:k], torch.stack(confidence))

    def _over(self, layer: LayerSpec, main: Tensor) -> Callable[[Tensor], Tensor]:
        """Attention of a block's rows: over the window's rows of the context, made from the
        backbone alone, and over each other in both directions.
        """
        c, length = self.config, main.shape[0]
        freq = inv_freq(c, compressed=False)
        context = self._window_rows(layer, main, cos_sin(torch.arange(length), freq))[-c.sliding_window :]

        def attend(x: Tensor) -> Tensor:
            table = cos_sin(torch.arange(length, length + x.shape[0]), freq)
            q, _ = self._queries(layer, x, table)
            keys = torch.cat([context, self._window_rows(layer, x, table)])
            return self._attend(layer, q, keys, torch.ones(x.shape[0], keys.shape[0], dtype=torch.bool), table)

        return attend
