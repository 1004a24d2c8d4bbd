# SPDX-License-Identifier: Apache-2.0
"""Weight bytes per rank, summed from the tensor inventory of `dsv4.model.tensors`.

Both engines shard alike: linears with a shard axis over the attention tensor-parallel ranks, routed
experts over all ranks of a pipeline stage (whole experts under expert parallelism, slices of each
otherwise), the rest is replicated.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, replace

from dsv4.model.config import V4Config
from dsv4.model.tensors import Component, TensorSpec, tensor_specs


@dataclass(frozen=True)
class Bytes:
    """Unsharded bytes by how they are placed. wo_a: the part of `sharded` that an engine may widen
    to bf16.
    """

    experts: int = 0
    sharded: int = 0
    replicated: int = 0
    wo_a: int = 0

    def __add__(self, other: Bytes) -> Bytes:
        return Bytes(
            self.experts + other.experts,
            self.sharded + other.sharded,
            self.replicated + other.replicated,
            self.wo_a + other.wo_a,
        )

    @property
    def total(self) -> int:
        return self.experts + self.sharded + self.replicated


@dataclass(frozen=True)
class Inventory:
    """A checkpoint cut the way pipeline stages cut it: `layers[i]`, the two ends, and the draft."""

    first: Bytes
    layers: tuple[Bytes, ...]
    last: Bytes
    draft: Bytes

    @property
    def total(self) -> int:
        return sum((self.first, *self.layers, self.last, self.draft), Bytes()).total


@dataclass(frozen=True)
class RankWeights:
    """Bytes on one rank. draft_bytes is part of none of the others; wo_a_bytes is part of
    sharded_bytes.
    """

    experts_bytes: int
    sharded_bytes: int
    replicated_bytes: int
    draft_bytes: int
    wo_a_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.experts_bytes + self.sharded_bytes + self.replicated_bytes + self.draft_bytes


@functools.lru_cache(maxsize=32)
def inventory(config: V4Config) -> Inventory:
    """Bytes of `config`'s checkpoint; each distinct kind of layer is enumerated once."""
    empty = replace(config, layers=(), draft="none", num_draft_layers=0)
    ends = list(tensor_specs(empty).values())
    per_kind: dict[tuple[object, object], Bytes] = {}
    for layer in config.layers:
        key = (layer.kind, layer.routing)
        if key not in per_kind:
            one = tensor_specs(replace(empty, layers=(layer,))).values()
            per_kind[key] = _tally(s for s in one if s.name.startswith("layers."))
    draft = tensor_specs(replace(config, layers=())).values()
    return Inventory(
        first=_tally(s for s in ends if s.component is Component.EMBED),
        layers=tuple(per_kind[layer.kind, layer.routing] for layer in config.layers),
        last=_tally(s for s in ends if s.component is not Component.EMBED),
        draft=_tally(s for s in draft if s.is_draft),
    )


def pipeline_layers(num_layers: int, pp: int) -> tuple[range, ...]:
    """Layers of each stage: even, the remainder to the stages before the last. Source: vLLM's
    get_pp_indices.
    """
    sizes = [num_layers // pp] * pp
    for i in range(2, num_layers % pp + 2):
        sizes[-i] += 1
    starts = [sum(sizes[:i]) for i in range(pp)]
    return tuple(range(start, start + size) for start, size in zip(starts, sizes, strict=True))


@functools.lru_cache(maxsize=256)
def stage_weights(
    config: V4Config, *, tp: int, dp: int, ep: bool, pp: int, with_draft: bool, weights: Inventory | None = None
) -> tuple[RankWeights, ...]:
    """Weights of one rank of each pipeline stage.

    tp: attention tensor-parallel ranks; dp: attention replicas beside each other in a stage; ep:
    whole experts per rank; weights: where they are not those that `config` implies. The draft sits
    on the last stage.
    """
    inv = weights or inventory(config)
    stages = []
    for number, layers in enumerate(pipeline_layers(config.num_hidden_layers, pp)):
        body = sum((inv.layers[i] for i in layers), inv.first if number == 0 else Bytes())
        body += inv.last if number == pp - 1 else Bytes()
        draft = inv.draft if with_draft and number == pp - 1 else Bytes()
        experts = _expert_share(config, tp * dp, ep)
        stages.append(
            RankWeights(
                experts_bytes=round(body.experts * experts),
                sharded_bytes=-(-body.sharded // tp),
                replicated_bytes=body.replicated,
                draft_bytes=round(draft.experts * experts) + -(-draft.sharded // tp) + draft.replicated,
                wo_a_bytes=-(-(body.wo_a + draft.wo_a) // tp),
            )
        )
    return tuple(stages)


def _expert_share(config: V4Config, ranks: int, ep: bool) -> float:
    num = config.n_routed_experts
    return -(-num // ranks) / num if ep else 1 / ranks


def _tally(specs: Iterable[TensorSpec]) -> Bytes:
    experts = sharded = replicated = wo_a = 0
    for spec in specs:
        if spec.is_routed_expert:
            experts += spec.nbytes
        elif spec.shard_axis is None:
            replicated += spec.nbytes
        else:
            sharded += spec.nbytes
            wo_a += spec.nbytes if ".wo_a." in spec.name else 0
    return Bytes(experts, sharded, replicated, wo_a)
