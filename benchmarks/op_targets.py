# SPDX-License-Identifier: Apache-2.0
"""What the kernels are meant to reach, judged from one row of bench_ops.py's record."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

MILLION = 262_144  # entries of a CSA layer after a million tokens
DECODE_BATCHES = (1, 8, 64, 256)
PREFILL = 8192  # tokens


@dataclass(frozen=True)
class Target:
    """value: what was measured, None where the peer is not there or wrong; limit: the least
    (at_least) or the most it may be."""

    what: str
    value: float | None
    limit: float
    at_least: bool = False

    @property
    def met(self) -> bool | None:
        """None when nothing was measured."""
        if self.value is None:
            return None
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def record(self) -> dict[str, Any]:
        return {"what": self.what, "value": self.value, "limit": self.limit, "at_least": self.at_least, "met": self.met}


def asked(row: dict[str, Any]) -> int:
    """How many targets a case has, before it is measured."""
    unmeasured = {"over_reference": None, "of_copy_bandwidth": None, "us": None, "peers": {}}
    return sum(1 for _ in targets(row | unmeasured))


def targets(row: dict[str, Any]) -> Iterator[Target]:
    """The targets of one measured case."""
    if not row["served"]:
        return
    name, sizes = row["kernel"], row["sizes"]
    tokens = sizes["T"]

    def against(peer: str) -> float | None:
        found = row["peers"].get(peer, {})
        return None if found.get("wrong") else found.get("ratio")

    yield Target("time over the reference's", row["over_reference"], 1.0)
    if name == "index.logits decode" and sizes["N"] == MILLION:
        yield Target("share of copy bandwidth", row["of_copy_bandwidth"], 0.7, at_least=True)
        yield Target("time over DeepGEMM's", against("deep_gemm"), 1.3)
    if name == "sparse csa" and tokens in DECODE_BATCHES:
        yield Target("time over FlashMLA's", against("flash_mla"), 1.5)
    if name == "topk":
        yield Target("time over torch.topk's", against("torch.topk"), 0.5)
    if tokens == PREFILL and name.startswith(("norm_rope_store", "compressor", "summary", "mhc.")):
        yield Target("share of copy bandwidth", row["of_copy_bandwidth"], 0.6, at_least=True)
    if tokens == 1 and name in ("mhc.pre", "mhc.post_pre"):  # what stands between two sublayers
        yield Target("us", row["us"], 10.0)
