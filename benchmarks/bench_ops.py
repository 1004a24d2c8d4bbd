# SPDX-License-Identifier: Apache-2.0
"""Every kernel on this GPU: first all of them equal to their references at full size, then those
that are timed.

    python benchmarks/bench_ops.py --json benchmarks/results/ops_h200.json \\
        [--peers FOLDER] [--only TEXT] [--compare]
    TRITON_INTERPRET=1 python benchmarks/bench_ops.py --interpret  # tiny, without a GPU

Results are compared as called, and out of a captured CUDA graph that is replayed with other values
than it was captured with. Times are medians of triton's do_bench, which clears the L2 cache before
every run: of a replayed CUDA graph, as engines decode, or of the call itself where it cannot be
captured, and a ratio compares like with like. Ceilings (copy bandwidth, bf16 matrix product) and
peers are measured in the same run; a peer that is not there is recorded with the reason.

Cases run in a process beside this one. One that raises, hangs, kills its process or leaves the GPU
in an error is recorded as failed, and the others go on. The record is written after every case.
Exit status: 0 when every case ran and was right, 1 otherwise; 2 for bad usage. Missed targets do
not change it: they are in the record and in the last lines.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib
import json
import os
import queue
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import op_targets
import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

# A kernel's bf16 output may differ from the reference's by what one rounding at bf16 does to values
# and to probabilities.
CLOSE = 2.0**-6
SAME_BYTES = 0.995  # fp32 sums in another order flip roundings of single elements
SLOW_MS = (
    200.0  # a call this long is timed three times, without clearing the cache: it reads far more than the cache holds
)
TIME_IS_OVER = "the time given was over"
START_LIMIT_S = 180.0  # a process may take this long to import torch and measure the ceilings


# ---- comparing -----------------------------------------------------------------------------


def flat(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [x for x in result if isinstance(x, Tensor)]


def disagreement(compare: str, got: Sequence[Tensor], expected: Sequence[Tensor]) -> str | None:
    """How results are not the expected ones, or None."""
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        if a.shape != b.shape:
            return f"output {i}: shape {tuple(a.shape)}, not {tuple(b.shape)}"
        if compare == "sets":
            if not torch.equal(a.long().sort(-1).values, b.long().sort(-1).values):
                return f"output {i}: another set"
        elif not a.is_floating_point():
            same = (a == b).float().mean().item()
            if same < SAME_BYTES:
                return f"output {i}: {same:.4f} of the {'bytes' if a.dtype is torch.uint8 else 'integers'} agree"
        else:
            if not torch.equal(a.isfinite(), b.isfinite()):
                return f"output {i}: NaN or infinity elsewhere"
            largest = b.double().abs().nan_to_num(0, 0, 0).amax().clamp(min=1e-30)
            worst = ((a.double() - b.double()).abs().nan_to_num(0, 0, 0).amax() / largest).item()
            if worst > CLOSE:
                return f"output {i}: error {worst:.2e} of the largest value"
    return None


def stays_on_device(call: Callable[[], Any]) -> bool:
    """Whether `call` reads nothing on the host, without which it cannot be captured. References do
    in places."""
    call()
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        call()
    except RuntimeError:
        return False
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return True


def inputs_of(*calls: Callable[..., Any]) -> list[Tensor]:
    """The tensors that functions without arguments compute with: those in their closures, each
    once, in a fixed order."""
    found: dict[int, Tensor] = {}
    seen: set[int] = set()

    def walk(value: Any) -> None:
        if isinstance(value, Tensor):
            found.setdefault(id(value), value)
            return
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, (tuple, list)):
            parts: Iterable[Any] = value
        elif isinstance(value, dict):
            parts = value.values()
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            parts = [getattr(value, field.name) for field in dataclasses.fields(value)]
        else:
            parts = (cell.cell_contents for cell in getattr(value, "__closure__", None) or ())
        for part in parts:
            walk(part)

    for call in calls:
        walk(call)
    return list(found.values())


def overwrite(case: Any, other: Any) -> None:
    """Give `case`, built by the same plan, the values of `other` at its own addresses."""
    ours, theirs = (inputs_of(c.kernel, c.reference, c.read) for c in (case, other))
    assert [(t.shape, t.dtype) for t in ours] == [(t.shape, t.dtype) for t in theirs]
    for to, value in zip(ours, theirs, strict=True):
        to.copy_(value)


def not_the_same(got: Sequence[Tensor], expected: Sequence[Tensor]) -> str | None:
    """How results are not those of the same kernel on the same values, bit for bit; or None."""
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        x, y = (t.contiguous().view(torch.uint8) for t in (a, b))
        if x.shape != y.shape or not torch.equal(x, y):
            share = f"{(x != y).float().mean().item():.2e} of the bytes differ" if x.shape == y.shape else "other shape"
            return f"output {i}: {share}"
    return None


def capture(call: Callable[[], Any]) -> tuple[Callable[[], Any], Any]:
    """Replay of a CUDA graph of `call`, which has run before, and its results, which a replay
    fills."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph.replay, result


