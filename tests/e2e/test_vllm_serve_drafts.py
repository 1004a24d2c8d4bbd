# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` with MTP drafts, as users run it: every endpoint answers as without them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from served import VLLM, Server

from dsv4.proof.status import ServerStatus
from dsv4.reference.tiny import write_tiny
from tests.support.comparison import Oracle
from tests.support.hf_oracle import load_hf
from tests.support.serve_checks import CHAT, ServeChecks, gauge, serve_until_sigterm
from tests.support.vllm_engine import MODEL_CLASS, environment

pytestmark = pytest.mark.long
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}


@pytest.fixture(scope="module")
def tiny_flash(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In the place of the usual one: its draft is right every second time."""
    return write_tiny(tmp_path_factory.mktemp("serve") / "agree", "flash", agree=True)


@pytest.fixture(scope="module")
def flash_oracle(tiny_flash: Path) -> Oracle:
    return Oracle(load_hf(tiny_flash))


@pytest.fixture(scope="module")
def flash_text() -> list[int]:
    return torch.randint(3, 259, (300,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture(scope="module")
def server(tiny_flash: Path) -> Iterator[Server]:
    drafts = json.dumps({"method": "mtp", "num_speculative_tokens": 2})
    yield from serve_until_sigterm(VLLM.command(tiny_flash, "--speculative-config", drafts), environment())


class TestVllmServeWithDrafts(ServeChecks):
    engine = VLLM
    model_class = MODEL_CLASS
    attention_backends = ("DSV4_ENTRY", "DSV4_SUMMARY", "DSV4_WINDOW")
    quant_method = "dsv4_vllm.quant.V4QuantConfig"
    running_requests = "vllm:num_requests_running"

    def test_structured_output_is_what_was_asked_for(self, server: Server) -> None:
        body = CHAT | {
            "ignore_eos": False,
            "max_tokens": 60,
            "response_format": {"type": "json_schema", "json_schema": {"name": "s", "strict": True, "schema": SCHEMA}},
            "chat_template_kwargs": {"thinking": False},
        }
        choice = server.post("/v1/chat/completions", body)["choices"][0]
        text = choice["message"]["content"]
        if choice["finish_reason"] == "stop":
            assert set(json.loads(text)) == {"a"}
        else:  # a number may be of any length
            assert text.lstrip().startswith("{")

    def test_logprobs_of_chosen_tokens(self, server: Server) -> None:
        """One for each token, the best first."""
        found = server.post("/v1/chat/completions", CHAT | {"logprobs": True, "top_logprobs": 2})["choices"][0][
            "logprobs"
        ]
        assert len(found["content"]) == CHAT["max_tokens"]
        for token in found["content"]:
            assert token["logprob"] == token["top_logprobs"][0]["logprob"] <= 0

    def test_a_seed_gives_the_same_text_again(self, server: Server) -> None:
        body = CHAT | {"temperature": 1, "seed": 11}
        once, again = (server.post("/v1/chat/completions", body)["choices"][0]["message"] for _ in range(2))
        assert once == again

    def test_drafts_were_kept_and_refused(self, server: Server) -> None:
        """By the metrics, after all the requests above."""
        drafted, kept = (gauge(server, f"vllm:spec_decode_num_{what}_tokens_total") for what in ("draft", "accepted"))
        assert 0 < kept < drafted

    def test_status_says_who_drafts_and_what_is_kept(self, server: Server) -> None:
        status = ServerStatus.from_json(server.get("/dsv4/status"))
        assert (status.workers[0].draft_class, status.workers[0].drafted) == ("dsv4_vllm.draft.DeepSeekV4MTP", 2)
        assert status.acceptance is not None
        assert status.acceptance.by_position is not None
        first, second = status.acceptance.by_position
        assert 0 < second < first < 1
        assert status.acceptance.tokens_per_step == pytest.approx(1 + first + second)
