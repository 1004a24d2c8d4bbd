# SPDX-License-Identifier: Apache-2.0
"""What `dsv4 recipes check` asks an installed engine and what `dsv4.probe` answers: the types, and
their one way through JSON.

Reading refuses unknown and missing keys and values of another type (pydantic's ValidationError).
"""

from __future__ import annotations

from pydantic import ConfigDict, TypeAdapter
from pydantic.dataclasses import dataclass

from dsv4.machine.compat import Engine
from dsv4.model.config import DraftKind
from dsv4.model.kv_layout import IndexFormat, KvFormat, StateMapping

_EXACT = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True, kw_only=True, config=_EXACT)
class KvQuestion:
    """The geometry and scheduling that decide an engine's KV pool.

    checkpoint: dsv4's id, for whoever reads the config itself.
    draft_tokens: tokens per request of a verifying step, 0 without a draft.
    stages: decoder layers [start, stop) of each pipeline stage, the draft's with the last.
    pool_bytes: bytes of each stage's pool.
    """

    checkpoint: str
    state: StateMapping
    compress_ratios: tuple[int, ...]
    num_draft_layers: int
    speculative: DraftKind
    draft_tokens: int
    stages: tuple[tuple[int, int], ...]
    kv_dtype: KvFormat
    index_dtype: IndexFormat
    head_dim: int
    rope_dim: int
    index_head_dim: int
    sliding_window: int
    max_model_len: int
    max_num_batched_tokens: int
    max_num_seqs: int
    async_scheduling: bool
    dp: int
    swa_full_tokens_ratio: float | None
    pool_bytes: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, config=_EXACT)
class Case:
    """One deployment. argvs: arguments of every role's command; env: names of the variables it
    sets; kv: None to leave KV out.
    """

    id: str
    argvs: tuple[tuple[str, ...], ...] = ()
    env: tuple[str, ...] = ()
    kv: KvQuestion | None = None


@dataclass(frozen=True, kw_only=True, config=_EXACT)
class EngineQuestion:
    """Everything that one process is asked."""

    engine: Engine
    cases: tuple[Case, ...]


@dataclass(frozen=True, kw_only=True, config=_EXACT)
class BlockStage:
    """A pipeline stage of an engine that shares blocks between caches: bytes of a block, and of one
    request.
    """

    block_bytes: int
    request_bytes: int


@dataclass(frozen=True, kw_only=True, config=_EXACT)
class BlockPools:
    """What an engine plans that shares blocks between caches (vLLM). concurrency: requests of
    max_model_len at once.
    """

    in_flight_tokens: int
    stages: tuple[BlockStage, ...]
    num_blocks: int
    concurrency: float


@dataclass(frozen=True, kw_only=True, config=_EXACT)
class TokenStage:
    """A pipeline stage of an engine that sizes pools in tokens. fixed_bytes: what requests take
    whatever their length.
    """

    bytes_per_full_token: float
    fixed_bytes: float
    full_tokens: int


@dataclass(frozen=True, kw_only=True, config=_EXACT)
class TokenPools:
    """What an engine plans that sizes pools in tokens (SGLang)."""

    stages: tuple[TokenStage, ...]


@dataclass(frozen=True, kw_only=True, config=_EXACT)
class Answer:
    """errors: what the engine has against the arguments; kv_error: why its planner gave no `kv`,
    None when it did or was not asked.
    """

    errors: tuple[str, ...]
    kv: BlockPools | TokenPools | None = None
    kv_error: str | None = None


@dataclass(frozen=True, kw_only=True, config=_EXACT)
class EngineAnswer:
    """version: of the engine that answered; cases: by `Case.id`."""

    version: str
    cases: dict[str, Answer]


def to_json(value: EngineQuestion | EngineAnswer) -> str:
    """One line of JSON."""
    return TypeAdapter(type(value)).dump_json(value).decode()


def read_question(text: str) -> EngineQuestion:
    """What `to_json` wrote. Raises ValidationError."""
    return TypeAdapter(EngineQuestion).validate_json(text)


def read_answer(text: str) -> EngineAnswer:
    """What `to_json` wrote. Raises ValidationError."""
    return TypeAdapter(EngineAnswer).validate_json(text)
