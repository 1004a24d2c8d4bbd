# SPDX-License-Identifier: Apache-2.0
"""`sglang serve` in its own process, as users run it: every endpoint, concurrency, a client that leaves, and SIGTERM."""

from __future__ import annotations

import http.client
import json
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from comparison import TOLERANCE, Oracle
from served import HOST, Server, sglang_serve
from sglang_engine import MODEL_CLASS, environment

from dsv4.doctor import diagnose

CHAT = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "Name a number."}],
    "max_tokens": 12,
    "temperature": 0,
    "ignore_eos": True,
}


@pytest.fixture(scope="module")
def server(tiny_flash: Path) -> Iterator[Server]:
    with Server(sglang_serve(tiny_flash, "--served-model-name", "tiny", "--enable-metrics"), environment()) as server:
        yield server
        # The last test of the module: one server is enough to start and to stop.
        server.process.send_signal(signal.SIGTERM)
        code = server.process.wait(60)
        assert _eventually(lambda: not server.group_is_alive())
        assert code == 0, server.log()[-3000:]


def _events(server: Server, path: str, body: dict) -> list[dict]:
    with server.open(path, {**body, "stream": True}) as response:
        lines = [line[6:].strip() for line in response if line.startswith(b"data: ")]
    assert lines[-1] == b"[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_status_and_doctor_prove_that_dsv4_serves(server: Server) -> None:
    status = server.get("/dsv4/status")
    assert status["engine"] == "sglang"
    worker = status["workers"][0]
    assert worker["model_class"] == MODEL_CLASS
    assert worker["kv_pool"] == "dsv4_sglang.pool.V4Pool"
    result = diagnose(server.url)
    assert result.server["serving"], result.problems


def test_generate_logprobs_equal_hf(server: Server, flash_oracle: Oracle, flash_text: list[int]) -> None:
    ids = flash_text[:300]
    body = {"input_ids": ids, "sampling_params": {"max_new_tokens": 1, "temperature": 0}, "return_logprob": True, "logprob_start_len": 0}
    entries = server.post("/generate", body)["meta_info"]["input_token_logprobs"][1:]
    want, _ = flash_oracle(ids)
    assert max(abs(logprob - float(w)) for (logprob, _, _), w in zip(entries, want, strict=True)) <= TOLERANCE


def test_completion_streams_what_it_returns_at_once(server: Server) -> None:
    body = {"model": "tiny", "prompt": "one two three", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    whole = server.post("/v1/completions", body)
    events = _events(server, "/v1/completions", body)
    assert "".join(e["choices"][0]["text"] for e in events if e["choices"]) == whole["choices"][0]["text"]
    assert whole["usage"]["completion_tokens"] == 12


def test_chat_streams_what_it_returns_at_once(server: Server) -> None:
    whole = server.post("/v1/chat/completions", CHAT)["choices"][0]["message"]
    deltas = [e["choices"][0]["delta"] for e in _events(server, "/v1/chat/completions", CHAT) if e["choices"]]
    for field in ("content", "reasoning_content"):
        assert "".join(d.get(field) or "" for d in deltas) == (whole.get(field) or "")
    assert whole.get("content") or whole.get("reasoning_content")


def test_chat_prompt_is_v4s_encoding(server: Server, tiny_flash: Path) -> None:
    """BOS, the user turn, the assistant turn with thinking closed: as many tokens, and the same answer."""
    from tokenizers import Tokenizer

    prompt = "<｜begin▁of▁sentence｜><｜User｜>Name a number.<｜Assistant｜></think>"
    ids = Tokenizer.from_file(str(tiny_flash / "tokenizer.json")).encode(prompt).ids
    chat = server.post("/v1/chat/completions", {**CHAT, "chat_template_kwargs": {"thinking": False}})
    plain = server.post("/generate", {"input_ids": ids, "sampling_params": {"max_new_tokens": 12, "temperature": 0, "ignore_eos": True}})
    assert chat["usage"]["prompt_tokens"] == len(ids)
    message = chat["choices"][0]["message"]
    assert (message.get("reasoning_content") or message.get("content") or "").strip() in plain["text"]
    thinking = server.post("/v1/chat/completions", {**CHAT, "chat_template_kwargs": {"thinking": True}})
    assert thinking["usage"]["prompt_tokens"] > len(ids)  # V4 Pro's encoding of thinking starts with an instruction


def test_chat_with_tools_is_accepted(server: Server) -> None:
    tool = {"type": "function", "function": {"name": "add", "description": "", "parameters": {"type": "object", "properties": {}}}}
    choice = server.post("/v1/chat/completions", {**CHAT, "tools": [tool]})["choices"][0]
    assert choice["finish_reason"] in ("length", "stop", "tool_calls")


def test_sixteen_clients_get_what_one_gets(server: Server) -> None:
    """Greedy tokens do not depend on who else is served. Prompts of different lengths, each asked alone and in the crowd."""
    bodies = [
        {
            "input_ids": [3 + (7 * i + j) % 250 for j in range(5 + 17 * i)],
            "sampling_params": {"max_new_tokens": 10, "temperature": 0, "ignore_eos": True},
        }
        for i in range(16)
    ]
    ask = lambda body: server.post("/generate", body)["output_ids"]  # noqa: E731
    with ThreadPoolExecutor(16) as pool:
        crowd = list(pool.map(ask, bodies))
    alone = [ask(body) for body in bodies]
    assert sum(a != c for a, c in zip(alone, crowd, strict=True)) <= 1  # one near-tie may fall either way


def test_a_client_that_leaves_frees_its_request(server: Server) -> None:
    connection = http.client.HTTPConnection(HOST, server.port, timeout=60)
    body = {"model": "tiny", "prompt": "long", "max_tokens": 1000, "temperature": 0, "ignore_eos": True, "stream": True}
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    response.read(200)
    response.close()
    connection.close()
    assert _eventually(lambda: _gauge(server, "sglang:num_running_reqs") == 0)
    assert server.post("/v1/completions", {"model": "tiny", "prompt": "next", "max_tokens": 2})["usage"]["completion_tokens"] >= 1


def _gauge(server: Server, name: str) -> float:
    connection = http.client.HTTPConnection(HOST, server.port, timeout=60)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name + "{"))


def _eventually(condition: Callable[[], bool], timeout_s: float = 30) -> bool:
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.1)
    return False
