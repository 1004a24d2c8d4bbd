# SPDX-License-Identifier: Apache-2.0
"""The reference model against HF transformers, and every mutation of it that must not go unseen."""

from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from dsv4.model.kv_layout import IndexFormat, KvFormat
from dsv4.reference.model import Quantisation, ReferenceModel
from tests.support.hf_oracle import hf_logprobs, load_hf, prompt_without_ties

TOLERANCE = 2e-4  # measured: 5e-5


@pytest.fixture(scope="module", params=["flash", "pro"])
def case(request: pytest.FixtureRequest) -> tuple[ReferenceModel, list[int], torch.Tensor]:
    folder: Path = request.getfixturevalue(f"tiny_{request.param}")
    hf = load_hf(folder)
    ids = prompt_without_ties(hf, 300, margin=3e-5)
    return ReferenceModel.from_folder(folder), ids, hf_logprobs(hf, ids)


def test_logprobs_equal_hf(case: Any) -> None:
    model, ids, want = case
    assert (model.logprobs(ids) - want).abs().max() <= TOLERANCE


@pytest.mark.parametrize("length", [1, 3, 4, 127, 128, 129, 256])
def test_a_prefix_gives_the_same_logprobs(case: Any, length: int) -> None:
    model, ids, want = case
    assert (model.logprobs(ids[:length]) - want[:length]).abs().max() <= TOLERANCE


@pytest.mark.parametrize(
    "quantisation",
    [
        Quantisation(kv=KvFormat.FP8_DS_MLA),
        Quantisation(index=IndexFormat.FP8),
        Quantisation(index=IndexFormat.MXFP4),
        Quantisation(linear_inputs=True),
    ],
)
def test_each_quantisation_changes_the_model_a_little(case: Any, quantisation: Quantisation) -> None:
    model, ids, want = case
    got = ReferenceModel(model.config, model.weights, quantisation).logprobs(ids)
    assert got.isfinite().all()
    difference = (got - want).abs().mean()
    assert 1e-5 < difference < 1.0


# What the model must not become: module, what its source says, what a mistaken one would say.
MUTATIONS = {
    "untransposed comb": (
        "dsv4.ops.mhc.reference",
        "comb.to(compute_dtype).transpose(1, 2) @",
        "comb.to(compute_dtype) @",
    ),
    "19 Sinkhorn iterations": ("dsv4.ops.mhc.reference", "range(iters - 1)", "range(iters - 2)"),
    "no inverse RoPE": ("dsv4.ops.attention.reference", "apply_rope(o, cos_sin, inverse=True)", "o"),
    "no clamp": ("dsv4.ops.moe.reference", "up.float().clamp(-limit, limit)", "up.float()"),
    "bias used in the weights": (
        "dsv4.ops.moe.reference",
        "_weigh(score, ids, scaling_factor), ids.int()\n\n\ndef route_hash",
        "_weigh(score + bias, ids, scaling_factor), ids.int()\n\n\ndef route_hash",
    ),
    "window off by one": (
        "dsv4.reference.model",
        "t[:, None] - c.sliding_window)",
        "t[:, None] - c.sliding_window - 1)",
    ),
    "entry RoPE at j instead of j*m": (
        "dsv4.reference.model",
        "torch.arange(num_entries) * m, ",
        "torch.arange(num_entries), ",
    ),
}


def mutated(module_name: str, old: str, new: str) -> ModuleType:
    """The module executed anew from its source with `old` replaced by `new`; the source must hold
    `old` exactly once."""
    module = importlib.import_module(module_name)
    source = inspect.getsource(module)
    assert source.count(old) == 1, f"{module_name} no longer says {old!r}: write the mutation anew"
    clone = ModuleType(module_name)
    clone.__file__ = module.__file__
    sys.modules[module_name], kept = clone, sys.modules[module_name]
    try:
        exec(compile(source.replace(old, new), str(module.__file__), "exec"), clone.__dict__)
    finally:
        sys.modules[module_name] = kept
    return clone


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_is_seen(case: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison with HF fails for each mistake, so it would have been caught."""
    model, ids, want = case
    module_name, old, new = MUTATIONS[name]
    clone = mutated(module_name, old, new)
    original = importlib.import_module(module_name)
    for attribute, value in vars(clone).items():
        if callable(value) and getattr(value, "__module__", None) == module_name:
            monkeypatch.setattr(original, attribute, value)
    # Names that other modules imported by value follow their origin.
    import dsv4.reference.model as reference_model

    for attribute in ("output_a", "head_rms_norm"):
        if module_name == "dsv4.ops.attention.reference":
            monkeypatch.setattr(reference_model, attribute, getattr(clone, attribute))
    cls = reference_model.ReferenceModel
    difference = (cls(model.config, model.weights).logprobs(ids) - want).abs().max()
    assert difference > 2 * TOLERANCE, f"{name} changes log-probabilities by {difference:.1e} only"
