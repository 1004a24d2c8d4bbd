# SPDX-License-Identifier: Apache-2.0
"""What an engine stored and chose, recorded there and replayed through the reference model.

Rounding turns a difference of 1e-6 into a whole quantisation step wherever a value lies on a
rounding boundary, and a random model amplifies it. So what the engine stored and chose is recorded
and replayed: every recorded code must be the reference's own or its neighbour, neighbours must be
rare, every choice must be the reference's own or a tie of it, and from the same codes and choices
the log-probabilities must agree as tightly as in fp32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4.model.config import LayerKind, LayerSpec, Routing
from dsv4.model.kv_layout import IndexFormat, KvFormat
from dsv4.ops.indexer.query import IndexQuery
from dsv4.ops.moe import reference as moe
from dsv4.reference.model import Quantisation, ReferenceModel
from tests.support.comparison import TOLERANCE

# An fp32 difference of about 1e-5 of a value crosses a bf16 rounding boundary (2**-8 apart) with
# probability 2.6e-3, and a bf16 step changes an e4m3 code (2**-3 apart) in one case of 32.
MOST_NEIGHBOURS = 1e-2
# One e4m3 step is at most 1/8 of a value; a scale that flips by a factor of two coarsens the step
# to 1/4 below it.
STEP = 0.25
# The widest e2m1 step is from 4 to 6 scales, and a scale is at most a third of its group's largest
# value.
FP4_STEP = 2 / 3
# Scores of equal codes differ by fp32 rounding only: 1e-5 of their spread, as between any two fp32
# implementations.
TIE = 1e-4


class Replayed(ReferenceModel):
    """The reference, fed with the rows, queries and choices of the engine; checks each and counts
    differing codes."""

    def __init__(self, base: ReferenceModel, recorded: dict[str, list[Any]]) -> None:
        super().__init__(base.config, base.weights, base.quantisation)
        layers = base.config.layers
        self.rows = {name: torch.cat(parts) for name, parts in recorded.items() if name.endswith("_cache")}
        csa = [layer.index for layer in layers if layer.kind is LayerKind.CSA]
        routed = [layer.index for layer in layers if layer.routing is Routing.TOPK]
        self.queries = {
            i: tuple(torch.cat(parts) for parts in zip(*recorded["query"][n :: len(csa)], strict=True))
            for n, i in enumerate(csa)
        }
        self.topk_indices = {i: torch.cat(recorded["topk"][n :: len(csa)]) for n, i in enumerate(csa)}
        self.experts = {i: torch.cat(recorded["route"][n :: len(routed)]) for n, i in enumerate(routed)}
        self.layer, self.calls, self.different, self.total = -1, 0, 0, 0

    def _attention(self, layer: LayerSpec, x: Tensor) -> Tensor:
        self.layer, self.calls = layer.index, 0
        return super()._attention(layer, x)

    def _stored(self, rows: Tensor, row_format: KvFormat | IndexFormat) -> Tensor:
        role = "index_key" if isinstance(row_format, IndexFormat) else ("window", "compressed")[self.calls]
        self.calls += 1
        own, engine = super()._stored(rows, row_format), self.rows[f"model.layers.{self.layer}.attn.{role}_cache"]
        assert own.shape == engine.shape, (self.layer, role, own.shape, engine.shape)
        largest = own.abs().amax(-1, keepdim=True)
        limit = STEP * torch.maximum(own.abs(), engine.abs()) + 1e-3 * largest
        if row_format is IndexFormat.MXFP4:
            limit = FP4_STEP * largest.expand_as(own)
        assert ((own - engine).abs() <= limit).all(), (self.layer, role)
        self.different += int((own != engine).sum())
        self.total += own.numel()
        return engine

    def _index_query(self, layer: LayerSpec, x: Tensor, qr: Tensor, table: Tensor) -> IndexQuery:
        own = super()._index_query(layer, x, qr, table)
        values, weights = self.queries[layer.index]
        assert (own.values != values).float().mean() <= MOST_NEIGHBOURS
        _assert_scaled(weights, own.weights)
        return IndexQuery(values, own.scales, weights, own.format)

    def _visible_topk(self, layer: LayerSpec, x: Tensor, qr: Tensor, table: Tensor, seen: Tensor) -> Tensor:
        is_topk = torch.zeros(seen.shape[0], seen.shape[1] + 1, dtype=torch.bool)
        picks = self.topk_indices[layer.index].long()
        is_topk = is_topk.scatter_(1, torch.where(picks < 0, seen.shape[1], picks), True)[:, :-1]
        _assert_top(self._index_scores(layer, x, qr, table), is_topk, seen)
        return is_topk

    def route(self, logits: Tensor, bias: Tensor, top_k: int, scaling_factor: float) -> tuple[Tensor, Tensor]:
        """Stands in for the reference's router on the current layer."""
        ids = self.experts[self.layer].long()
        score = moe.scores(logits)
        is_topk = torch.zeros_like(score, dtype=torch.bool).scatter_(1, ids, True)
        assert (is_topk.sum(-1) == top_k).all()
        _assert_top(score + bias, is_topk, torch.ones_like(is_topk))
        weights = score.gather(1, ids)
        return weights / weights.sum(-1, keepdim=True) * scaling_factor, ids.int()


