# SPDX-License-Identifier: Apache-2.0
"""What agents send and get: tools, reasoning, schemas and every API, with V4's own text forced on a
tiny model. Where an engine surprises, the test says so and docs/reliability.md tells users."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from served import SGLANG, VLLM, Engine, Server
from tokenizers import Tokenizer

from tests.support import forced, sglang_engine, vllm_engine
from tests.support.comparison import ROOT

CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"
EOS_ID = 1
COMMAND = "a<b && c>d 2>&1"
SHELL = {"type": "object", "properties": {"cmd": {"type": "string"}}, "required": ["cmd"]}
ADD = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "number"}}, "required": ["a", "b"]}
TOOLS = [
    {"type": "function", "function": {"name": "sh", "description": "", "parameters": SHELL}},
    {"type": "function", "function": {"name": "add", "description": "", "parameters": ADD}},
]
ONE, TWO = [("sh", {"cmd": COMMAND})], [("sh", {"cmd": COMMAND}), ("add", {"a": 1, "b": 2.5})]
THINKING, CHATTING = ({"chat_template_kwargs": {"thinking": on}} for on in (True, False))
USER = [{"role": "user", "content": "Hi"}]


def written(calls: list[tuple[str, dict[str, Any]]]) -> str:
    """How V4 writes tool calls. Source: the released encoding."""
    lines = ["\n\n<｜DSML｜tool_calls>"]
    for name, arguments in calls:
        lines.append(f'<｜DSML｜invoke name="{name}">')
        for key, value in arguments.items():
            text = value if isinstance(value, str) else json.dumps(value)
            kind = "true" if isinstance(value, str) else "false"
            lines.append(f'<｜DSML｜parameter name="{key}" string="{kind}">{text}</｜DSML｜parameter>')
        lines.append("</｜DSML｜invoke>")
    return "\n".join([*lines, "</｜DSML｜tool_calls>"])


class Agent:
    """A server whose model writes what it is told to."""

    def __init__(self, engine: Engine, server: Server, folder: Path, script: Path) -> None:
        self.name, self.server, self.script = engine.name, server, script
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def ask(self, route: str, text: str, **body: Any) -> Any:
        """The answer to `body`, while the model writes `text`."""
        self.write(text)
        return self.server.post(route, {"model": "tiny", "temperature": 0, **body})

    def stream(self, route: str, text: str, **body: Any) -> list[dict[str, Any]]:
        self.write(text)
        with self.server.open(route, {"model": "tiny", "temperature": 0, "stream": True, **body}) as response:
            lines = [line[6:].strip() for line in response if line.startswith(b"data: ")]
        return [json.loads(line) for line in lines if line != b"[DONE]"]

    def write(self, text: str) -> None:
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        self.script.write_text(json.dumps([*ids, EOS_ID]))

    def chat(self, text: str, **body: Any) -> tuple[dict[str, Any], str]:
        """(message, finish reason) of a chat."""
        choice = self.ask(CHAT, text, **{"messages": USER, "max_tokens": 400, **body})["choices"][0]
        return choice["message"], choice["finish_reason"]

    def prompt(self, messages: list[dict[str, Any]], **body: Any) -> str:
        """What a chat is encoded to."""
        ids = self.server.post("/tokenize", {"model": "tiny", "messages": messages, **body})["tokens"]
        return str(self.tokenizer.decode(ids, skip_special_tokens=False))


@pytest.fixture(scope="module", params=[VLLM, SGLANG], ids=lambda engine: engine.name)
def agent(
    request: pytest.FixtureRequest, tiny_flash: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Agent]:
    engine: Engine = request.param
    folder = tmp_path_factory.mktemp("agent")
    script = folder / "forced.json"
    script.write_text("[]")
    variables = {forced.VARIABLE: str(script)}
    if engine is VLLM:
        command = engine.command(tiny_flash, "--logits-processors", "tests.support.vllm_forced:ForcedText")
        env = vllm_engine.environment(**variables)
        env["PYTHONPATH"] = ":".join(filter(None, (str(ROOT), env.get("PYTHONPATH"))))
    else:
        command = engine.command(tiny_flash, "--context-length", "4096")
        env = sglang_engine.environment(**variables)
        env |= sglang_engine.install_plugin(folder, "tests.support.sglang_forced", env.get("PYTHONPATH", ""))
    with Server(command, env) as server:
        yield Agent(engine, server, tiny_flash, script)


def calls(message: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in message.get("tool_calls") or []]


def reasoning(message: dict[str, Any]) -> str | None:
    return message.get("reasoning") or message.get("reasoning_content")


long = pytest.mark.long

# ---- tools ------------------------------------------------------------------------------------


@long
@pytest.mark.parametrize("tool_choice", [None, "auto"])
def test_auto_parses_one_call_behind_reasoning_and_text(agent: Agent, tool_choice: str | None) -> None:
    choice = {} if tool_choice is None else {"tool_choice": tool_choice}
    message, finish = agent.chat("T.</think>Sure." + written(ONE), tools=TOOLS, **choice, **THINKING)
    assert (calls(message), finish, reasoning(message)) == (ONE, "tool_calls", "T.")
    assert message["content"].strip() == "Sure."


def test_streamed_parallel_calls_hold_what_a_shell_needs(agent: Agent) -> None:
    events = agent.stream(CHAT, "T.</think>" + written(TWO), messages=USER, max_tokens=400, tools=TOOLS, **THINKING)
    names: dict[int, str] = {}
    arguments: dict[int, str] = {}
    thought, finish = "", None
    for choice in (event["choices"][0] for event in events if event["choices"]):
        thought += reasoning(choice["delta"]) or ""
        finish = choice["finish_reason"] or finish
        for call in choice["delta"].get("tool_calls") or []:
            index, function = call["index"], call["function"]
            names[index] = names.get(index, "") + (function.get("name") or "")
            arguments[index] = arguments.get(index, "") + (function.get("arguments") or "")
    assert [(names[i], json.loads(arguments[i])) for i in sorted(names)] == TWO
    assert (thought, finish) == ("T.", "tool_calls")


@long
def test_without_parallel_calls_vllm_keeps_the_first_and_sglang_all(agent: Agent) -> None:
    message, _ = agent.chat("T.</think>" + written(TWO), tools=TOOLS, parallel_tool_calls=False, **THINKING)
    assert calls(message) == (ONE if agent.name == "vllm" else TWO)


def test_none_hides_a_call_on_vllm_and_shows_raw_text_on_sglang(agent: Agent) -> None:
    message, finish = agent.chat("T.</think>Sure." + written(ONE), tools=TOOLS, tool_choice="none", **THINKING)
    assert (calls(message), finish, reasoning(message)) == ([], "stop", "T.")
    assert message["content"] == ("Sure.\n\n" if agent.name == "vllm" else "Sure." + written(ONE))
    # vLLM still tells the model of the tools.
    told = {agent.name: "tool_calls" in agent.prompt(USER, tools=TOOLS, tool_choice="none", **THINKING)}
    assert told == {agent.name: agent.name == "vllm"}


@long
@pytest.mark.parametrize("thinking", [THINKING, CHATTING], ids=["thinking", "chat"])
def test_required_gives_calls(agent: Agent, thinking: dict[str, Any]) -> None:
    before = "T.</think>" if thinking is THINKING else ""
    message, finish = agent.chat(before + written(TWO), tools=TOOLS, tool_choice="required", **thinking)
    assert (calls(message), finish) == (TWO, "tool_calls")


@long
def test_required_does_not_let_text_through(agent: Agent) -> None:
    """A grammar of V4's own calls: what the model would rather write is not written."""
    message, _ = agent.chat("No, thanks.", tools=TOOLS, tool_choice="required", max_tokens=40, **CHATTING)
    assert not message["content"]


