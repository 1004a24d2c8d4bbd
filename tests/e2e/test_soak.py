# SPDX-License-Identifier: Apache-2.0
"""Some seconds of `make soak`: random traffic on a pool that is too small, after which nothing has
stayed behind. And what an engine does when a worker, its disk or its checkpoint goes away."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest
from served import SGLANG, VLLM, Engine, Server

from tests.support import soak
from tests.support.bad_checkpoints import copy

long = pytest.mark.long
ENGINES = pytest.mark.parametrize("engine", [pytest.param(VLLM, marks=long), SGLANG], ids=lambda engine: engine.name)
BOTH = pytest.mark.parametrize("engine", [VLLM, SGLANG], ids=lambda engine: engine.name)


@ENGINES
def test_random_traffic_leaves_nothing_behind(tiny_flash: Path, flash_text: list[int], engine: Engine) -> None:
    with soak.serve(engine, tiny_flash) as server:
        report = soak.soak(server, engine, flash_text, rounds=[3.0, 3.0, 3.0])
        assert server.stop() == 0
    assert not report.wrong, report.wrong
    assert report.compared > 0
    assert len(report.usages) == 3
    memory, descriptors = soak.growth(report)
    assert memory < soak.MEMORY_MIB
    assert descriptors <= 0


def test_growth_is_seen() -> None:
    """Of memory and descriptors; pages, requests and answers are asserted as they come."""
    report = soak.Report(usages=[soak.Usage(1000 + 20 * i, 150 + i, {}) for i in range(10)])
    memory, descriptors = soak.growth(report)
    assert memory > soak.MEMORY_MIB
    assert descriptors > 0


@long
@BOTH
def test_a_killed_worker_ends_the_server(tiny_flash: Path, engine: Engine) -> None:
    """The process that holds the model gets SIGKILL, as by the kernel where memory runs out.
    Requests fail, none hangs, and the server ends by itself."""
    with soak.serve(engine, tiny_flash) as server:
        engine.prompt_logprobs(server, [5, 6, 7])
        # Engines name their processes.
        names = {
            pid: Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            for pid in soak.processes(server)
        }
        (worker,) = [pid for pid, name in names.items() if "Worker" in name or "scheduler" in name]
        os.kill(worker, signal.SIGKILL)
        assert_ended_as_the_engine_does(wait_for_exit(server, engine, 60), engine)


def assert_ended_as_the_engine_does(code: int, engine: Engine) -> None:
    """vLLM 0.32.0 ends with exit code 0 when its engine died, SGLang with another."""
    assert (code == 0) == (engine is VLLM)


def wait_for_exit(server: Server, engine: Engine, seconds: float) -> int:
    """Exit code of a server that ends by itself while it is asked."""
    end = time.monotonic() + seconds
    while server.process.poll() is None and time.monotonic() < end:
        with suppress(OSError):  # URLError, HTTPError and timeouts are
            engine.prompt_logprobs(server, [5, 6, 7])
        time.sleep(0.2)
    assert server.process.poll() is not None, f"the server still runs after {seconds:.0f} s\n{server.log()[-3000:]}"
    return int(server.process.returncode)


@long
@BOTH
def test_a_checkpoint_that_changes_on_disk_changes_no_answer(tiny_flash: Path, tmp_path: Path, engine: Engine) -> None:
    """Weights are in memory: a served folder may be overwritten, cut short and removed."""
    folder = copy(tiny_flash, tmp_path / "served", lambda f: None)
    ids = list(range(5, 80))
    with soak.serve(engine, folder) as server:
        before = engine.prompt_logprobs(server, ids)
        for file in folder.glob("*.safetensors"):
            with file.open("r+b") as weights:  # in place: whoever maps the file sees it
                weights.write(b"\xff" * file.stat().st_size)
        assert engine.prompt_logprobs(server, ids) == before
        for file in folder.iterdir():
            os.truncate(file, 10)
            file.unlink()
        assert engine.prompt_logprobs(server, ids) == before
        assert server.stop() == 0


CACHES = (
    "HOME",
    "XDG_CACHE_HOME",
    "VLLM_CACHE_ROOT",
    "TRITON_CACHE_DIR",
    "TORCHINDUCTOR_CACHE_DIR",
    "SGLANG_CACHE_DIR",
)


@long
@BOTH
def test_a_full_disk_under_the_caches(tiny_flash: Path, tmp_path: Path, engine: Engine) -> None:
    """Every cache folder is on a file system of 16 KiB that is full, in a mount namespace of the
    server's own. Both engines start and answer; vLLM 0.32.0 compiles a function for the first
    log-probabilities of a prompt, cannot store it, answers 500 and ends."""
    disk = tmp_path / "disk"
    disk.mkdir()
    fill = f"mount -t tmpfs -o size=16k tmpfs {disk} && (cat /dev/zero > {disk}/full || true) 2>/dev/null"
    if subprocess.run(["unshare", "-rm", "sh", "-c", fill], capture_output=True).returncode:
        pytest.skip("no mount namespaces here (unshare -rm)")
    command = [
        "unshare",
        "-rm",
        "sh",
        "-c",
        f'{fill}; exec "$@"',
        "sh",
        *engine.command(tiny_flash, *soak.ARGS[engine.name]),
    ]
    environment = soak.environment(engine) | dict.fromkeys(CACHES, str(disk))
    body = {"model": "tiny", "prompt": list(range(5, 80)), "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    ask = lambda server: server.post("/v1/completions", body)["choices"][0]["text"]  # noqa: E731
    with soak.serve(engine, tiny_flash) as server:
        text, logprobs = ask(server), engine.prompt_logprobs(server, body["prompt"])
    with Server(command, environment) as server:
        assert ask(server) == text
        if engine is VLLM:
            assert_ended_as_the_engine_does(wait_for_exit(server, engine, 60), engine)
        else:
            assert engine.prompt_logprobs(server, body["prompt"]) == logprobs
            assert server.stop() == 0
