# SPDX-License-Identifier: Apache-2.0
"""Random traffic against a server whose pool is too small for it: `python -m tests.support.soak
--engine vllm --minutes 10` (`make soak`); tests/e2e/test_soak.py runs some seconds.

Clients send prompts that share prefixes, stream, leave in mid-stream, ask for several answers, at
several priorities, and send what must be refused. Every so often all of them stop; once the server
is idle, its pages must all be free, and its memory and file descriptors are noted. Sampled requests
must have the log-probabilities that they have alone.
"""

from __future__ import annotations

import http.client
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[2] / "examples"))  # as pytest does

import click
from served import HOST, SGLANG, VLLM, Engine, Server

from tests.support import sglang_engine, vllm_engine
from tests.support.comparison import TIE_MARGIN, TOLERANCE

CLIENTS = 8
# Of all processes of a server between the middle and the end of a run: allocators move by some MiB.
MEMORY_MIB = 48.0
LENGTHS = (1, 5, 64, 129, 200, 257, 300, 400, 511)
# Pools that hold two of the longest requests, so that eight clients preempt, retract and wait.
ARGS = {
    "vllm": ("--kv-cache-memory-bytes", str(16 << 20), "--max-model-len", "640", "--max-num-seqs", "6",
             "--max-num-batched-tokens", "96", "--scheduling-policy", "priority"),
    "sglang": ("--context-length", "640", "--max-total-tokens", "1536", "--max-running-requests", "6", "--swa-full-tokens-ratio", "1",
               "--chunked-prefill-size", "256", "--enable-metrics", "--enable-priority-scheduling"),
}  # fmt: skip
GAUGES = {
    "vllm": ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"),
    "sglang": ("sglang:num_running_reqs", "sglang:num_queue_reqs", "sglang:token_usage"),
}


@dataclass
class Usage:
    """Of all processes of an idle server."""

    rss_mib: float
    descriptors: int
    gauges: dict[str, float]


@dataclass
class Report:
    done: Counter[str] = field(default_factory=Counter)
    usages: list[Usage] = field(default_factory=list)
    worst: float = 0.0
    compared: int = 0
    preempted: float = 0.0
    wrong: list[str] = field(default_factory=list)


def environment(engine: Engine) -> dict[str, str]:
    return vllm_engine.environment() if engine is VLLM else sglang_engine.environment()


def serve(engine: Engine, folder: Path, *args: str) -> Server:
    return Server(engine.command(folder, *ARGS[engine.name], *args), environment(engine))


def processes(server: Server) -> list[int]:
    """Ids of the server and all that it started."""
    listed = subprocess.run(["ps", "-o", "pid=", "--sid", str(server.process.pid)], capture_output=True, text=True)
    return [int(pid) for pid in listed.stdout.split()]