@long
@pytest.mark.parametrize("thinking", [THINKING, CHATTING], ids=["thinking", "chat"])
def test_a_named_tool_is_called(agent: Agent, thinking: dict[str, Any]) -> None:
    """vLLM finishes with `stop`, as OpenAI does, SGLang with `tool_calls`."""
    before = "T.</think>" if thinking is THINKING else ""
    named = {"type": "function", "function": {"name": "sh"}}
    message, finish = agent.chat(before + written(ONE), tools=TOOLS, tool_choice=named, **thinking)
    assert calls(message) == ONE
    assert finish == ("stop" if agent.name == "vllm" else "tool_calls")


# ---- schemas and reasoning --------------------------------------------------------------------

SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}
FORMAT = {"type": "json_schema", "json_schema": {"name": "s", "strict": True, "schema": SCHEMA}}


def test_a_schema_binds_the_answer_and_leaves_thought_free(agent: Agent) -> None:
    message, finish = agent.chat('T {"n" }.</think>{"n": 5}', response_format=FORMAT, max_tokens=60, **THINKING)
    assert (message["content"], reasoning(message), finish) == ('{"n": 5}', 'T {"n" }.', "stop")
    message, _ = agent.chat("T.</think>No.", response_format=FORMAT, max_tokens=20, **THINKING)
    assert reasoning(message) == "T."
    assert message["content"].startswith("{")


