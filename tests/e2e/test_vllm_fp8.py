# SPDX-License-Identifier: Apache-2.0
"""fp8_ds_mla pages in the real engine against the reference model with the same quantisation.

Rounding turns a difference of 1e-6 into a whole quantisation step wherever a value lies on a rounding boundary, and a
random model amplifies it. So what the engine stored and chose is recorded and replayed: every recorded code must be the
reference's own or its neighbour, neighbours must be rare, every choice must be the reference's own or a tie of it, and
from the same codes and choices the log-probabilities must agree as tightly as in fp32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm_engine import TOLERANCE, engine_args, request, run

from dsv4.config import LayerKind, LayerSpec, Routing
from dsv4.kv_layout import IndexFormat, KvFormat
from dsv4.ops.indexer.query import IndexQuery
from dsv4.ops.moe import reference as moe
from dsv4.reference_model import Quantisation, ReferenceModel

# An fp32 difference of about 1e-5 of a value crosses a bf16 rounding boundary (2**-8 apart) with probability 2.6e-3, and
# a bf16 step changes an e4m3 code (2**-3 apart) in one case of 32.
MOST_NEIGHBOURS = 1e-2
# One e4m3 step is at most 1/8 of a value; a scale that flips by a factor of two coarsens the step to 1/4 below it.
STEP = 0.25
# Scores of equal codes differ by fp32 rounding only: 1e-5 of their spread, as between any two fp32 implementations.
TIE = 1e-4


class Replayed(ReferenceModel):
    """The reference, fed with the rows, queries and choices of the engine; checks each and counts differing codes."""

    def __init__(self, base: ReferenceModel, recorded: dict[str, list[Any]]) -> None:
        super().__init__(base.config, base.weights, base.quantisation)
        layers = base.config.layers
        self.rows = {name: torch.cat(parts) for name, parts in recorded.items() if name.endswith("_cache")}
        csa = [layer.index for layer in layers if layer.kind is LayerKind.CSA]
        routed = [layer.index for layer in layers if layer.routing is Routing.TOPK]
        self.queries = {i: torch.cat([values for values, _ in recorded["query"][n :: len(csa)]]) for n, i in enumerate(csa)}
        self.chosen = {i: torch.cat(recorded["topk"][n :: len(csa)]) for n, i in enumerate(csa)}
        self.experts = {i: torch.cat(recorded["route"][n :: len(routed)]) for n, i in enumerate(routed)}
        self.layer, self.calls, self.different, self.total = -1, 0, 0, 0

    def _attention(self, layer: LayerSpec, x: Tensor, tokens: Tensor) -> Tensor:
        self.layer, self.calls = layer.index, 0
        return super()._attention(layer, x, tokens)

    def _stored(self, rows: Tensor, row_format: KvFormat | IndexFormat) -> Tensor:
        role = "index_key" if isinstance(row_format, IndexFormat) else ("window", "compressed")[self.calls]
        self.calls += 1
        own, engine = super()._stored(rows, row_format), self.rows[f"model.layers.{self.layer}.attn.{role}_cache"]
        assert own.shape == engine.shape, (self.layer, role, own.shape, engine.shape)
        limit = STEP * torch.maximum(own.abs(), engine.abs()) + 1e-3 * own.abs().amax(-1, keepdim=True)
        assert ((own - engine).abs() <= limit).all(), (self.layer, role)
        self.different += int((own != engine).sum())
        self.total += own.numel()
        return engine

    def _index_query(self, layer: LayerSpec, x: Tensor, qr: Tensor, table: Tensor) -> IndexQuery:
        own = super()._index_query(layer, x, qr, table)
        values = self.queries[layer.index]
        assert (own.values != values).float().mean() <= MOST_NEIGHBOURS
        return IndexQuery(values, own.scales, own.weights, own.format)

    def _selected(self, layer: LayerSpec, x: Tensor, qr: Tensor, table: Tensor, seen: Tensor) -> Tensor:
        chosen = torch.zeros(seen.shape[0], seen.shape[1] + 1, dtype=torch.bool)
        picks = self.chosen[layer.index].long()
        chosen = chosen.scatter_(1, torch.where(picks < 0, seen.shape[1], picks), True)[:, :-1]
        _assert_top(self._index_scores(layer, x, qr, table), chosen, seen)
        return chosen

    def route(self, logits: Tensor, bias: Tensor, top_k: int, scaling_factor: float) -> tuple[Tensor, Tensor]:
        """Stands in for the reference's router on the current layer."""
        ids = self.experts[self.layer].long()
        score = moe.scores(logits)
        chosen = torch.zeros_like(score, dtype=torch.bool).scatter_(1, ids, True)
        assert (chosen.sum(-1) == top_k).all()
        _assert_top(score + bias, chosen, torch.ones_like(chosen))
        weights = score.gather(1, ids)
        return weights / weights.sum(-1, keepdim=True) * scaling_factor, ids.int()


def _assert_top(scores: Tensor, chosen: Tensor, allowed: Tensor) -> None:
    """The chosen of each row are allowed, and none is below a refused one by more than a tie."""
    assert not (chosen & ~allowed).any()
    if scores.shape[1] == 0:
        return
    worst = scores.masked_fill(~chosen, float("inf")).amin(-1)
    best_refused = scores.masked_fill(chosen | ~allowed, float("-inf")).amax(-1)
    spread = scores.abs().masked_fill(~allowed, 0.0).amax(-1)
    assert (worst >= best_refused - TIE * spread).all()


@pytest.mark.parametrize("variant", ["flash", "pro"])
@pytest.mark.parametrize("budget", [48, 2048])
def test_packed_pages_equal_the_quantised_reference(
    variant: str, budget: int, tmp_path: Path, tiny_flash: Path, tiny_pro: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = {"flash": tiny_flash, "pro": tiny_pro}[variant]
    record = tmp_path / "recorded.pt"
    engine = engine_args(folder, max_num_batched_tokens=budget, kv_cache_dtype="fp8_ds_mla", max_num_seqs=1)
    prompt = torch.randint(3, 259, (515,), generator=torch.Generator().manual_seed(7)).tolist()
    result = run(engine, [[request(prompt, 12)]], record=str(record))
    assert (result["workers"][0]["kv_format"], result["workers"][0]["index_format"]) == ("fp8_ds_mla", "fp8")
    output = result["phases"][0][0]
    base = ReferenceModel.from_folder(folder, Quantisation(KvFormat.FP8_DS_MLA, IndexFormat.FP8))
    model = Replayed(base, torch.load(record, weights_only=True))
    monkeypatch.setattr(moe, "route_topk", model.route)
    ids = output["prompt"] + output["tokens"]
    want = model.logprobs(ids[:-1]).gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1)
    got = torch.tensor(output["prompt_logprobs"] + output["logprobs"])
    worst = float((got - want).abs().max())
    print(f"{variant}, budget {budget}: worst {worst:.1e} over {len(want)}, {model.different / model.total:.1e} of codes are neighbours")
    assert worst <= TOLERANCE
    assert model.total > 0
    assert model.different <= MOST_NEIGHBOURS * model.total
