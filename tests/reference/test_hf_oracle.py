# SPDX-License-Identifier: Apache-2.0
"""The oracle itself: it must be causal, and every part of the model must show in its
log-probabilities.

A test that compares with the oracle catches a mistake only if the tiny weights make that mistake
visible. The smallest effect below (19 instead of 20 Sinkhorn iterations) stays 20 times above the
2e-4 that implementations are held to.
"""

from __future__ import annotations

import inspect
import textwrap

import pytest
import torch

from dsv4.reference.tiny import write_tiny
from tests.support import hf_oracle

VISIBLE = 4e-3  # 20 x 2e-4


@pytest.fixture(scope="module", params=["tiny_flash", "tiny_pro"])
def model(request):
    return hf_oracle.load_hf(request.getfixturevalue(request.param))


@pytest.fixture(scope="module")
def prompt(model):
    return hf_oracle.prompt_without_ties(model, 300)


@pytest.fixture(scope="module")
def logprobs(model, prompt):
    return hf_oracle.hf_logprobs(model, prompt)


def test_log_probabilities_are_finite_normalised_and_spread(logprobs):
    assert torch.isfinite(logprobs).all()
    torch.testing.assert_close(logprobs.exp().sum(-1), torch.ones(300), atol=1e-5, rtol=0)
    assert 1.0 < logprobs.std() < 4.0


@pytest.mark.parametrize("length", [1, 127, 128, 129, 257])
def test_a_prefix_has_the_same_log_probabilities(model, prompt, logprobs, length):
    # Measured 4e-5, which is also how far fp32 is from fp64 on these weights; twice that, rounded
    # up.
    torch.testing.assert_close(hf_oracle.hf_logprobs(model, prompt[:length]), logprobs[:length], atol=1e-4, rtol=0)


def test_later_tokens_do_not_matter(model, prompt, logprobs):
    changed = prompt[:200] + prompt[:100]
    torch.testing.assert_close(hf_oracle.hf_logprobs(model, changed)[:200], logprobs[:200], atol=1e-4, rtol=0)


def test_prompt_without_ties_keeps_its_margin(model, prompt):
    assert hf_oracle.hf_margins(model, prompt).min() > 1e-5


def test_a_tie_has_no_margin():
    scores = torch.tensor([[3.0, 2.0, 2.0, 1.0], [3.0, 2.5, 2.0, 1.0], [3.0, 2.0, -torch.inf, -torch.inf]])
    gap = hf_oracle._gap(scores, 2)
    assert gap[0] == 0
    assert gap[1] > 0
    assert gap[2] == torch.inf  # nothing was refused


# --------------------------------------------------------------------------------------------
# Mutations


@pytest.fixture
def effect(model, prompt, logprobs):
    """Largest change of a log-probability against the intact model."""
    return lambda: (hf_oracle.hf_logprobs(model, prompt) - logprobs).abs().max().item()


def source():
    import transformers.models.deepseek_v4.modeling_deepseek_v4 as modeling

    return modeling


def rewrite(monkeypatch, class_name: str, old: str, new: str) -> None:
    """Replace `old` by `new` in the source of a class's forward."""
    cls = getattr(source(), class_name)
    text = textwrap.dedent(inspect.getsource(cls.forward))
    assert text.count(old) >= 1, f"{class_name}.forward changed; adapt this mutation"
    namespace: dict = {}
    exec("from __future__ import annotations\n" + text.replace(old, new), vars(source()), namespace)
    monkeypatch.setattr(cls, "forward", namespace["forward"])


@pytest.mark.parametrize(
    ("class_name", "old", "new"),
    [
        pytest.param(
            "DeepseekV4HyperConnection",
            "return post, comb, collapsed",
            "return post, comb.mT, collapsed",
            id="comb-transposed",
        ),
        pytest.param(
            "DeepseekV4HyperConnection",
            "self.hc_sinkhorn_iters - 1",
            "self.hc_sinkhorn_iters - 2",
            id="19-sinkhorn-iterations",
        ),
        pytest.param(
            "DeepseekV4Attention",
            "attn_output = apply_rotary_pos_emb(",
            "_ = apply_rotary_pos_emb(",
            id="no-inverse-rope",
        ),
        pytest.param(
            "DeepseekV4CSACompressor", "* self.compress_rate + first", "* 1 + first", id="csa-entry-rope-at-j"
        ),
        pytest.param(
            "DeepseekV4HCACompressor", "* self.compress_rate + first", "* 1 + first", id="hca-entry-rope-at-j"
        ),
        pytest.param("DeepseekV4Indexer", "* self.compress_rate + first", "* 1 + first", id="index-key-rope-at-j"),
        pytest.param(
            "DeepseekV4TopKRouter",
            "weights = scores.gather(1, indices)",
            "weights = (scores + self.e_score_correction_bias).gather(1, indices)",
            id="bias-in-the-weights",
        ),
        pytest.param(
            "DeepseekV4MLP", ".clamp(min=-self.limit, max=self.limit)", "", id="no-clamp-of-the-shared-expert"
        ),
    ],
)
def test_a_mistake_in_one_formula_is_visible(monkeypatch, effect, class_name, old, new):
    rewrite(monkeypatch, class_name, old, new)
    assert effect() > VISIBLE


def test_a_routed_expert_without_its_clamp_is_visible(monkeypatch, model, effect):
    for layer in model.model.layers:
        monkeypatch.setattr(layer.mlp.experts, "limit", 1e9)
    assert effect() > VISIBLE


@pytest.mark.parametrize("window", [127, 129])
def test_a_window_off_by_one_is_visible(monkeypatch, model, effect, window):
    monkeypatch.setattr(model.config, "sliding_window", window)
    for layer in model.model.layers:
        monkeypatch.setattr(layer.self_attn, "sliding_window", window)
    assert effect() > VISIBLE


def test_one_more_selected_entry_is_visible(monkeypatch, model, effect):
    for layer in model.model.layers:
        indexer = getattr(getattr(layer.self_attn, "compressor", None), "indexer", None)
        if indexer is not None:
            monkeypatch.setattr(indexer, "index_topk", indexer.index_topk + 1)
    assert effect() > VISIBLE


@pytest.mark.parametrize(
    "options",
    [{"experts": "fp8"}, {"experts": "fp8", "fp8_scale_dtype": "F32"}, {"draft": "dspark"}, {"draft": "none"}],
)
def test_every_storage_that_tiny_writes_is_read(tmp_path, options):
    logprobs = hf_oracle.hf_logprobs(
        hf_oracle.load_hf(write_tiny(tmp_path / "t", num_layers=3, **options)), range(3, 140)
    )
    assert torch.isfinite(logprobs).all()
    assert 1.0 < logprobs.std() < 4.0
