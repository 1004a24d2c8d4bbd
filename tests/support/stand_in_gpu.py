# SPDX-License-Identifier: Apache-2.0
"""Cases for the benchmarks that believe in a GPU where there is none: imported, it puts a card
under torch.cuda whose graphs are tapes (`tape`) and whose kernels are Triton's interpreter.

`plans` are the interpreter's small cases of `op_cases` whose names contain STAND_IN_CASES, and one
that is wrong where STAND_IN_BROKEN is set. Times are a clock's and mean nothing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from tests.support import interpreter_bf16, tape

NAME = "Stand-in GPU"


class Event:
    def __init__(self, enable_timing: bool = True) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: Event) -> float:
        return (end.at - self.at) * 1e3


def do_bench(call: Callable[[], Any], return_mode: str) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def install() -> None:
    import bench_ops
    import triton.testing

    interpreter_bf16.install()
    tape.install()
    card = SimpleNamespace(name=NAME, major=9, minor=0, total_memory=80 << 30, multi_processor_count=132)
    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_device_name": lambda device=None: NAME,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: card,
        "mem_get_info": lambda device=None: (79 << 30, 80 << 30),
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "set_sync_debug_mode": lambda mode: None,
        "Event": Event,
    }.items():
        setattr(torch.cuda, name, value)
    torch.version.cuda = "13.0"
    triton.testing.do_bench = do_bench
    bench_ops.measure_ceilings = lambda: {"copy_gb_per_s": 1.0, "bf16_tflops": 1.0}


def plans(device: str, small: bool) -> list[Any]:
    """Whatever is asked: small, on the CPU."""
    import op_cases

    def repeating() -> Any:
        """A kernel that holds on to a value of the host."""
        x = torch.randn(8)
        first = float(x[0])
        return op_cases.Case(lambda: x * first, lambda: x * first, bytes_moved=64)

    broken = [op_cases.Plan("repeats", "none", {}, repeating)] if "STAND_IN_BROKEN" in os.environ else []
    wanted = os.environ["STAND_IN_CASES"].split(",")
    cases = op_cases.plans("cpu", small=True)
    return broken + [plan for plan in cases if any(text in str(plan) for text in wanted)]


if "STAND_IN_CASES" in os.environ:
    install()