def _assert_scaled(weights: Tensor, own: Tensor) -> None:
    """Weights hold the scale of a head's codes, a power of two: they are the reference's own within
    fp32 rounding, or, rarely, those of the neighbouring scale.

    weights, own: [T, Hi] fp32
    """
    close = TIE * own.abs().amax(-1, keepdim=True)
    same = (weights - own).abs() <= close
    neighbour = ((weights - 2 * own).abs() <= close) | ((weights - own / 2).abs() <= close)
    assert (same | neighbour).all()
    assert (~same).float().mean() <= MOST_NEIGHBOURS


def _assert_top(scores: Tensor, is_topk: Tensor, allowed: Tensor) -> None:
    """The chosen of each row are allowed, and none is below a refused one by more than a tie."""
    assert not (is_topk & ~allowed).any()
    if scores.shape[1] == 0:
        return
    worst = scores.masked_fill(~is_topk, float("inf")).amin(-1)
    best_refused = scores.masked_fill(is_topk | ~allowed, float("-inf")).amax(-1)
    spread = scores.abs().masked_fill(~allowed, 0.0).amax(-1)
    assert (worst >= best_refused - TIE * spread).all()


def record_quantised(names: dict[int, str]) -> dict[str, list[Any]]:
    """Collect what this process stores in each cache, dequantised, every index query, and every
    choice it makes.

    names: by id of `Pages`, `model.layers.3.attn.window_cache`. Returns {name: [rows], "query":
    [(values, weights)], "topk": [entries], "route": [experts]}; the last three hold one item per
    layer and step, in layer order. Only meaningful while one request runs at a time.
    """
    from dsv4.ops import registry
    from dsv4.ops.attention import reference as attention
    from dsv4.ops.compressor import entry
    from dsv4.ops.indexer import reference as indexer
    from dsv4.ops.quant.reference import decode_row, encode_row

    recorded: dict[str, list[Any]] = {"query": [], "topk": [], "route": []}
    store = attention.store_rows

    def recorded_store(pages: Any, slots: Any, rows: Any, rope_dim: int) -> None:
        store(pages, slots, rows, rope_dim)
        if pages.packed:
            values = decode_row(*encode_row(rows[slots >= 0], pages.format, rope_dim), pages.format, rope_dim)
            recorded.setdefault(names[id(pages)], []).append(values.clone())

    def record_result(module: Any, name: str, key: str, keep: Any, most_args: int = 99) -> None:
        function = getattr(module, name)

        def wrapped(*args: Any) -> Any:
            result = function(*args)
            if len(args) <= most_args or args[most_args] is None:  # no block table: entries were asked for
                recorded[key].append(keep(result))
            return result

        setattr(module, name, wrapped)

    attention.store_rows = entry.store_rows = recorded_store
    record_result(indexer, "prepare_query", "query", lambda query: (query.values.clone(), query.weights.clone()))
    # Asked for cache slots, topk asks itself for entries: that inner call of three arguments is
    # what the reference replays.
    record_result(indexer, "topk", "topk", lambda topk_indices: topk_indices.clone(), most_args=3)
    record_result(moe, "route_topk", "route", lambda result: result[1].clone())
    registry.forget_choices()
    return recorded


def assert_equals_quantised_reference(
    output: dict[str, Any],
    record: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    index: IndexFormat = IndexFormat.FP8,
) -> None:
    """One request's log-probabilities against the reference with fp8 pages, fed with what the
    engine recorded."""
    base = ReferenceModel.from_folder(folder, Quantisation(KvFormat.FP8_DS_MLA, index))
    model = Replayed(base, torch.load(record, weights_only=True))
    monkeypatch.setattr(moe, "route_topk", model.route)
    ids = output["prompt"] + output["tokens"]
    want = model.logprobs(ids[:-1]).gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1)
    got = torch.tensor(output["prompt_logprobs"] + output["logprobs"])
    worst = float((got - want).abs().max())
    print(
        f"{folder.name}: worst {worst:.1e} over {len(want)}, {model.different / model.total:.1e} of codes are neighbours"
    )
    assert worst <= TOLERANCE
    assert model.total > 0
    assert model.different <= MOST_NEIGHBOURS * model.total
