# SPDX-License-Identifier: Apache-2.0
"""Nothing that a client can send ends a server: every answer is 2xx or a clear 4xx, and the next
plain request is answered as before."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from served import SGLANG, VLLM, Engine, Server

from tests.support import sglang_engine, vllm_engine

ROUTES = {
    "vllm": ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages", "/tokenize", "/detokenize"),
    "sglang": ("/generate", "/v1/completions", "/v1/chat/completions", "/v1/responses", "/tokenize", "/detokenize"),
}
# What an engine answers with 500 for any model, as it was seen here; the server goes on.
KNOWN_500: dict[str, tuple[str, ...]] = {"vllm": (), "sglang": ()}
VOCABULARY = 512


@pytest.fixture(scope="module", params=[VLLM, SGLANG], ids=lambda engine: engine.name)
def served(request: pytest.FixtureRequest, tiny_flash: Path) -> Iterator[tuple[Engine, Server]]:
    engine: Engine = request.param
    harness, args = (vllm_engine, ()) if engine is VLLM else (sglang_engine, ("--disable-radix-cache",))
    with Server(engine.command(tiny_flash, *args), harness.environment()) as server:
        yield engine, server


def ask(server: Server, route: str, body: Any) -> tuple[int, str]:
    data = json.dumps(body).encode()
    request = urllib.request.Request(server.url + route, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            return response.status, response.read().decode(errors="replace")
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode(errors="replace")


def plain(engine: Engine, server: Server) -> list[float]:
    return engine.prompt_logprobs(server, [5, 6, 7, 8, 9])


@pytest.mark.parametrize("token", [VOCABULARY, 10**6, -1, 2**31, 2**63], ids=str)
def test_a_token_id_that_is_none_is_refused(served: tuple[Engine, Server], token: int) -> None:
    engine, server = served
    before = plain(engine, server)
    bodies = [("/v1/completions", {"model": "tiny", "prompt": [5, token, 7], "max_tokens": 1})]
    if engine is SGLANG:
        bodies.append(("/generate", {"input_ids": [5, token, 7], "sampling_params": {"max_new_tokens": 1}}))
    for route, body in bodies:
        status, answer = ask(server, route, body)
        assert 400 <= status < 500, (status, answer)
        assert answer
    assert plain(engine, server) == before


def test_embeddings_as_input_are_refused(served: tuple[Engine, Server]) -> None:
    engine, server = served
    before = plain(engine, server)
    rows = [[0.0] * 256] * 3
    if engine is SGLANG:
        status, answer = ask(server, "/generate", {"input_embeds": rows, "sampling_params": {"max_new_tokens": 1}})
        assert "send input_ids" in answer
    else:
        status, answer = ask(server, "/v1/completions", {"model": "tiny", "prompt_embeds": "AAAA", "max_tokens": 1})
    assert status == 400, (status, answer)
    assert plain(engine, server) == before


@pytest.mark.parametrize("route", ["/v1/completions", "/generate"])
def test_a_prompt_without_a_token_ends_nothing(served: tuple[Engine, Server], route: str) -> None:
    engine, server = served
    if route not in ROUTES[engine.name]:
        route = "/v1/chat/completions"
    before = plain(engine, server)
    for empty in ("", []):
        body = {"/generate": {"text" if empty == "" else "input_ids": empty}}.get(route, {"prompt": empty})
        status, answer = ask(server, route, {"model": "tiny", **body})
        assert 200 <= status < 500, (status, answer)
    assert plain(engine, server) == before


# ---- the sweep ------------------------------------------------------------------------------

LEAVES = st.one_of(
    st.none(), st.booleans(), st.sampled_from([0, 1, -1, 2, 511, 512, 2**31, 2**63, 1e-30, 1e30, -0.5]),
    st.sampled_from(["", "tiny", "a", "text", "\x00", "\ud83d\ude00", "<｜User｜>", "{", "auto", "none", "x" * 400]),
)  # fmt: skip
ANYTHING = st.recursive(
    LEAVES, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.sampled_from("abc"), v, max_size=2), max_leaves=4
)
PROMPTS = st.one_of(
    st.lists(st.integers(0, VOCABULARY - 1), max_size=12), st.sampled_from(["", "one two", "<think>"]), ANYTHING
)
# Fields by name whose large values ask for work, not for trouble.
SMALL = {
    "max_tokens": st.sampled_from([-1, 0, 1, 3, 10**9, None]),
    "max_completion_tokens": st.sampled_from([-1, 0, 1, 3, 10**9]),
    "max_output_tokens": st.sampled_from([-1, 0, 1, 3, 10**9]),
    "max_new_tokens": st.sampled_from([-1, 0, 1, 3, 10**9]),
    "min_tokens": st.sampled_from([-1, 0, 1, 3]),
    "n": st.sampled_from([-1, 0, 1, 2]),
    "best_of": st.sampled_from([-1, 0, 1, 2]),
    "model": st.sampled_from(["tiny", "tiny", "tiny", "other"]),
    "prompt": PROMPTS,
    "input_ids": PROMPTS,
    "background": st.just(False),
}
# A free-form object in SGLang's schema.
SAMPLING = {
    **{name: st.sampled_from([0, 1, -1, 0.5, 2, 1e9, -1e9, "a", None]) for name in (
        "temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty",
        "sampling_seed",
    )},
    **{name: st.sampled_from(["", "(", "a+", "{", '{"type": "object"}', "root ::= \"a\"", 3, None]) for name in (
        "regex", "json_schema", "ebnf", "structural_tag",
    )},
    "max_new_tokens": SMALL["max_new_tokens"],
    "min_new_tokens": SMALL["min_tokens"],
    "n": SMALL["n"],
    "stop": st.sampled_from(["", "a", ["a", ""], [], 3]),
    "stop_token_ids": st.lists(st.sampled_from([0, 1, 511, 512, -1, 2**31]), max_size=2),
    "logit_bias": st.dictionaries(st.sampled_from(["0", "511", "512", "-1", "x"]), st.sampled_from([0, 1e9, "a"])),
    "ignore_eos": st.booleans(),
    "custom_params": ANYTHING,
}  # fmt: skip
SMALL["sampling_params"] = st.one_of(
    ANYTHING,
    st.lists(st.sampled_from(sorted(SAMPLING)), max_size=4, unique=True).flatmap(
        lambda names: st.fixed_dictionaries({"max_new_tokens": st.just(2)} | {name: SAMPLING[name] for name in names})
    ),
)


def strategy(schema: Any, defs: dict[str, Any], name: str = "", depth: int = 0) -> st.SearchStrategy[Any]:
    """Values of a JSON schema, mostly; one in eight is anything at all."""
    if name in SMALL:
        return SMALL[name]
    return st.integers(0, 7).flatmap(lambda i: ANYTHING if i == 7 else _of(schema, defs, depth))


def _of(schema: Any, defs: dict[str, Any], depth: int) -> st.SearchStrategy[Any]:
    if not isinstance(schema, dict) or depth > 4:
        return ANYTHING
    if "$ref" in schema:
        return _of(defs.get(schema["$ref"].rsplit("/", 1)[1], {}), defs, depth + 1)
    for key in ("anyOf", "oneOf", "allOf"):
        if schema.get(key):
            return st.one_of([_of(each, defs, depth + 1) for each in schema[key]])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if "const" in schema:
        return st.just(schema["const"])
    kind = schema.get("type")
    if kind == "object" and schema.get("properties"):
        properties = schema["properties"]
        required = {
            k: strategy(properties[k], defs, k, depth + 1) for k in schema.get("required", ()) if k in properties
        }
        optional = [k for k in properties if k not in required]
        some = st.lists(st.sampled_from(optional), max_size=4, unique=True) if optional else st.just([])
        return some.flatmap(
            lambda names: st.fixed_dictionaries(
                required | {k: strategy(properties[k], defs, k, depth + 1) for k in names}
            )
        )
    if kind == "array":
        return st.lists(_of(schema.get("items", {}), defs, depth + 1), max_size=3)
    return {
        "integer": st.sampled_from([0, 1, -1, 2, 5, 511, 512, 2**31, 2**63]),
        "number": st.sampled_from([0, 1, -1, 0.5, 1e-9, 1e9, 2.0]),
        "boolean": st.booleans(),
        "string": st.sampled_from(["", "tiny", "a", "text", "\x00", "<｜User｜>", "{", "auto", "none"]),
        "null": st.none(),
    }.get(kind, ANYTHING)


@pytest.mark.parametrize("number", range(6))
def test_whatever_is_sent_the_server_goes_on(
    served: tuple[Engine, Server], number: int, pytestconfig: pytest.Config
) -> None:
    engine, server = served
    route = ROUTES[engine.name][number]
    api = server.get("/openapi.json")
    content = api["paths"].get(route, {}).get("post", {}).get("requestBody", {}).get("content", {})
    schema = content.get("application/json", {}).get("schema", {})
    defs = api.get("components", {}).get("schemas", {})
    before = plain(engine, server)
    bad: list[tuple[int, str, str]] = []

    @settings(
        max_examples=pytestconfig.getoption("--requests"), deadline=None, derandomize=True, database=None,
        phases=[Phase.generate], suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(body=_of(schema, defs, 0))
    def sweep(body: Any) -> None:
        if isinstance(body, dict) and route in ("/v1/completions", "/v1/chat/completions"):
            body.setdefault("max_tokens", 2)
        status, answer = ask(server, route, body)
        if not (200 <= status < 500 and answer) and not any(words in answer for words in KNOWN_500[engine.name]):
            bad.append((status, answer[:300], json.dumps(body)[:600]))
        assert server.process.poll() is None, f"{json.dumps(body)} ended the server\n{server.log()[-6000:]}"

    sweep()
    assert plain(engine, server) == before
    assert not bad, "\n".join(map(str, bad[:20]))