HIGH, MAX = "Reasoning Effort: Absolute maximum", "Reasoning Effort: Beyond maximum"
NO_THOUGHT, LOW = "no thought", ""
EFFORTS = {
    "vllm": {
        None: HIGH, "none": NO_THOUGHT, "minimal": LOW, "low": LOW, "medium": LOW, "high": HIGH, "xhigh": HIGH, "max": MAX,
    },
    "sglang": {
        None: NO_THOUGHT, "none": NO_THOUGHT, "minimal": LOW, "low": LOW, "medium": HIGH, "high": HIGH, "xhigh": HIGH,
        "max": MAX,
    },
}  # fmt: skip


def test_every_effort_asks_for_what_it_says(agent: Agent) -> None:
    """Without one, vLLM thinks at `high` and SGLang not at all; `medium` is vLLM's low and SGLang's
    high."""
    lengths = {}
    for effort, want in EFFORTS[agent.name].items():
        body = {} if effort is None else {"reasoning_effort": effort}
        answer = agent.ask(CHAT, "T.</think>ok", messages=USER, max_tokens=20, **body)
        message = answer["choices"][0]["message"]
        thought = (None, "T.ok") if want == NO_THOUGHT else ("T.", "ok")
        assert (reasoning(message), message["content"]) == thought, effort
        lengths[effort] = (want, answer["usage"]["prompt_tokens"])
    plain = len(
        agent.tokenizer.encode("<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜><think>", add_special_tokens=False)
    )
    by_kind = dict(lengths.values())
    assert set(lengths.values()) == set(by_kind.items())
    assert by_kind[LOW] == by_kind[NO_THOUGHT] == plain
    assert plain < by_kind[HIGH] < by_kind[MAX]


def history(field: str) -> list[dict[str, Any]]:
    call = {"id": "c1", "type": "function", "function": {"name": "sh", "arguments": json.dumps({"cmd": COMMAND})}}
    return [
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": None, field: "why", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "out"},
    ]


def test_history_is_v4s_text_and_its_reasoning_needs_the_engines_own_field(agent: Agent) -> None:
    """With tools, V4 keeps the reasoning of earlier turns. vLLM reads `reasoning` and drops
    `reasoning_content`; SGLang reads `reasoning_content` and drops `reasoning`."""
    kept = {f: agent.prompt(history(f), tools=TOOLS, **THINKING) for f in ("reasoning", "reasoning_content")}
    own, other = ("reasoning", "reasoning_content") if agent.name == "vllm" else ("reasoning_content", "reasoning")
    end = "<｜end▁of▁sentence｜><｜User｜><tool_result>out</tool_result><｜Assistant｜><think>"
    assert kept[own].endswith(f"<｜User｜>Q<｜Assistant｜><think>why</think>{written(ONE)}{end}")
    assert kept[other].endswith(f"<｜User｜>Q<｜Assistant｜><think></think>{written(ONE)}{end}")