def usage(server: Server, engine: Engine) -> Usage:
    rss, descriptors = 0, 0
    for pid in processes(server):
        with suppress(FileNotFoundError):
            status = Path(f"/proc/{pid}/status").read_text()
            rss += next((int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")), 0)
            descriptors += len(os.listdir(f"/proc/{pid}/fd"))
    return Usage(rss / 1024, descriptors, {name: metric(server, name) for name in GAUGES[engine.name]})


def metric(server: Server, name: str) -> float:
    connection = http.client.HTTPConnection(HOST, server.port, timeout=60)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    connection.close()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((name + "{", name + " ")))


def next_logprob(server: Server, ids: list[int], priority: int = 0) -> float:
    """Of the greedy token behind a prompt; its prefix may come from the cache."""
    body = {
        "model": "tiny", "prompt": ids, "max_tokens": 1, "temperature": 0, "ignore_eos": True, "logprobs": 1,
        "priority": priority,
    }  # fmt: skip
    return float(server.post("/v1/completions", body)["choices"][0]["logprobs"]["token_logprobs"][0])


class Traffic:
    """Clients that send until they are told to stop."""

    def __init__(self, server: Server, engine: Engine, text: list[int], seed: int, report: Report) -> None:
        self.server, self.engine, self.text, self.seed, self.report = server, engine, text, seed, report
        self.alone_next = {n: next_logprob(server, text[:n]) for n in LENGTHS}
        self.alone = {n: engine.prompt_logprobs(server, text[:n]) for n in LENGTHS if n > 1}
        self.lock = threading.Lock()
        self.deadline = 0.0
        self.round = 0

    def run(self, seconds: float) -> None:
        self.deadline = time.monotonic() + seconds
        self.round += 1
        threads = [threading.Thread(target=self.client, args=(i,)) for i in range(CLIENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(seconds + 120)
        if any(thread.is_alive() for thread in threads):
            self.report.wrong.append("a client waits for an answer 120 s after the last request")

    def client(self, number: int) -> None:
        rng = random.Random(f"{self.seed}:{self.round}:{number}")
        acts: list[Callable[[random.Random], None]] = [
            self.sampled_next, self.sampled_next, self.sampled_prompt, self.whole, self.leaves, self.leaves, self.several,
            self.refused,
        ]  # fmt: skip
        if self.engine is SGLANG:
            acts.append(self.aborted)
        while time.monotonic() < self.deadline and self.server.process.poll() is None:
            act = rng.choice(acts)
            try:
                act(rng)
            except Exception as error:
                with self.lock:
                    self.report.wrong.append(f"{act.__name__}: {type(error).__name__}: {error}")
                return
            with self.lock:
                self.report.done[act.__name__] += 1
            time.sleep(rng.expovariate(20))

    def compare(self, got: list[float], want: list[float], what: str) -> None:
        worst = max(abs(g - w) for g, w in zip(got, want, strict=True))
        with self.lock:
            self.report.compared += len(got)
            self.report.worst = max(self.report.worst, worst)
            if not worst <= TOLERANCE:
                self.report.wrong.append(f"{what}: log-probabilities differ by {worst:.1e} from those alone")

    def sampled_next(self, rng: random.Random) -> None:
        n = rng.choice(LENGTHS)
        got = next_logprob(self.server, self.text[:n], rng.randrange(3))
        self.compare([got], [self.alone_next[n]], f"after {n} tokens")

    def sampled_prompt(self, rng: random.Random) -> None:
        n = rng.choice(list(self.alone))
        self.compare(self.engine.prompt_logprobs(self.server, self.text[:n]), self.alone[n], f"prompt of {n} tokens")

    def body(self, rng: random.Random, **more: Any) -> dict[str, Any]:
        """A prefix of the text, alone or continued by what nobody else sends."""
        prompt = self.text[: rng.choice(LENGTHS)] + [rng.randrange(20, 250) for _ in range(rng.choice((0, 1, 60)))]
        return {
            "model": "tiny", "prompt": prompt[:540], "max_tokens": rng.choice((1, 8, 60, 90)), "ignore_eos": True,
            "temperature": rng.choice((0, 1)), "priority": rng.randrange(3), **more,
        }  # fmt: skip

    def whole(self, rng: random.Random) -> None:
        body = self.body(rng, stream=True, stream_options={"include_usage": True})
        with self.server.open("/v1/completions", body) as response:
            lines = [line[6:].strip() for line in response if line.startswith(b"data: ")]
        assert lines[-1] == b"[DONE]", lines[-1]
        assert json.loads(lines[-2])["usage"]["completion_tokens"] == body["max_tokens"]

    def leaves(self, rng: random.Random) -> None:
        """Closes its connection before the answer, or in the midst of it."""
        connection = http.client.HTTPConnection(HOST, self.server.port, timeout=120)
        body = json.dumps(self.body(rng, stream=True, max_tokens=90))
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        if rng.random() < 0.7:
            response = connection.getresponse()
            response.read(rng.choice((1, 300, 3000)))
            response.close()
        connection.close()

    def several(self, rng: random.Random) -> None:
        n = rng.choice((2, 3))
        answer = self.server.post("/v1/completions", self.body(rng, n=n, temperature=1, max_tokens=12))
        assert len(answer["choices"]) == n

    def refused(self, rng: random.Random) -> None:
        body = rng.choice(
            ({"prompt": [5, 10**6]}, {"prompt": [7] * 700}, {"prompt": [5], "max_tokens": -1}, {"prompt": {}})
        )
        code = 200
        try:
            self.server.post("/v1/completions", {"model": "tiny", **body})
        except urllib.error.HTTPError as error:
            code = error.code
        assert 400 <= code < 500, f"{str(body)[:60]}: {code}"

    def aborted(self, rng: random.Random) -> None:
        """By SGLang's own endpoint."""
        name = f"soak-{rng.random()}"
        thread = threading.Thread(
            target=lambda: self.server.post("/v1/completions", self.body(rng, rid=name, max_tokens=90))
        )
        thread.start()
        time.sleep(rng.random() / 5)
        self.server.open("/abort_request", {"rid": name}).close()
        thread.join(120)
        assert not thread.is_alive()


def drained(server: Server, engine: Engine, report: Report, timeout_s: float = 60) -> None:
    """Note what an idle server uses; pages or requests that stay are wrong."""
    end = time.monotonic() + timeout_s
    while any((now := usage(server, engine)).gauges.values()) and time.monotonic() < end:
        if server.process.poll() is not None:
            report.wrong.append(f"the server ended with exit code {server.process.returncode}")
            return
        time.sleep(0.3)
    report.usages.append(now)
    if any(now.gauges.values()):
        report.wrong.append(f"after {timeout_s:.0f} s without a request: {now.gauges}")


def soak(
    server: Server,
    engine: Engine,
    text: list[int],
    rounds: list[float],
    seed: int = 0,
    tick: Callable[[], None] = lambda: None,
) -> Report:
    """rounds: seconds of traffic, each followed by a look at the idle server."""
    report = Report()
    traffic = Traffic(server, engine, text, seed, report)
    for seconds in rounds:
        traffic.run(seconds)
        drained(server, engine, report)
        tick()
        if report.wrong:
            break
    name = "vllm:num_preemptions_total" if engine is VLLM else "sglang:num_retracted_reqs_total"
    with suppress(OSError):
        report.preempted = metric(server, name)
    return report


def growth(report: Report) -> tuple[float, int]:
    """(MiB, descriptors) from the middle of the run to its end, as medians of a third each."""
    third = math.ceil((len(report.usages) - 1) / 3)
    middle, end = report.usages[third : 2 * third] or report.usages[:1], report.usages[-third:]
    median = lambda values: sorted(values)[len(values) // 2]  # noqa: E731
    return (
        median([u.rss_mib for u in end]) - median([u.rss_mib for u in middle]),
        median([u.descriptors for u in end]) - median([u.descriptors for u in middle]),
    )


@click.command()
@click.option("--engine", "names", multiple=True, type=click.Choice(["vllm", "sglang"]), default=["vllm", "sglang"])
@click.option("--minutes", default=60.0, show_default=True, help="Of traffic, for each engine.")
@click.option("--seed", default=0, show_default=True)
@click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path), help="Write the record here.")
def main(names: list[str], minutes: float, seed: int, path: Path | None) -> None:
    """Soak servers of a tiny V4. Exit 1 when something was wrong or has grown."""
    from rich.console import Console
    from rich.progress import Progress, TimeElapsedColumn, TimeRemainingColumn

    from dsv4.reference.tiny import write_tiny
    from tests.support.hf_oracle import load_hf, prompt_without_ties

    console, failed, records = Console(), False, {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_tiny(Path(scratch) / "tiny-flash", "flash")
        text = prompt_without_ties(load_hf(folder), 540, margin=TIE_MARGIN)
        rounds = [minutes * 60 / 20] * 20
        columns = [*Progress.get_default_columns()[:3], TimeElapsedColumn(), TimeRemainingColumn()]
        for name in names:
            engine = {"vllm": VLLM, "sglang": SGLANG}[name]
            console.print(f"{name}: starting")
            with Progress(*columns, console=console) as progress, serve(engine, folder) as server:
                task = progress.add_task(name, total=len(rounds))
                report = soak(server, engine, text, rounds, seed, lambda task=task: progress.advance(task))
                memory, descriptors = growth(report)
                log = server.log()
                code = server.stop()
            console.print(
                f"{name}: {minutes:g} minutes, {sum(report.done.values())} requests {dict(report.done)}, {report.preempted:.0f} preempted;"
                f" {report.compared} log-probabilities, worst difference {report.worst:.1e};"
                f" memory {report.usages[0].rss_mib:.0f} -> {report.usages[-1].rss_mib:.0f} MiB, grew {memory:.1f} MiB over the last two"
                f" thirds; descriptors {report.usages[0].descriptors} -> {report.usages[-1].descriptors}; exit code {code}"
            )  # fmt: skip
            records[name] = {
                "minutes": minutes,
                "requests": dict(report.done),
                "preempted": report.preempted,
                "logprobs_compared": report.compared,
                "worst_difference": report.worst,
                "rss_mib": [round(u.rss_mib, 1) for u in report.usages],
                "descriptors": [u.descriptors for u in report.usages],
                "memory_grew_mib": round(memory, 1),
                "exit_code": code,
            }
            console.print(records[name]["rss_mib"], records[name]["descriptors"])
            bad = bool(report.wrong) or memory > MEMORY_MIB or descriptors > 0 or code != 0
            if bad:
                console.print("\n".join(report.wrong[:20]), log[-4000:], markup=False)
            failed |= bad
    if path is not None:
        path.write_text(json.dumps(records, indent=1) + "\n")
    sys.exit(failed)


if __name__ == "__main__":
    main()