# ---- timing --------------------------------------------------------------------------------


def median_us(call: Callable[[], Any]) -> float:
    from triton.testing import do_bench

    spans = []
    for _ in range(4):  # the first may compile
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        spans.append(start.elapsed_time(end))
        if len(spans) == 2 and spans[1] < SLOW_MS:
            return do_bench(call, return_mode="median") * 1e3
    return statistics.median(spans[1:]) * 1e3


@dataclass(frozen=True)
class Times:
    """us of a call as it is, and replayed from a graph; None where it cannot be captured."""

    eager_us: float
    graph_us: float | None

    @property
    def us(self) -> float:
        return self.eager_us if self.graph_us is None else self.graph_us

    def over(self, other: Times) -> float:
        """How many times longer, from graphs where both have one."""
        if self.graph_us is not None and other.graph_us is not None:
            return self.graph_us / other.graph_us
        return self.eager_us / other.eager_us


def time_call(call: Callable[[], Any]) -> Times:
    eager = median_us(call)
    if not stays_on_device(call):
        return Times(eager, None)
    replay, kept = capture(call)
    graph_us = median_us(replay)
    del kept
    return Times(eager, graph_us)


def measure(case: Any, expected: list[Tensor], ceilings: dict[str, float]) -> dict[str, Any]:
    kernel, reference = time_call(case.kernel), time_call(case.reference)
    gb_per_s = case.bytes_moved / kernel.us / 1e3
    row: dict[str, Any] = {
        "us": kernel.us,
        "eager_us": kernel.eager_us,
        "graph_us": kernel.graph_us,
        "reference_us": reference.us,
        "reference_eager_us": reference.eager_us,
        "over_reference": kernel.over(reference),
        "bytes": case.bytes_moved,
        "flops": case.flops,
        "gb_per_s": gb_per_s,
        "of_copy_bandwidth": gb_per_s / ceilings["copy_gb_per_s"],
        "of_matmul": case.flops / kernel.us / 1e6 / ceilings["bf16_tflops"],
        "peers": {},
    }
    for name, peer in case.peers.items():
        try:
            result = peer.call()
            got = flat(case.read(result)) if peer.compared else []
            wrong = disagreement(case.compare, got, expected[: len(got)])
            theirs = time_call(peer.call)
        except Exception as e:
            row["peers"][name] = {"not_measured": one_line(e)}
            try:
                torch.cuda.synchronize()
            except RuntimeError:  # the peer has left the GPU in an error; what was measured before it stands
                break
            continue
        row["peers"][name] = {
            "us": theirs.us,
            "eager_us": theirs.eager_us,
            "ratio": kernel.over(theirs),
            "wrong": wrong,
        }
    return row


