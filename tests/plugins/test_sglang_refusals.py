# SPDX-License-Identifier: Apache-2.0
"""Ways to draft that SGLang offers and dsv4 does not have, each refused by its own name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.model_executor.cuda_graph_config import Backend, CudaGraphConfig
from sglang.srt.server_args import ServerArgs

from dsv4.errors import DeploymentError
from dsv4.model.config import DraftKind, V4Config
from dsv4.reference.tiny import tiny_config
from dsv4_sglang.drafting import resolved
from dsv4_sglang.hooks import captured_phases
from dsv4_sglang.support import _DRAFTED_SO_ONLY, check_draft


def asked(**given: Any) -> SimpleNamespace:
    """SGLang's arguments, as they are when nobody says anything else."""
    plain = ServerArgs(model_path="here")
    nothing = {name: getattr(plain, name) for name in ServerArgs.__struct_fields__}
    return SimpleNamespace(**nothing | {"speculative_algorithm": "EAGLE"} | given)


def config(draft: DraftKind = "mtp") -> V4Config:
    return V4Config.from_dict(tiny_config(draft=draft), "tiny")


@pytest.mark.parametrize("algorithm", ["EAGLE", "NEXTN", "nextn"])
@pytest.mark.parametrize(
    ("given", "k"), [({}, 3), ({"speculative_num_steps": 1}, 1), ({"speculative_num_steps": 7}, 7)]
)
def test_mtp_is_drafted_as_many_at_a_time_as_asked(algorithm: str, given: dict[str, Any], k: int) -> None:
    args = asked(speculative_algorithm=algorithm, **given)
    check_draft(args, config())
    found = resolved(args)
    assert (found["speculative_num_steps"], found["speculative_num_draft_tokens"]) == (k, k + 1)
    assert (found["speculative_eagle_topk"], found["speculative_draft_model_path"]) == (1, "here")


def test_no_draft_is_asked_for_and_none_is_made() -> None:
    args = asked(speculative_algorithm=None)
    check_draft(args, config("none"))
    assert resolved(args) == {}


@pytest.mark.parametrize("algorithm", ["EAGLE", "NEXTN", "DSPARK", "NGRAM", "STANDALONE", "EAGLE3", "DFLASH"])
@pytest.mark.parametrize(
    ("draft", "carries"), [("mtp", "an MTP block"), ("dspark", "a DSpark draft"), ("none", "no draft")]
)
def test_a_method_that_does_not_fit_the_checkpoint(draft: DraftKind, carries: str, algorithm: str) -> None:
    args = asked(speculative_algorithm=algorithm)
    if draft == "mtp" and algorithm in ("EAGLE", "NEXTN"):
        return check_draft(args, config(draft))
    with pytest.raises(DeploymentError) as refused:
        check_draft(args, config(draft))
    message = str(refused.value)
    assert f"--speculative-algorithm {algorithm}" in message
    assert carries in message
    assert ("use NEXTN" if draft == "mtp" else "leave it out") in message
    assert "\n" not in message


@pytest.mark.parametrize("flag", sorted(_DRAFTED_SO_ONLY))
def test_an_option_that_is_not_tested(flag: str) -> None:
    with pytest.raises(DeploymentError, match=f"{flag} other: .*; leave it out"):
        check_draft(asked(**{flag[2:].replace("-", "_"): "other"}), config())


def test_with_drafts_no_step_is_captured() -> None:
    assert captured_phases(CudaGraphConfig()).decode.backend == Backend.FULL
    phases = captured_phases(CudaGraphConfig(), drafts=True)
    assert (phases.decode.backend, phases.prefill.backend) == (Backend.DISABLED, Backend.DISABLED)
