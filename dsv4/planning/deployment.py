# SPDX-License-Identifier: Apache-2.0
"""One way to serve one checkpoint: everything that decides memory and flags, typed. Recipes and
plans both become this.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from dsv4.data import data_folder, read_yaml
from dsv4.errors import PlanError, nearest
from dsv4.machine.compat import Engine
from dsv4.machine.hardware import Gpu
from dsv4.model.config import DraftKind, V4Config
from dsv4.model.kv_layout import CacheFormats, IndexFormat, KvFormat, StateMapping
from dsv4.planning.memory.weights import Inventory

MAX_CONTEXT = 1_048_576
_NUMBER = re.compile(r"[0-9]+(\.[0-9]*)?(e[0-9]{1,2})?")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint. id: short name; total_bytes: all its tensors.

    weights: what its own headers hold; None for a released one, whose config implies its tensors.
    unserved: why dsv4 does not serve it, "" where it does.
    """

    id: str
    repo: str
    family: str
    released: str
    total_bytes: int
    config: V4Config
    weights: Inventory | None = None
    unserved: str = ""


@dataclass(frozen=True, kw_only=True)
class Speculation:
    """method: none, mtp (April checkpoints) or dspark (0731, 0813); num_tokens: drafted per
    step.
    """

    method: DraftKind = "none"
    num_tokens: int = 0


MOST_DRAFTED = 7  # by the plugins: tests go so far, and a chained block loses its way sooner
# What dsv4's plugins draft with; native V4 has every method in both engines.
PLUGIN_DRAFTS: Mapping[Engine, frozenset[DraftKind]] = {
    "vllm": frozenset({"mtp", "dspark"}),
    "sglang": frozenset({"mtp"}),
}


