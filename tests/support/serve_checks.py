# SPDX-License-Identifier: Apache-2.0
"""What an engine's server must do, as users run it: every endpoint, concurrency, a client that
leaves, and SIGTERM."""

from __future__ import annotations

import http.client
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from served import HOST, Engine, Server
from tokenizers import Tokenizer

from dsv4.proof.status import ServerStatus
from tests.support.comparison import TOLERANCE, Oracle, clean_environment

CHAT = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "Name a number."}],
    "max_tokens": 12,
    "temperature": 0,
    "ignore_eos": True,
}


def serve_until_sigterm(command: list[str], env: dict[str, str]) -> Iterator[Server]:
    """A server for all tests of a module; after them SIGTERM must end it with exit code 0 and leave
    no process behind."""
    with Server(command, env) as server:
        yield server
        server.process.send_signal(signal.SIGTERM)
        code = server.process.wait(60)
        assert _eventually(lambda: not server.group_is_alive())
        assert code == 0, server.log()[-3000:]


class ServeChecks:
    """A module inherits these tests, says how its engine spells things, and has a `server`
    fixture."""

    engine: Engine
    model_class: str
    attention_backends: tuple[str, ...]
    quant_method: str
    running_requests: str  # the metric

    def test_models_lists_the_served_name(self, server: Server) -> None:
        assert [m["id"] for m in server.get("/v1/models")["data"]] == ["tiny"]

    def test_status_proves_that_dsv4_serves(self, server: Server) -> None:
        status = ServerStatus.from_json(server.get("/dsv4/status"))
        assert status.engine == self.engine.name
        worker = status.workers[0]
        assert worker.model_class == self.model_class
        assert worker.attention_backends == self.attention_backends
        assert worker.quant_method == self.quant_method

    def test_the_log_says_who_serves_and_why(self, server: Server) -> None:
        """With the engine's default settings: who serves V4, and which implementation each operator
        got."""
        self.engine.prompt_logprobs(server, [5, 6, 7])
        lines = server.log().splitlines()
        assert [line for line in lines if line.endswith("dsv4: native V4 does not run on cpu: dsv4 serves")]
        assert [
            line
            for line in lines
            if "dsv4: attention.sparse on cpu is served by reference (triton: no accelerator)" in line
        ]

    def test_doctor_proves_it_from_the_server(self, server: Server) -> None:
        """`dsv4 doctor --url` as a user runs it: exit 0 and the classes that the workers told."""
        doctor = [str(Path(sys.executable).with_name("dsv4")), "doctor", "--url", server.url, "--json"]
        done = subprocess.run(doctor, capture_output=True, text=True, env=clean_environment(), timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
        assert all(name in done.stdout for name in (self.model_class, *self.attention_backends)), done.stdout

    def test_prompt_logprobs_equal_hf(self, server: Server, flash_oracle: Oracle, flash_text: list[int]) -> None:
        ids = flash_text[:300]
        want, _ = flash_oracle(ids)
        got = self.engine.prompt_logprobs(server, ids)
        assert max(abs(g - float(w)) for g, w in zip(got, want, strict=True)) <= TOLERANCE

    def test_completion_streams_what_it_returns_at_once(self, server: Server) -> None:
        body = {"model": "tiny", "prompt": "one two three", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
        whole = server.post("/v1/completions", body)
        events = _events(server, "/v1/completions", body)
        assert "".join(e["choices"][0]["text"] for e in events if e["choices"]) == whole["choices"][0]["text"]
        assert whole["usage"]["completion_tokens"] == 12

    def test_chat_streams_what_it_returns_at_once(self, server: Server) -> None:
        whole = server.post("/v1/chat/completions", CHAT)["choices"][0]["message"]
        deltas = [e["choices"][0]["delta"] for e in _events(server, "/v1/chat/completions", CHAT) if e["choices"]]
        texts = {field: whole.get(field) or "" for field in ("content", "reasoning", "reasoning_content")}
        for field, text in texts.items():
            assert "".join(d.get(field) or "" for d in deltas) == text
        assert any(texts.values())

    def test_chat_prompt_is_v4s_encoding(self, server: Server, tiny_flash: Path) -> None:
        """BOS, the user turn, the assistant turn with thinking opened or closed: what is tokenised,
        and what a chat is charged for."""
        tokenizer = Tokenizer.from_file(str(tiny_flash / "tokenizer.json"))

        def prompt(thinking: bool) -> str:
            kwargs = {"chat_template_kwargs": {"thinking": thinking}}
            ids = server.post("/tokenize", {"model": "tiny", "messages": CHAT["messages"], **kwargs})["tokens"]
            assert server.post("/v1/chat/completions", CHAT | kwargs)["usage"]["prompt_tokens"] == len(ids)
            return tokenizer.decode(ids, skip_special_tokens=False)

        assert prompt(thinking=False) == "<｜begin▁of▁sentence｜><｜User｜>Name a number.<｜Assistant｜></think>"
        assert prompt(thinking=True).endswith("<｜User｜>Name a number.<｜Assistant｜><think>")

    def test_chat_with_tools_is_accepted(self, server: Server) -> None:
        tool = {
            "type": "function",
            "function": {"name": "add", "description": "", "parameters": {"type": "object", "properties": {}}},
        }
        choice = server.post("/v1/chat/completions", {**CHAT, "tools": [tool]})["choices"][0]
        assert choice["finish_reason"] in ("length", "stop", "tool_calls")

    def test_sixteen_clients_get_what_one_gets(self, server: Server) -> None:
        """Greedy tokens do not depend on who else is served. Prompts of different lengths, each
        asked alone and in the crowd."""
        common = {"model": "tiny", "max_tokens": 10, "temperature": 0, "ignore_eos": True}
        bodies = [common | {"prompt": [3 + (7 * i + j) % 250 for j in range(5 + 17 * i)]} for i in range(16)]
        ask = lambda body: server.post("/v1/completions", body)["choices"][0]["text"]  # noqa: E731
        with ThreadPoolExecutor(16) as pool:
            crowd = list(pool.map(ask, bodies))
        alone = [ask(body) for body in bodies]
        assert sum(a != c for a, c in zip(alone, crowd, strict=True)) <= 1  # one near-tie may fall either way

    def test_a_client_that_leaves_frees_its_request(self, server: Server) -> None:
        connection = http.client.HTTPConnection(HOST, server.port, timeout=60)
        body = {
            "model": "tiny",
            "prompt": "long",
            "max_tokens": 1000,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        response.read(200)
        response.close()
        connection.close()
        assert _eventually(lambda: gauge(server, self.running_requests) == 0)
        assert (
            server.post("/v1/completions", {"model": "tiny", "prompt": "next", "max_tokens": 2})["usage"][
                "completion_tokens"
            ]
            >= 1
        )


def _events(server: Server, path: str, body: dict) -> list[dict]:
    with server.open(path, {**body, "stream": True}) as response:
        lines = [line[6:].strip() for line in response if line.startswith(b"data: ")]
    assert lines[-1] == b"[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def gauge(server: Server, name: str) -> float:
    """A metric of the server, over all its labels."""
    connection = http.client.HTTPConnection(HOST, server.port, timeout=60)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    values = [float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name + "{")]
    assert values, f"/metrics does not tell {name}"
    return sum(values)


def _eventually(condition: Callable[[], bool], timeout_s: float = 30) -> bool:
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.1)
    return False
