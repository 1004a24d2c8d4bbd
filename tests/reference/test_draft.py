# SPDX-License-Identifier: Apache-2.0
"""What the reference drafts, against HF transformers' own blocks in fp32.

Implementations are held to 2e-4 (docs/model.md, 7); a mistake on purpose must show twenty times as
much.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from dsv4.errors import ConfigError
from dsv4.model.config import LayerKind, Routing
from dsv4.reference import draft
from dsv4.reference.draft import ReferenceDraft
from dsv4.reference.tiny import write_tiny
from tests.support.draft_oracle import DraftOracle, load_draft_oracle
from tests.support.hf_oracle import prompt_without_ties

CLOSE, VISIBLE = 2e-4, 4e-3
LENGTHS = [2, 3, 128, 129, 130, 200]  # ids, of which the backbone has seen one less


@pytest.fixture(scope="module", params=["flash", "pro"])
def mtp(request, tmp_path_factory) -> tuple[ReferenceDraft, DraftOracle]:
    return _both(tmp_path_factory.mktemp("mtp") / "t", request.param, "mtp")


@pytest.fixture(scope="module", params=["flash", "pro"])
def dspark(request, tmp_path_factory) -> tuple[ReferenceDraft, DraftOracle]:
    return _both(tmp_path_factory.mktemp("dspark") / "t", request.param, "dspark")


def _both(folder, variant, kind) -> tuple[ReferenceDraft, DraftOracle]:
    write_tiny(folder, variant, draft=kind)
    return ReferenceDraft.from_folder(folder), load_draft_oracle(folder)


def prompt(length: int) -> list[int]:
    return torch.randint(3, 512, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def far(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def test_mtp_at_every_position(mtp):
    reference, oracle = mtp
    ids = prompt_without_ties(oracle.model, 300)
    logits = oracle.mtp(oracle.streams(ids[:-1])[-1], ids[1:])[1]
    assert logits.std() > 1
    assert far(reference.mtp_logits(ids), logits) < CLOSE


@pytest.mark.parametrize("length", LENGTHS)
def test_mtp_chained(mtp, length):
    reference, oracle = mtp
    ids = prompt_without_ties(oracle.model, length)
    found = reference.propose(ids, 3)
    tokens, logits = oracle.mtp_chain(ids, 3)
    assert found.tokens == tokens
    assert far(found.logits, logits) < CLOSE


@pytest.mark.parametrize("length", LENGTHS)
def test_dspark_block(dspark, length):
    reference, oracle = dspark
    ids = prompt_without_ties(oracle.model, length)
    found = reference.propose(ids, 5)
    tokens, logits, sure = oracle.dspark(ids)
    assert found.tokens == tokens
    assert far(found.logits, logits) < CLOSE
    assert found.confidence is not None
    assert far(found.confidence, sure) < CLOSE / 4  # a sigmoid is at most a quarter as steep
    assert reference.propose(ids, 2).tokens == tokens[:2]


# ---- mistakes that a port makes ---------------------------------------------------------------


def _one_norm(x: Tensor, weight: Tensor, eps: float, norm: Callable[..., Tensor]) -> Tensor:
    """One RMS over the streams together, as a port that flattens them computes it."""
    if x.dim() == 2:
        return norm(x, weight, eps)
    rms = x.flatten(1).square().mean(-1).add(eps).rsqrt()
    return x * rms[:, None, None] * weight


def _unshifted(reference: ReferenceDraft, ids: list[int]) -> Tensor:
    return reference._mtp_logits(reference._mtp_block(reference.streams(ids[:-1])[-1], torch.tensor(ids[:-1])))


def _collapsed(reference: ReferenceDraft, ids: list[int]) -> Tensor:
    streams = reference.streams(ids[:-1])[-1]
    same = streams.mean(1, keepdim=True).expand_as(streams)
    return reference._mtp_logits(reference._mtp_block(same, torch.tensor(ids[1:])))


def _layer_before(reference: ReferenceDraft, ids: list[int]) -> Tensor:
    return reference._mtp_logits(reference._mtp_block(reference.streams(ids[:-1])[-2], torch.tensor(ids[1:])))


@pytest.mark.parametrize("wrong", [_unshifted, _collapsed, _layer_before])
def test_mtp_of_other_inputs_shows(mtp, wrong):
    reference, _ = mtp
    assert far(wrong(reference, prompt(60)), reference.mtp_logits(prompt(60))) > VISIBLE


def test_mtp_with_one_norm_over_all_streams_shows(mtp, monkeypatch):
    reference, _ = mtp
    right = reference.mtp_logits(prompt(60))
    monkeypatch.setattr(draft, "rms_norm", partial(_one_norm, norm=draft.rms_norm))
    assert far(reference.mtp_logits(prompt(60)), right) > VISIBLE


def _off_by_one(layers: list[Tensor]) -> list[Tensor]:
    return [layers[0], *layers[:-1]]


def test_dspark_of_the_layers_inputs_shows(dspark, monkeypatch):
    reference, _ = dspark
    right = reference.propose(prompt(60), 5).logits
    streams = reference.streams
    monkeypatch.setattr(reference, "streams", lambda ids: _off_by_one(streams(ids)))
    assert far(reference.propose(prompt(60), 5).logits, right) > VISIBLE


@pytest.mark.parametrize("context", [127, 129])
def test_dspark_with_another_window_shows(dspark, context):
    from dataclasses import replace

    reference, _ = dspark
    right = reference.propose(prompt(200), 5).logits
    other = ReferenceDraft(replace(reference.config, sliding_window=context), reference.weights)
    layers = reference.streams(prompt(200)[:-1])  # of the right backbone
    other.streams = lambda ids: layers  # type: ignore[method-assign]
    assert far(other.propose(prompt(200), 5).logits, right) > VISIBLE


def test_dspark_that_looks_back_alone_shows(dspark, monkeypatch):
    reference, _ = dspark
    right = reference.propose(prompt(60), 5).logits
    attend = ReferenceDraft._attend

    def causal(self, layer, q, keys, visible, table):
        if layer.index >= self.config.num_hidden_layers:
            n = q.shape[0]
            visible = torch.cat([visible[:, :-n], torch.ones(n, n, dtype=torch.bool).tril()], 1)
        return attend(self, layer, q, keys, visible, table)

    monkeypatch.setattr(ReferenceDraft, "_attend", causal)
    assert far(reference.propose(prompt(60), 5).logits, right) > VISIBLE


# ---- what may be asked ------------------------------------------------------------------------


def test_draft_layers_go_on_from_the_backbone(mtp, dspark):
    (layer,) = mtp[0].config.draft_layers
    assert (layer.index, layer.kind, layer.routing) == (6, LayerKind.SWA, Routing.TOPK)
    assert [x.index for x in dspark[0].config.draft_layers] == [6, 7, 8]
    assert (dspark[0].config.dspark_block_size, dspark[0].config.dspark_noise_token_id) == (5, 2)


def test_what_a_checkpoint_cannot_draft(dspark, tiny_flash, tmp_path):
    for k in (0, 6):
        with pytest.raises(ConfigError, match="a block of DSpark has 5"):
            dspark[0].propose(prompt(9), k)
    write_tiny(tmp_path / "none", num_layers=1, draft="none")
    with pytest.raises(ConfigError, match="has no draft"):
        ReferenceDraft.from_folder(tmp_path / "none").propose(prompt(9), 1)