def test_a_developer_message_is_moved_or_lost(agent: Agent) -> None:
    """SGLang makes every one a system message at the front. vLLM, thinking without tools, loses
    those before the last user turn, as V4's encoding drops them with the thoughts of old turns."""
    say = lambda role: {"role": role, "content": role.upper()}  # noqa: E731
    front, middle = [say("developer"), say("user")], [say("user"), say("assistant"), say("developer"), say("user")]
    seen = {
        (where, name): agent.prompt(messages, **body)
        for where, messages in {"front": front, "middle": middle}.items()
        for name, body in {"chat": CHATTING, "thinking": THINKING, "tools": THINKING | {"tools": TOOLS}}.items()
    }
    lost = {key for key, prompt in seen.items() if "DEVELOPER" not in prompt}
    assert lost == ({("front", "thinking"), ("middle", "thinking")} if agent.name == "vllm" else set())
    chat = "<｜begin▁of▁sentence｜><｜User｜>USER<｜Assistant｜></think>ASSISTANT<｜end▁of▁sentence｜>"
    end = "<｜User｜>USER<｜Assistant｜></think>"
    moved = chat.replace("<｜User｜>", "DEVELOPER<｜User｜>") + end
    assert seen["middle", "chat"] == (f"{chat}<｜User｜>DEVELOPER{end}" if agent.name == "vllm" else moved)


# ---- other APIs -------------------------------------------------------------------------------

MESSAGE_TOOL = {"name": "sh", "description": "", "input_schema": SHELL}
RESPONSE_TOOL = {"type": "function", "name": "sh", "description": "", "parameters": SHELL}


def test_messages(agent: Agent) -> None:
    """vLLM thinks unless told not to, SGLang where told to."""
    body = {"max_tokens": 1100, "messages": USER, "thinking": {"type": "enabled", "budget_tokens": 1024}}
    answer = agent.ask(MESSAGES, "T.</think>Sure." + written(ONE), tools=[MESSAGE_TOOL], **body)
    found = {block["type"]: block for block in answer["content"]}
    assert (found["thinking"]["thinking"], found["text"]["text"].strip()) == ("T.", "Sure.")
    assert (found["tool_use"]["name"], found["tool_use"]["input"]) == ONE[0]
    assert answer["stop_reason"] == "tool_use"


def test_messages_think_by_default_on_vllm_alone(agent: Agent) -> None:
    answer = agent.ask(MESSAGES, "T.</think>ok", max_tokens=20, messages=USER)
    texts = [(block["type"], block.get("thinking") or block.get("text")) for block in answer["content"]]
    assert texts == ([("thinking", "T."), ("text", "ok")] if agent.name == "vllm" else [("text", "T.ok")])


@long
def test_streamed_messages(agent: Agent) -> None:
    events = agent.stream(MESSAGES, "</think>" + written(ONE), max_tokens=400, messages=USER, tools=[MESSAGE_TOOL])
    pieces = [e["delta"]["partial_json"] for e in events if e.get("delta", {}).get("type") == "input_json_delta"]
    assert len(pieces) > 1
    assert json.loads("".join(pieces)) == {"cmd": COMMAND}
    assert [e["delta"]["stop_reason"] for e in events if e["type"] == "message_delta"] == ["tool_use"]


def test_responses(agent: Agent) -> None:
    body = {"input": "Hi", "max_output_tokens": 400, "reasoning": {"effort": "high"}}
    answer = agent.ask(RESPONSES, "T.</think>Sure." + written(ONE), tools=[RESPONSE_TOOL], **body)
    found = {item["type"]: item for item in answer["output"]}
    assert found["reasoning"]["content"][0]["text"] == "T."
    assert found["message"]["content"][0]["text"].strip() == "Sure."
    assert (found["function_call"]["name"], json.loads(found["function_call"]["arguments"])) == ONE[0]
    assert answer["status"] == "completed"


@long
def test_streamed_responses(agent: Agent) -> None:
    body = {"input": "Hi", "max_output_tokens": 400, "tools": [RESPONSE_TOOL], "reasoning": {"effort": "high"}}
    events = agent.stream(RESPONSES, "T.</think>" + written(ONE), **body)
    done = [e["arguments"] for e in events if e["type"] == "response.function_call_arguments.done"]
    pieces = [e["delta"] for e in events if e["type"] == "response.function_call_arguments.delta"]
    assert [json.loads(arguments) for arguments in done] == [{"cmd": COMMAND}]
    assert "".join(pieces) == done[0]
    assert events[-1]["type"] == "response.completed"
