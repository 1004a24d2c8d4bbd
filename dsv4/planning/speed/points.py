# SPDX-License-Identifier: Apache-2.0
"""Public speed measurements, from recipes/speed_points.csv, as deployments and traffic."""

from __future__ import annotations

import csv
import functools
from dataclasses import dataclass

from dsv4.data import data_folder
from dsv4.machine.compat import Engine
from dsv4.machine.hardware import find_gpu
from dsv4.model.config import DraftKind
from dsv4.model.kv_layout import IndexFormat, StateMapping
from dsv4.planning.deployment import MAX_CONTEXT, Deployment, Speculation, find_checkpoint
from dsv4.planning.speed.work import Traffic

PREFILL_CHUNK = 8192


@dataclass(frozen=True, kw_only=True)
class Point:
    """One row. batch: requests that ran together; where more were in flight, it follows from the
    printed throughput by Little's law. ttft_s: None where the source prints none or where requests
    waited; tok_s_per_gpu: input and output.
    """

    source: str
    deployment: Deployment
    traffic: Traffic
    tpot_s: float | None
    ttft_s: float | None
    tok_s_per_gpu: float | None

    @property
    def batch(self) -> float:
        flight = self.traffic.concurrency
        if self.tok_s_per_gpu is None or self.tpot_s is None:
            return flight
        traffic = self.traffic
        decoding = self.tok_s_per_gpu * self.deployment.count * traffic.output_tokens * self.tpot_s / traffic.size
        return min(flight, max(decoding, 1.0))


@functools.cache
def all_points() -> tuple[Point, ...]:
    """Every row of recipes/speed_points.csv."""
    with (data_folder() / "speed_points.csv").open(newline="", encoding="utf-8") as file:
        return tuple(_point(row) for row in csv.DictReader(file))


def _point(row: dict[str, str]) -> Point:
    gpu, engine = find_gpu(row["gpu"]), _engine(row["engine"])
    tp, dp, pp, count = (int(row[name]) for name in ("tp", "dp", "pp", "count"))
    drafted = int(row["drafted"])
    draft: DraftKind = "none" if not drafted else "dspark" if row["draft"] == "dspark" else "mtp"
    deployment = Deployment(
        checkpoint=find_checkpoint(row["checkpoint"]),
        engine=engine,
        gpu=gpu,
        count=count,
        nodes=gpu.nodes_for(count),
        tp=tp,
        dp=dp,
        ep=dp > 1,
        pp=pp,
        max_model_len=MAX_CONTEXT,
        max_num_batched_tokens=PREFILL_CHUNK,
        max_num_seqs=256,
        memory_fraction=0.9,
        state=StateMapping.RING if engine == "sglang" else StateMapping.PAGED,
        index=IndexFormat.MXFP4 if gpu.capability[0] == 10 else IndexFormat.FP8,
        speculation=Speculation(method=draft, num_tokens=drafted),
    )
    traffic = Traffic(
        input_tokens=int(row["input"]),
        output_tokens=int(row["output"]),
        cached=float(row["cached"] or 0),
        concurrency=int(row["concurrency"]),
        accepted=float(row["accepted"] or 1),
    )
    return Point(
        source=row["source"],
        deployment=deployment,
        traffic=traffic,
        tpot_s=_seconds(row["tpot_ms"]),
        ttft_s=_seconds(row["ttft_ms"]),
        tok_s_per_gpu=float(row["tok_s_per_gpu"]) if row["tok_s_per_gpu"] else None,
    )


def _engine(name: str) -> Engine:
    return "sglang" if name.startswith("sglang") else "vllm"


def _seconds(text: str) -> float | None:
    return float(text) / 1000 if text else None
