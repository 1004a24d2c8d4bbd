# SPDX-License-Identifier: Apache-2.0
"""A server in a process of its own, on loopback: started, waited for, asked, and stopped. For
demos, tests, benchmarks."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HOST = "127.0.0.1"
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
# A machine without a GPU: eager mode, and a KV pool of a size instead of a share of all memory.
VLLM_CPU_ARGS = (
    "--enforce-eager",
    "--kv-cache-memory-bytes",
    str(512 << 20),
    "--max-model-len",
    "4096",
    "--max-num-seqs",
    "16",
)
VLLM_CHAT_ARGS = (
    "--tokenizer-mode",
    "deepseek_v4",
    "--tool-call-parser",
    "deepseek_v4",
    "--enable-auto-tool-choice",
    "--reasoning-parser",
    "deepseek_v4",
)

SGLANG_CPU_ARGS = (
    "--device",
    "cpu",
    "--context-length",
    "1200",
    "--max-running-requests",
    "16",
    "--max-total-tokens",
    "32768",
    "--swa-full-tokens-ratio",
    "0.5",
    "--chunked-prefill-size",
    "512",
)
SGLANG_CHAT_ARGS = ("--tool-call-parser", "deepseekv4", "--reasoning-parser", "deepseek-v4")


# A request's new tokens and their log-probabilities.
Generated = tuple[list[int], list[float]]


def free_port() -> int:
    with socket.socket() as s:
        s.bind((HOST, 0))
        return int(s.getsockname()[1])


def vllm_serve(folder: str | Path, *args: str, dtype: str = "float32") -> list[str]:
    """The `vllm serve` command line for a tiny checkpoint, with the executable of this
    environment."""
    return [
        str(Path(sys.executable).with_name("vllm")),
        "serve",
        str(folder),
        "--dtype",
        dtype,
        *VLLM_CPU_ARGS,
        *VLLM_CHAT_ARGS,
        *args,
    ]


def sglang_serve(folder: str | Path, *args: str, dtype: str = "float32") -> list[str]:
    """The `sglang serve` command line for a tiny checkpoint, with the executable of this
    environment."""
    sglang = str(Path(sys.executable).with_name("sglang"))
    return [sglang, "serve", "--model-path", str(folder), "--dtype", dtype, *SGLANG_CPU_ARGS, *SGLANG_CHAT_ARGS, *args]


class Server:
    """`with Server(command) as server:`; the command gets --host and --port. Its log is kept in a
    temporary file."""

    def __init__(
        self,
        command: Sequence[str],
        env: dict[str, str] | None = None,
        ready_timeout_s: float = 240,
        health: str = "/health",
    ) -> None:
        self.port = free_port()
        self.url = f"http://{HOST}:{self.port}"
        self.command = [*command, "--host", HOST, "--port", str(self.port)]
        self.env = os.environ | OFFLINE | (env or {})
        self.ready_timeout_s, self.health = ready_timeout_s, health
        self.ready_s = 0.0

    def __enter__(self) -> Server:
        self.start()
        try:
            self.wait_ready()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        if self.process.poll() is None:
            self.stop()
        self._log.close()

    def start(self) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  closed in __exit__
        self.started = time.monotonic()
        # Its own process group, so that nothing it starts outlives a failed test.
        self.process = subprocess.Popen(
            self.command, stdout=self._log, stderr=subprocess.STDOUT, env=self.env, start_new_session=True
        )

    def wait_ready(self) -> None:
        """Return once `health` answers. Raises RuntimeError with the log's end when the server ends
        or stays silent."""
        while time.monotonic() - self.started < self.ready_timeout_s:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with exit code {self.process.returncode}:\n{self.log()[-6000:]}")
            try:
                with urllib.request.urlopen(self.url + self.health, timeout=2):
                    self.ready_s = time.monotonic() - self.started
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        self.kill()
        raise RuntimeError(f"the server was not ready after {self.ready_timeout_s:.0f} s:\n{self.log()[-6000:]}")

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=60) as response:
            body = response.read()
        return json.loads(body) if body else None

    def post(self, path: str, body: dict[str, Any]) -> Any:
        with self.open(path, body) as response:
            return json.load(response)

    def open(self, path: str, body: dict[str, Any]) -> Any:
        """The response itself, for streams."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        return urllib.request.urlopen(request, timeout=300)

    def log(self) -> str:
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    def stop(self, timeout_s: float = 60) -> int:
        """SIGTERM to the server alone, as an orchestrator would; returns its exit code. Kills the
        group after `timeout_s`."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    def kill(self) -> None:
        if self.group_is_alive():
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def group_is_alive(self) -> bool:
        """Whether any process the server started is still there."""
        try:
            os.killpg(self.process.pid, 0)
        except ProcessLookupError:
            return False
        return True


def _vllm_logprobs(server: Server, ids: list[int]) -> list[float]:
    body = {"model": "tiny", "prompt": ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
    entries = server.post("/v1/completions", body)["choices"][0]["prompt_logprobs"]
    return [entry[str(token)]["logprob"] for token, entry in zip(ids[1:], entries[1:], strict=True)]


def _sglang_logprobs(server: Server, ids: list[int]) -> list[float]:
    body = {
        "input_ids": ids,
        "sampling_params": {"max_new_tokens": 1, "temperature": 0},
        "return_logprob": True,
        "logprob_start_len": 0,
    }
    return [logprob for logprob, _, _ in server.post("/generate", body)["meta_info"]["input_token_logprobs"][1:]]


def _vllm_generate(server: Server, prompts: list[list[int]], new: int) -> list[Generated]:
    body = {"model": "tiny", "prompt": prompts, "max_tokens": new, "temperature": 0, "ignore_eos": True}
    choices = server.post("/v1/completions", body | {"logprobs": 0, "return_token_ids": True})["choices"]
    return [(c["token_ids"], c["logprobs"]["token_logprobs"]) for c in sorted(choices, key=lambda c: c["index"])]


def _sglang_generate(server: Server, prompts: list[list[int]], new: int) -> list[Generated]:
    sampling = {"max_new_tokens": new, "temperature": 0, "ignore_eos": True}
    body = {"input_ids": prompts, "sampling_params": sampling, "return_logprob": True}
    answers = [a["meta_info"]["output_token_logprobs"] for a in server.post("/generate", body)]
    return [([token for _, token, _ in answer], [logprob for logprob, _, _ in answer]) for answer in answers]


@dataclass(frozen=True)
class Engine:
    """How an engine is started, with a checkpoint's folder and further arguments, and asked for a
    prompt's log-probabilities, or to continue several prompts at once."""

    name: str
    serve: Callable[..., list[str]]
    prompt_logprobs: Callable[[Server, list[int]], list[float]]
    generate: Callable[[Server, list[list[int]], int], list[Generated]]

    def command(self, folder: str | Path, *args: str) -> list[str]:
        return self.serve(folder, "--served-model-name", "tiny", *args)


VLLM = Engine("vllm", vllm_serve, _vllm_logprobs, _vllm_generate)
SGLANG = Engine("sglang", sglang_serve, _sglang_logprobs, _sglang_generate)
