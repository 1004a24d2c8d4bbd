# SPDX-License-Identifier: Apache-2.0
"""What a running server says of itself at GET /dsv4/status: one type, for both plugins, the doctor
and the tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from typing import Any

from dsv4.errors import StatusError
from dsv4.machine.compat import Engine, dsv4_version

STATUS_ROUTE = "/dsv4/status"
STATUS_RPC = "dsv4_status"  # the name under which a worker is asked
OUR_PACKAGES = ("dsv4_vllm", "dsv4_sglang")


@dataclass(frozen=True)
class ServedOp:
    """The implementation of one operator, and why it was chosen."""

    impl: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class WorkerStatus:
    """What one worker runs, told by itself.

    model_class, model_runner, cache_class: dotted names; cache_class holds the KV pages.
    kv_format, index_format: as in `dsv4.model.kv_layout`, None when the model is not dsv4's.
    quant_method: class of the checkpoint's quantisation.
    ops: by operator, those that have been called so far.
    draft_class: dotted name of the model that drafts, None without; drafted: its tokens a step.
    """

    rank: int
    engine_version: str
    model_class: str
    served_by_dsv4: bool
    attention_backends: tuple[str, ...]
    model_runner: str
    cache_class: str | None
    kv_format: str | None
    index_format: str | None
    quant_method: str
    device: str
    dtype: str
    ops: Mapping[str, ServedOp]
    draft_class: str | None
    drafted: int

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"attention_backends": list(self.attention_backends)}

    @staticmethod
    def from_json(raw: Mapping[str, Any]) -> WorkerStatus:
        """Raises StatusError for what `to_json` does not write; keys of a newer dsv4 are left
        out."""
        known = _known(WorkerStatus, raw)
        try:
            ops = {str(op): ServedOp(str(v["impl"]), str(v["reason"])) for op, v in raw["ops"].items()}
            return WorkerStatus(**known | {"ops": ops, "attention_backends": tuple(raw["attention_backends"])})
        except (TypeError, KeyError, AttributeError) as e:
            raise StatusError(f"a worker's status is malformed ({e})") from e


@dataclass(frozen=True, kw_only=True)
class Acceptance:
    """How a server's drafts have fared since it started.

    tokens_per_step: of a request, with the one that needs no draft
    by_position: of each drafted token, the part of the steps that kept it; None where the engine
    does not count it
    """

    tokens_per_step: float
    by_position: tuple[float, ...] | None

    @staticmethod
    def from_json(raw: Mapping[str, Any]) -> Acceptance:
        """Raises StatusError for what is malformed."""
        try:
            kept = raw["by_position"]
            return Acceptance(
                tokens_per_step=float(raw["tokens_per_step"]),
                by_position=None if kept is None else tuple(float(x) for x in kept),
            )
        except (TypeError, KeyError, ValueError) as e:
            raise StatusError(f"a server's acceptance of drafts is malformed ({e})") from e


@dataclass(frozen=True, kw_only=True)
class ServerStatus:
    """A server and its workers. acceptance: None without drafts, and before the first are verified
    or where the engine was told not to count."""

    engine: str
    engine_version: str
    dsv4_version: str
    workers: tuple[WorkerStatus, ...]
    acceptance: Acceptance | None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"workers": [worker.to_json() for worker in self.workers]}

    @staticmethod
    def from_json(raw: Mapping[str, Any]) -> ServerStatus:
        """Raises StatusError naming what is missing. Workers that are no objects have not reported
        yet, and are left out."""
        known = _known(ServerStatus, raw)
        workers = tuple(WorkerStatus.from_json(w) for w in raw["workers"] or [] if isinstance(w, Mapping))
        told = known["acceptance"]
        acceptance = None if told is None else Acceptance.from_json(told)
        return ServerStatus(**known | {"workers": workers, "acceptance": acceptance})

    @property
    def foreign(self) -> tuple[WorkerStatus, ...]:
        """Workers that run a model of somebody else."""
        return tuple(w for w in self.workers if not w.model_class.startswith(OUR_PACKAGES))


def answer(
    engine: Engine, workers: Sequence[Mapping[str, Any]], acceptance: Acceptance | None = None
) -> dict[str, Any]:
    """The body of the route. workers: what each worker's `WorkerStatus.to_json` gave."""
    return ServerStatus(
        engine=engine,
        engine_version=version(engine),
        dsv4_version=dsv4_version(),
        workers=tuple(WorkerStatus.from_json(worker) for worker in workers),
        acceptance=acceptance,
    ).to_json()


def dotted(instance: object) -> str:
    """Where the class of `instance` is defined, as `package.module.Class`; "none" for None."""
    if instance is None:
        return "none"
    return f"{type(instance).__module__}.{type(instance).__qualname__}"


def _known(kind: type[WorkerStatus] | type[ServerStatus], raw: Mapping[str, Any]) -> dict[str, Any]:
    names = [field.name for field in fields(kind)]
    missing = [name for name in names if name not in raw]
    if missing:
        raise StatusError(
            f"a server's status lacks {', '.join(missing)}: it runs another version of dsv4, use that one's doctor"
        )
    return {name: raw[name] for name in names}
