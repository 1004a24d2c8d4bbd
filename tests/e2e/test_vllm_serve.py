# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` in its own process, as users run it: every endpoint, concurrency, a client that leaves, and SIGTERM."""

from __future__ import annotations

import http.client
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from served import HOST, Server, vllm_serve
from vllm_engine import TOLERANCE, Oracle, environment

CHAT = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "Name a number."}],
    "max_tokens": 12,
    "temperature": 0,
    "ignore_eos": True,
}


@pytest.fixture(scope="module")
def server(tiny_flash: Path) -> Iterator[Server]:
    with Server(vllm_serve(tiny_flash, "--served-model-name", "tiny"), environment()) as server:
        yield server


def _events(server: Server, path: str, body: dict) -> list[dict]:
    with server.open(path, {**body, "stream": True}) as response:
        lines = [line[6:].strip() for line in response if line.startswith(b"data: ")]
    assert lines[-1] == b"[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_models_lists_the_served_name(server: Server) -> None:
    assert [m["id"] for m in server.get("/v1/models")["data"]] == ["tiny"]


def test_status_proves_that_dsv4_serves(server: Server) -> None:
    status = server.get("/dsv4/status")
    assert status["engine"] == "vllm"
    worker = status["workers"][0]
    assert worker["model_class"] == "dsv4_vllm.model.DeepseekV4ForCausalLM"
    assert worker["attention_backends"] == ["DSV4_ENTRY", "DSV4_SUMMARY", "DSV4_WINDOW"]


def test_completion_logprobs_equal_hf(server: Server, flash_oracle: Oracle, flash_text: list[int]) -> None:
    ids = flash_text[:300]
    body = {"model": "tiny", "prompt": ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
    entries = server.post("/v1/completions", body)["choices"][0]["prompt_logprobs"][1:]
    want, _ = flash_oracle(ids)
    assert max(abs(e[str(t)]["logprob"] - float(w)) for e, t, w in zip(entries, ids[1:], want, strict=True)) <= TOLERANCE


def test_completion_streams_what_it_returns_at_once(server: Server) -> None:
    body = {"model": "tiny", "prompt": "one two three", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    whole = server.post("/v1/completions", body)
    events = _events(server, "/v1/completions", body)
    assert "".join(e["choices"][0]["text"] for e in events) == whole["choices"][0]["text"]
    assert whole["usage"]["completion_tokens"] == 12


def test_chat_streams_what_it_returns_at_once(server: Server) -> None:
    whole = server.post("/v1/chat/completions", CHAT)["choices"][0]["message"]
    deltas = [e["choices"][0]["delta"] for e in _events(server, "/v1/chat/completions", CHAT)]
    for field in ("content", "reasoning"):
        assert "".join(d.get(field) or "" for d in deltas) == (whole.get(field) or "")
    assert whole.get("content") or whole.get("reasoning")


def test_chat_prompt_is_v4s_encoding(server: Server) -> None:
    """The tokenizer mode renders V4's own format: BOS, the user turn, the assistant turn with thinking opened or closed."""

    def prompt(**extra: object) -> str:
        ids = server.post("/tokenize", {"model": "tiny", "messages": CHAT["messages"], **extra})["tokens"]
        return server.post("/detokenize", {"model": "tiny", "tokens": ids})["prompt"]

    closed = prompt(chat_template_kwargs={"thinking": False})
    assert closed == "<｜begin▁of▁sentence｜><｜User｜>Name a number.<｜Assistant｜></think>"
    assert prompt().endswith("<｜User｜>Name a number.<｜Assistant｜><think>")


def test_chat_with_tools_is_accepted(server: Server) -> None:
    tool = {"type": "function", "function": {"name": "add", "description": "", "parameters": {"type": "object", "properties": {}}}}
    choice = server.post("/v1/chat/completions", {**CHAT, "tools": [tool]})["choices"][0]
    assert choice["finish_reason"] in ("length", "stop", "tool_calls")


def test_sixteen_clients_get_what_one_gets(server: Server) -> None:
    """Greedy tokens do not depend on who else is served. Prompts of different lengths, each asked alone and in the crowd."""
    bodies = [
        {
            "model": "tiny",
            "prompt": [3 + (7 * i + j) % 250 for j in range(5 + 17 * i)],
            "max_tokens": 10,
            "temperature": 0,
            "ignore_eos": True,
        }
        for i in range(16)
    ]
    ask = lambda body: server.post("/v1/completions", body)["choices"][0]["text"]  # noqa: E731
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
    assert _eventually(lambda: _gauge(server, "vllm:num_requests_running") == 0)
    assert server.post("/v1/completions", {"model": "tiny", "prompt": "next", "max_tokens": 2})["usage"]["completion_tokens"] >= 1


def _gauge(server: Server, name: str) -> float:
    connection = http.client.HTTPConnection(HOST, server.port, timeout=60)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name + "{"))


def _eventually(condition: object, timeout_s: float = 20) -> bool:
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if condition():  # type: ignore[operator]
            return True
        time.sleep(0.1)
    return False


def test_sigterm_exits_0_without_orphans(tiny_flash: Path) -> None:
    with Server(vllm_serve(tiny_flash, "--served-model-name", "tiny"), environment()) as server:
        server.post("/v1/completions", {"model": "tiny", "prompt": "x", "max_tokens": 2})
        server.process.send_signal(signal.SIGTERM)
        code = server.process.wait(60)
        assert _eventually(lambda: not server.group_is_alive())
        assert code == 0, server.log()[-3000:]


def test_doctor_proves_it_from_the_server(server: Server) -> None:
    """`dsv4 doctor --url` as a user runs it: exit 0 and the classes that the workers told."""
    doctor = [str(Path(sys.executable).with_name("dsv4")), "doctor", "--url", server.url, "--json"]
    done = subprocess.run(doctor, capture_output=True, text=True, env=environment(), timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "dsv4_vllm.model.DeepseekV4ForCausalLM" in done.stdout
    assert "DSV4_WINDOW" in done.stdout