@dataclass(frozen=True, kw_only=True)
class Parallelism:
    """How GPUs share one model; fields as in `Deployment`."""

    tp: int
    dp: int = 1
    pp: int = 1
    ep: bool = False
    replicas: int = 1


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """One checkpoint, served by one engine on `count` GPUs in `nodes` nodes.

    tp: attention tensor-parallel ranks.
    dp: attention replicas, each with its own KV pool.
    ep: whole experts per rank, over tp * dp ranks.
    pp: pipeline stages.
    replicas: engines of their own behind a router, each with weights and pool; tp, dp, pp and ep
    are one engine's.
    max_num_batched_tokens: per step and replica; SGLang's chunked prefill size.
    max_num_seqs: per replica.
    memory_fraction: gpu_memory_utilization or mem_fraction_static.
    state: how compressor state is kept; see `usual_state`. Raises PlanError for RING in vLLM or
    anything else in SGLang.
    max_capture_size: vLLM only; tokens of the largest step, mixed ones too, that is captured; None
    where the engine's own choice stands.
    swa_full_tokens_ratio: SGLang only; None lets it size windows from max_num_seqs.
    """

    checkpoint: Checkpoint
    engine: Engine
    gpu: Gpu
    count: int
    nodes: int
    tp: int
    dp: int
    ep: bool
    pp: int
    max_model_len: int
    max_num_batched_tokens: int
    max_num_seqs: int
    memory_fraction: float
    state: StateMapping
    async_scheduling: bool = True
    kv: KvFormat = KvFormat.FP8_DS_MLA
    index: IndexFormat = IndexFormat.FP8
    swa_full_tokens_ratio: float | None = None
    speculation: Speculation = Speculation()
    moe_backend: str = "auto"
    a2a_backend: str = "none"
    attention_backend: str = "auto"
    decode_graphs_only: bool = False
    max_capture_size: int | None = None
    replicas: int = 1

    def __post_init__(self) -> None:
        if (self.state is StateMapping.RING) != (self.engine == "sglang"):
            raise PlanError(f"{self.state.value}: {self.engine} does not keep compressor state so", "state")

    @property
    def config(self) -> V4Config:
        return self.checkpoint.config

    @property
    def formats(self) -> CacheFormats:
        return CacheFormats(self.kv, self.index)

    @property
    def has_draft(self) -> bool:
        return self.speculation.method != "none"

    @property
    def num_draft_layers(self) -> int:
        """Draft layers that own window caches."""
        return self.config.num_draft_layers if self.has_draft else 0

    @property
    def num_pools(self) -> int:
        """KV pools over which requests spread: attention replicas of every engine."""
        return self.dp * self.replicas

    @property
    def redundant_experts(self) -> int:
        """Copies of routed experts with which every expert-parallel rank holds equally many."""
        return -self.config.n_routed_experts % (self.tp * self.dp) if self.ep else 0

    @property
    def one_engine(self) -> Deployment:
        """What one of `replicas` engines runs."""
        if self.replicas == 1:
            return self
        return replace(self, count=self.count // self.replicas, nodes=max(self.nodes // self.replicas, 1), replicas=1)

    @property
    def shape(self) -> str:
        """Parallelism in words, as `TP8`, `TP8 x PP2`, `DP8 + EP` or `2x TP4` for two engines."""
        parts = [f"{name}{n}" for name, n in (("TP", self.tp), ("DP", self.dp), ("PP", self.pp)) if n > 1]
        engines = f"{self.replicas}x " if self.replicas > 1 else ""
        return engines + (" x ".join(parts) or "TP1") + (" + EP" if self.ep else "")


# Steps of so many tokens or fewer are captured where dsv4's plugin serves in vLLM, mixed ones too:
# what launches cost shows in those, decodes with the tail of a prompt among them.
MIXED_CAPTURE_TOKENS = 128
MOST_CAPTURED = 512  # vLLM's own limit


def capture_size(max_num_seqs: int, drafted: int = 0) -> int:
    """Tokens of the largest step that vLLM captures for dsv4's plugin: every decode step is one of
    them, with the drafts that it verifies."""
    return min(max(MIXED_CAPTURE_TOKENS, max_num_seqs * (1 + drafted)), MOST_CAPTURED)


def usual_state(engine: Engine, plugin: bool) -> StateMapping:
    """How compressor state is kept: SGLang keeps rings, native vLLM pages, dsv4's vLLM plugin
    summaries, unless `roomier_state` says pages.
    """
    if engine == "sglang":
        return StateMapping.RING
    return StateMapping.SUMMARY if plugin else StateMapping.PAGED


@functools.cache
def all_checkpoints() -> tuple[Checkpoint, ...]:
    """Every checkpoint in recipes/checkpoints.yaml."""
    folder = data_folder()
    return tuple(
        Checkpoint(
            id=entry["id"],
            repo=entry["repo"],
            family=entry["family"],
            released=str(entry["released"]),
            total_bytes=entry["total_bytes"],
            config=V4Config.from_path(folder / "configs" / entry["config"]),
        )
        for entry in read_yaml(folder / "checkpoints.yaml")
    )


def find_checkpoint(name: str) -> Checkpoint:
    """The checkpoint with this id or repository. Raises PlanError naming the nearest ids."""
    by_name = {n.lower(): c for c in all_checkpoints() for n in (c.id, c.repo, c.repo.split("/")[-1])}
    wanted = name.strip().lower().removesuffix("/")
    if wanted in by_name:
        return by_name[wanted]
    if re.search(r"v4\.1|v41", wanted):
        raise PlanError(f"{name}: is DeepSeek-V4.1, another architecture, which dsv4 neither plans nor serves")
    near = nearest(wanted, by_name)
    ids = list(dict.fromkeys(by_name[n].id for n in near)) or [c.id for c in all_checkpoints()]
    raise PlanError(f"{name}: unknown checkpoint; nearest: {', '.join(ids)}")


def parse_context(text: str) -> int:
    """Tokens in `text`: plain, as 1e5, or with k or m as binary thousands (800k is 819,200; 1m is
    1,048,576). Raises PlanError.
    """
    raw = text.strip().lower().replace(",", "").replace("_", "")
    scale = {"k": 1024, "m": 1024 * 1024}.get(raw[-1:], 1)
    digits = raw[:-1] if scale > 1 else raw
    try:
        tokens = int(float(digits) * scale) if _NUMBER.fullmatch(digits) else 0
    except (ValueError, OverflowError):
        tokens = 0
    if tokens < 1:
        raise PlanError(f"{text}: is not a number of tokens; write 800k, 1m or 819200")
    if tokens > MAX_CONTEXT:
        raise PlanError(f"{text}: is {tokens:,} tokens; DeepSeek-V4 ends at {MAX_CONTEXT:,} (1m)")
    return tokens