def measure_ceilings() -> dict[str, float]:
    source = torch.randint(0, 256, (2 << 30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    copy_us, product_us = median_us(lambda: target.copy_(source)), median_us(lambda: a @ b)
    return {"copy_gb_per_s": 2 * source.numel() / copy_us / 1e3, "bf16_tflops": 2 * 8192**3 / product_us / 1e6}


# ---- one case, in a process of its own kind ------------------------------------------------


def one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def build(plan: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return plan.build()


def run_case(plan: Any, device: str, ceilings: dict[str, float]) -> dict[str, Any]:
    """Compare one case, or, given ceilings, time it. replayed: whether a graph of it was compared
    too."""
    case = build(plan)
    expected = [x.clone() for x in flat(case.read(case.reference()))]
    problem = disagreement(case.compare, flat(case.read(case.kernel())), expected)
    if problem is None and ceilings:
        return measure(case, expected, ceilings)
    row = {"wrong": problem, "served": case.served, "replayed": False}
    if problem is None and device == "cuda":
        del case, expected
        problem = compare_replayed(plan)
        row |= {"wrong": f"from a graph: {problem}" if problem else None, "replayed": True}
    return row


def compare_replayed(plan: Any) -> str | None:
    """How a graph that was captured with one set of values and is replayed with another differs
    from the kernel called with the latter."""
    fresh = build(plan, seed=1)
    expected = [x.clone() for x in flat(fresh.read(fresh.kernel()))]
    del fresh  # a card holds few of the largest
    case = build(plan)
    case.kernel()  # what it compiles, it compiles outside the capture
    replay, result = capture(case.kernel)
    overwrite(case, build(plan, seed=1))
    replay()
    torch.cuda.synchronize()
    return not_the_same(flat(case.read(result)), expected)


@dataclass(frozen=True)
class Work:
    """Which cases of which module to run where; timed: time them, which measures the ceilings
    first."""

    source: str
    device: str
    names: Sequence[str]
    timed: bool


def work(connection: Connection, todo: Work, start: int, ceilings: dict[str, float]) -> None:
    """Send {"ceilings"}, then one row for each case from number `start` on."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        from tests.support import interpreter_bf16

        interpreter_bf16.install()
    torch.set_float32_matmul_precision("highest")
    plans = {
        str(plan): plan for plan in importlib.import_module(todo.source).plans(todo.device, small=todo.device == "cpu")
    }
    if todo.timed and not ceilings:
        ceilings = measure_ceilings()
    connection.send({"ceilings": ceilings})
    for name in todo.names[start:]:
        try:
            row = run_case(plans[name], todo.device, ceilings)
        except Exception as e:
            row = {"failed": one_line(e)}
        connection.send(row)
        gc.collect()
        if todo.device == "cuda":
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except RuntimeError:  # an illegal access, say: nothing runs in this process any more
                os._exit(1)


def run_all(
    todo: Work, limit_s: float, until: float, ceilings: dict[str, float]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every case's name and row, whatever becomes of the processes that run them; `ceilings` is
    filled with the first's."""
    done, failed = 0, ""
    while done < len(todo.names):
        if failed or time.monotonic() > until:
            over = {"not_timed": TIME_IS_OVER} if todo.timed else {"failed": f"not run: {TIME_IS_OVER}"}
            yield todo.names[done], {"failed": failed} if failed else over
            done += 1
            continue
        mine, theirs = get_context("spawn").Pipe(duplex=False)
        process = get_context("spawn").Process(target=work, args=(theirs, todo, done, ceilings), daemon=True)
        process.start()
        theirs.close()
        said = receive(mine, process, START_LIMIT_S)
        failed = f"could not start: {said['failed']}" if "gone" in said else ""
        ceilings.update(said.get("ceilings", {}))
        while not failed and done < len(todo.names) and time.monotonic() <= until:
            said = receive(mine, process, limit_s)
            yield todo.names[done], {k: v for k, v in said.items() if k != "gone"}
            done += 1
            if "gone" in said:
                break
        process.kill()
        process.join(30)


def run_beside(
    parts: Sequence[Work], limit_s: float, until: float, ceilings: dict[str, float]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """`run_all` of several parts at a time: to compare, mostly to compile, never to time."""
    found: queue.Queue[tuple[str, dict[str, Any]] | None] = queue.Queue()

    def drain(part: Work) -> None:
        for row in run_all(part, limit_s, until, ceilings):
            found.put(row)
        found.put(None)

    for part in parts:
        threading.Thread(target=drain, args=(part,), daemon=True).start()
    running = len(parts)
    while running:
        row = found.get()
        if row is None:
            running -= 1
        else:
            yield row


def receive(connection: Connection, process: Any, limit_s: float) -> dict[str, Any]:
    """The next message; {"failed", "gone"} when the process ends or does not speak in time."""
    try:
        if connection.poll(limit_s):
            return connection.recv()
    except (EOFError, OSError):
        process.join(10)
        return {"failed": f"its process ended with {process.exitcode}", "gone": True}
    return {"failed": f"nothing came back in {limit_s:.0f} s", "gone": True}


# ---- the run -------------------------------------------------------------------------------


def rows_of(plans: Sequence[Any]) -> dict[str, dict[str, Any]]:
    """A row for each case, by its name, as long as it has not run."""
    rows: dict[str, dict[str, Any]] = {
        str(p): {"kernel": p.name, "model": p.model, "sizes": dict(p.sizes), "failed": "not run", "wrong": None}
        for p in plans
    }
    assert len(rows) == len(plans), "two cases of one name"
    return rows


@dataclass(frozen=True)
class Phase:
    """Every case of a module compared, or every right one timed, until `until`."""

    source: str
    device: str
    timed: bool
    until: float
    case_s: float
    jobs: int = 1

    def run(self, rows: dict[str, dict[str, Any]], ceilings: dict[str, float]) -> Iterator[dict[str, Any]]:
        """Each row once it is filled in, in the order of `rows`. Timed cases run one at a time."""
        names = [name for name, row in rows.items() if not self.timed or not (row["failed"] or row["wrong"])]
        jobs = 1 if self.timed else self.jobs
        parts = [Work(self.source, self.device, names[i::jobs], self.timed) for i in range(min(jobs, len(names)))]
        for name, found in run_beside(parts, self.case_s, self.until, ceilings):
            row = rows[name]
            row |= found if self.timed else {"failed": None, "wrong": None} | found
            if "us" in found:
                row["targets"] = [t.record() for t in op_targets.targets(row)]
            yield row


def said_by(*command: str) -> str:
    try:
        return (
            subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout.strip().partition("\n")[0]
            or "unknown"
        )
    except OSError:
        return "unknown"


def machine(commit: str) -> dict[str, Any]:
    import triton

    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "commit": commit or said_by("git", "rev-parse", "HEAD"),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": sys.version.split()[0],
        "command": " ".join(sys.argv),
    }


def describe(row: dict[str, Any]) -> str:
    sizes = " ".join(f"{k}={v}" for k, v in row["sizes"].items())
    text = f"{row['kernel']:26s} {row['model']:6s} {sizes:20s} {row.get('failed') or row.get('wrong') or 'equal'}"
    if "us" in row:
        peers = " ".join(
            f"{n} {p['ratio']:.2f}x{' WRONG' if p['wrong'] else ''}" if "us" in p else f"no {n}"
            for n, p in row["peers"].items()
        )
        text += f"  {row['us']:9.1f} us  {row['of_copy_bandwidth']:4.0%} of copy {row['of_matmul']:4.0%} of matmul"
        text += f"  {row['over_reference']:.2f}x reference  {peers}"
    return text


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """The last lines of a run: what was wrong or failed, and every target that was missed or could
    not be judged."""
    judged = [(row, t) for row in rows for t in row.get("targets", ())]
    lines = []
    for row, t in judged:
        if t["met"] is not True:
            found = "not measured" if t["value"] is None else f"missed: {t['value']:.3g}"
            sizes = " ".join(f"{k}={v}" for k, v in row["sizes"].items())
            bound = "at least" if t["at_least"] else "at most"
            lines.append(f"target {row['kernel']} {row['model']} {sizes}: {t['what']} {bound} {t['limit']} {found}")
    met, missed = (sum(t["met"] is x for _, t in judged) for x in (True, False))
    if judged:
        lines.append(f"{len(judged)} targets: {met} met, {missed} missed, {len(judged) - met - missed} not measured")
    wrong, failed = (sum(bool(row.get(key)) for row in rows) for key in ("wrong", "failed"))
    return "\n".join([*lines, f"{len(rows)} cases, {wrong} wrong, {failed} failed"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the record here, after every case")
    parser.add_argument("--only", default="", help="cases whose name, model and sizes contain this")
    parser.add_argument("--peers", type=Path, help="a folder that holds vllm/ with the peers' libraries")
    parser.add_argument("--compare", action="store_true", help="compare only, time nothing")
    parser.add_argument("--jobs", type=int, default=1, help="processes that compare at a time (default: %(default)s)")
    parser.add_argument(
        "--case-s", type=float, default=120.0, help="a case that takes longer has failed (default: %(default)s)"
    )
    parser.add_argument("--minutes", type=float, default=1e6, help="start no case after this long")
    parser.add_argument("--commit", default="", help="what to record as the commit, where git cannot say")
    parser.add_argument(
        "--interpret", action="store_true", help="compare tiny cases in Triton's interpreter, time nothing"
    )
    parser.add_argument("--source", default="op_cases", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.interpret and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("set TRITON_INTERPRET=1: Triton reads it when kernels are defined")
    if not args.interpret and not torch.cuda.is_available():
        print("bench_ops: no GPU here, so nothing was measured; --interpret compares tiny cases without one")
        return 0
    if args.peers:
        sys.path.insert(0, str(args.peers.resolve()))
    device = "cpu" if args.interpret else "cuda"
    plans = [
        plan for plan in importlib.import_module(args.source).plans(device, args.interpret) if args.only in str(plan)
    ]
    if not plans:
        parser.error(f"no case contains {args.only!r}")
    record: dict[str, Any] = {"what": "dsv4 kernels against their references, ceilings and peers", "ceilings": {}}
    rows = rows_of(plans)
    if not args.interpret:
        record = machine(args.commit) | record
    until = time.monotonic() + 60 * args.minutes
    for timed in (False,) if args.interpret or args.compare else (False, True):
        phase = Phase(args.source, device, timed, until, args.case_s, args.jobs)
        for row in phase.run(rows, record["ceilings"]):
            print(describe(row), flush=True)
            if args.json:
                args.json.parent.mkdir(parents=True, exist_ok=True)
                args.json.write_text(json.dumps(record | {"rows": list(rows.values())}, indent=1) + "\n")
    print(summary(list(rows.values())))
    return int(any(row["wrong"] or row["failed"] for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
