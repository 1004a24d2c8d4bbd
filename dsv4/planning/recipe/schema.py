# SPDX-License-Identifier: Apache-2.0
"""Schema of a recipe: one checkpoint on one topology with one plan, flat, every number with its
evidence.

`recipes/recipe.schema.json` is generated from `Recipe`; tests keep the two equal.
"""

from __future__ import annotations

import datetime
import functools
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    ValidationError,
    field_validator,
    model_validator,
)

from dsv4.data import data_folder, read_yaml
from dsv4.errors import HardwareError, PlanError, RecipeError, nearest
from dsv4.machine.compat import SUPPORTED, TESTED_VERSIONS, Engine
from dsv4.machine.hardware import GIB, find_gpu
from dsv4.model.kv_layout import IndexFormat, KvFormat
from dsv4.planning.deployment import MAX_CONTEXT, MOST_CAPTURED, Deployment, Speculation, find_checkpoint, usual_state
from dsv4.planning.memory.proof import Proof, roomier_state

# Flags that the typed fields render. A recipe that repeats one in extra_args would contradict
# itself one day.
TYPED_FLAGS = frozenset(
    [
        "--model",
        "--model-path",
        "--revision",
        "--tensor-parallel-size",
        "-tp",
        "--tp",
        "--tp-size",
        "--data-parallel-size",
        "-dp",
        "--dp",
        "--dp-size",
        "--attn-dp-size",
        "--enable-dp-attention",
        "--enable-expert-parallel",
        "-ep",
        "--ep",
        "--ep-size",
        "--pipeline-parallel-size",
        "-pp",
        "--pp-size",
        "--max-model-len",
        "--context-length",
        "--max-num-batched-tokens",
        "--chunked-prefill-size",
        "--max-num-seqs",
        "--max-running-requests",
        "--async-scheduling",
        "--no-async-scheduling",
        "--disable-overlap-schedule",
        "--gpu-memory-utilization",
        "--mem-fraction-static",
        "--kv-cache-dtype",
        "--attention-config.indexer_kv_dtype",
        "--enable-deepseek-v4-fp4-indexer",
        "--swa-full-tokens-ratio",
        "--speculative-config",
        "--speculative-algorithm",
        "--speculative-num-steps",
        "--speculative-eagle-topk",
        "--speculative-num-draft-tokens",
        "--moe-backend",
        "--moe-runner-backend",
        "--all2all-backend",
        "--moe-a2a-backend",
        "--attention-backend",
        "--dsv4-attn-backend",
        "--compilation-config",
        "--tokenizer-mode",
        "--tool-call-parser",
        "--reasoning-parser",
        "--enable-auto-tool-choice",
        "--nnodes",
        "--node-rank",
        "--dist-init-addr",
        "--master-addr",
        "--master-port",
        "--data-parallel-address",
        "--data-parallel-size-local",
        "--data-parallel-start-rank",
        "--block-size",
    ]
)

MAX_GPUS = 576  # eight NVL72 racks
Gpus = Annotated[StrictInt, Field(ge=1, le=MAX_GPUS)]
Requests = Annotated[StrictInt, Field(ge=1, le=65_536)]
Gib = Annotated[float, Field(ge=0)]
Span = Annotated[
    list[float],
    Field(min_length=2, max_length=2, description="[with the high end of every overhead, with the low end]"),
]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CheckpointSection(_Section):
    id: StrictStr = Field(description="flash, flash-0731, pro or pro-0813")
    revision: StrictStr = Field(description="git revision of the repository; main until a record pins one")


class EngineSection(_Section):
    name: Engine
    versions: StrictStr | None = Field(
        default=None,
        description="PEP 440 range, where it is narrower than what dsv4 supports; at least one version dsv4 is tested with",
    )
    serves_with: Literal["native", "plugin"] = Field(description="the engine's own V4, or dsv4's kernels")


class HardwareSection(_Section):
    gpu: StrictStr
    count: Gpus
    nodes: Gpus


class ParallelSection(_Section):
    tp: Gpus
    dp: Gpus
    ep: StrictBool
    pp: Gpus


class LengthsSection(_Section):
    max_model_len: Annotated[StrictInt, Field(ge=1, le=MAX_CONTEXT)]
    concurrency: Requests = Field(description="requests of max_model_len that must fit at once, over all replicas")


class BatchingSection(_Section):
    max_num_batched_tokens: Annotated[StrictInt, Field(ge=256, le=65_536)] = Field(
        description="tokens per step and replica; SGLang's chunked prefill size"
    )
    max_num_seqs: Requests = Field(description="requests per replica")
    async_scheduling: StrictBool


class CacheSection(_Section):
    kv_dtype: Literal["fp8_ds_mla", "plain"]
    index_dtype: Literal["fp8", "mxfp4", "plain"]
    swa_full_tokens_ratio: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None, description="SGLang only; absent: windows are sized from max_num_seqs"
    )


class SpeculativeSection(_Section):
    method: Literal["none", "mtp", "dspark"]
    num_tokens: Annotated[StrictInt, Field(ge=0, le=16)]
    sampling: Literal["greedy"] | None = Field(
        default=None, description="how drafts are drawn; what is served follows the request's own sampling in any case"
    )
    why: StrictStr | None = Field(default=None, description="why no drafts, where the checkpoint carries some")

    @model_validator(mode="after")
    def _says_which_or_why(self) -> SpeculativeSection:
        if self.method != "none" and (self.sampling is None or self.why is not None):
            raise ValueError(f"method {self.method} needs sampling, and no why")
        if self.method == "none" and (self.why is None or self.sampling is not None):
            raise ValueError("method none needs a why, and no sampling")
        return self


class KernelsSection(_Section):
    moe: StrictStr
    attention: StrictStr = "auto"
    all_to_all: StrictStr = "none"
    graphs: Literal["default", "decode_only"] = "default"
    max_capture_size: Annotated[StrictInt, Field(ge=1, le=MOST_CAPTURED)] | None = Field(
        default=None, description="vLLM only: tokens of the largest step, mixed ones too, that is captured"
    )


class ProofSection(_Section):
    method: Literal["formula", "formula+engine"]
    weights_gib: Gib
    budget_gib: Gib
    pool_gib: Annotated[list[float], Field(min_length=2, max_length=2)]
    start_gib: Annotated[float, Field(ge=0, description="one request with the whole in-flight reserve")]
    reserve_gib: Annotated[float, Field(ge=0, description="the part of start_gib that the context does not decide")]
    decoding_gib: Annotated[float, Field(ge=0, description="one request once it decodes")]
    need_gib: Annotated[float, Field(ge=0, description="lengths.concurrency requests, one being prefilled")]
    at_once: Annotated[list[int], Field(min_length=2, max_length=2, description="requests, over all replicas")]
    vllm_prints: Span | None = Field(
        description='vLLM\'s start-up line "Maximum concurrency" of one replica, which charges the reserve to every request'
    )
    max_context: Annotated[list[int], Field(min_length=2, max_length=2)]
    verdict: Literal["fits", "tight", "no"]


class MemorySection(_Section):
    fraction: Annotated[StrictFloat, Field(gt=0, lt=1)]
    proof: ProofSection


class EvidenceSection(_Section):
    kind: Literal["measured", "published", "derived"]
    source: StrictStr
    date: datetime.date
    engine_version: StrictStr
    says: StrictStr


class WhyNot(_Section):
    what: StrictStr
    why: StrictStr


class Recipe(_Section):
    """One checkpoint x topology x plan."""

    schema_version: Literal[1]
    id: Annotated[StrictStr, Field(pattern=r"^[a-z0-9][a-z0-9.-]+$")]
    title: StrictStr
    plan: Literal["latency", "throughput", "context"]
    status: Literal["verified", "unverified", "cannot_work"]
    record: StrictStr | None = Field(description="path of the committed benchmark record; required when verified")
    checkpoint: CheckpointSection
    engine: EngineSection
    hardware: HardwareSection
    parallel: ParallelSection
    lengths: LengthsSection
    batching: BatchingSection
    cache: CacheSection
    speculative: SpeculativeSection
    kernels: KernelsSection
    env: dict[Annotated[StrictStr, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")], StrictStr]
    extra_args: list[StrictStr]
    evidence: Annotated[list[EvidenceSection], Field(min_length=1)]
    constraints: list[StrictStr]
    why_not: list[WhyNot]
    memory: MemorySection

    @field_validator("engine")
    @classmethod
    def _known_versions(cls, engine: EngineSection) -> EngineSection:
        if engine.versions is None:
            return engine
        try:
            versions = SpecifierSet(engine.versions)
        except InvalidSpecifier as e:
            raise ValueError(f"versions {engine.versions!r} is not a PEP 440 range") from e
        tested = TESTED_VERSIONS[engine.name]
        if not any(v in versions for v in tested):
            raise ValueError(
                f"no tested {engine.name} is in {engine.versions!r}; dsv4 is tested with {', '.join(tested)}"
            )
        return engine

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        gpus = self.parallel.tp * self.parallel.dp * self.parallel.pp
        if gpus != self.hardware.count:
            raise ValueError(f"tp x dp x pp is {gpus}, hardware.count is {self.hardware.count}")
        for arg in self.extra_args:
            flag = arg.split("=")[0]
            if flag in TYPED_FLAGS:
                raise ValueError(f"extra_args {flag} restates a typed field; set the field instead")
        if self.status == "verified" and not self.record:
            raise ValueError("status verified needs the path of a committed record")
        if self.status == "cannot_work" and not self.why_not:
            raise ValueError("status cannot_work needs a why_not entry")
        return self

    @property
    def version_range(self) -> str:
        """PEP 440 range of the engine: the recipe's own, or what dsv4 supports."""
        return self.engine.versions or SUPPORTED[self.engine.name]

    @property
    def versions(self) -> tuple[str, ...]:
        """Tested versions of the engine in the recipe's range."""
        inside = SpecifierSet(self.version_range)
        return tuple(v for v in TESTED_VERSIONS[self.engine.name] if v in inside)

    @property
    def can_work(self) -> bool:
        return self.status != "cannot_work"

    def deployment(self) -> Deployment:
        """What the planner and the launcher need. Raises PlanError or HardwareError for unknown
        names and too many stages.
        """
        checkpoint = find_checkpoint(self.checkpoint.id)
        if self.parallel.pp > checkpoint.config.num_hidden_layers:
            raise PlanError(
                f"parallel.pp is {self.parallel.pp}, {checkpoint.id} has {checkpoint.config.num_hidden_layers} layers"
            )
        plugin = self.engine.serves_with == "plugin"
        deployment = Deployment(
            checkpoint=checkpoint,
            engine=self.engine.name,
            gpu=find_gpu(self.hardware.gpu),
            count=self.hardware.count,
            nodes=self.hardware.nodes,
            tp=self.parallel.tp,
            dp=self.parallel.dp,
            ep=self.parallel.ep,
            pp=self.parallel.pp,
            max_model_len=self.lengths.max_model_len,
            max_num_batched_tokens=self.batching.max_num_batched_tokens,
            max_num_seqs=self.batching.max_num_seqs,
            memory_fraction=self.memory.fraction,
            async_scheduling=self.batching.async_scheduling,
            kv=KvFormat(self.cache.kv_dtype),
            index=IndexFormat(self.cache.index_dtype),
            swa_full_tokens_ratio=self.cache.swa_full_tokens_ratio,
            speculation=Speculation(method=self.speculative.method, num_tokens=self.speculative.num_tokens),
            moe_backend=self.kernels.moe,
            a2a_backend=self.kernels.all_to_all,
            attention_backend=self.kernels.attention,
            decode_graphs_only=self.kernels.graphs == "decode_only",
            max_capture_size=self.kernels.max_capture_size,
            state=usual_state(self.engine.name, plugin),
        )
        chosen = plugin and deployment.engine == "vllm"  # as DSV4_STATE=auto does
        return replace(deployment, state=roomier_state(deployment)) if chosen else deployment


def read_recipe(path: Path) -> Recipe:
    """Read one recipe file. Raises RecipeError on one line."""
    raw = read_yaml(path)
    if not isinstance(raw, dict) or "schema_version" not in raw:
        raise RecipeError(f"{path}: is not a recipe (no schema_version); see dsv4 recipes show, or recipe.schema.json")
    return parse_recipe(raw, str(path))


def parse_recipe(raw: dict[str, Any], where: str) -> Recipe:
    """Validate `raw`. where: named in errors. Raises RecipeError on one line."""
    try:
        recipe = Recipe.model_validate(raw)
        recipe.deployment()
    except ValidationError as e:
        raise RecipeError(f"{where}: {_one_line(e)}") from e
    except (PlanError, HardwareError) as e:
        raise RecipeError(f"{where}: {e}") from e
    return recipe


def _one_line(e: ValidationError) -> str:
    error = e.errors(include_url=False)[0]
    place = ".".join(str(part) for part in error["loc"]) or "recipe"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        message = f"unknown field{_nearest_field(error['loc'])}"
    more = f" (and {e.error_count() - 1} more)" if e.error_count() > 1 else ""
    return " ".join(f"{place}: {message}{more}".split())


def _nearest_field(loc: tuple[int | str, ...]) -> str:
    model: Any = Recipe
    for part in loc[:-1]:
        field = model.model_fields.get(part)
        model = field.annotation if field is not None and hasattr(field.annotation, "model_fields") else None
        if model is None:
            return ""
    near = nearest(str(loc[-1]), model.model_fields, n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else f"; known: {', '.join(model.model_fields)}"


def recipe_paths() -> list[Path]:
    """Every shipped recipe file, by name."""
    return sorted(p for p in data_folder().glob("*/*.yaml") if p.parent.name != "configs")


@functools.cache
def shipped_recipes(gpu: str | None = None) -> tuple[Recipe, ...]:
    """Every shipped recipe, or those for the card with id `gpu` (recipes lie in a folder per
    card).
    """
    return tuple(read_recipe(p) for p in recipe_paths() if gpu is None or p.parent.name == gpu)


def find_recipe(name: str) -> tuple[Recipe, Path]:
    """The recipe with this id, or in this file. Raises RecipeError naming the nearest ids."""
    by_id = {p.stem: p for p in recipe_paths()}
    path = by_id.get(name)
    if path is None and (name.endswith((".yaml", ".yml")) or "/" in name):
        path = Path(name)
    if path is None:
        near = [i for i in by_id if i.startswith(name)][:3] if name else []
        near = near or nearest(name, by_id, cutoff=0.3)
        raise RecipeError(
            f"{name}: no such recipe; nearest: {', '.join(near)}"
            if near
            else f"{name}: no such recipe; see dsv4 recipes list"
        )
    return read_recipe(path), path


def proof_section(proof: Proof) -> dict[str, Any]:
    """The proof as a recipe's memory.proof states it, in GiB of the fullest rank."""

    def gib(n: float) -> float:
        return round(n / GIB, 2)

    printed = None
    if proof.printed_low is not None and proof.printed_high is not None:
        printed = (proof.printed_low, proof.printed_high)
    return {
        "method": "formula+engine",
        "weights_gib": gib(proof.weights_bytes),
        "budget_gib": gib(proof.budget_bytes),
        "pool_gib": [gib(proof.pool_low), gib(proof.pool_high)],
        "start_gib": gib(proof.start_bytes),
        "reserve_gib": gib(proof.reserve_bytes),
        "decoding_gib": gib(proof.decoding_bytes),
        "need_gib": gib(proof.need_bytes),
        "at_once": [proof.at_once_low, proof.at_once_high],
        "vllm_prints": None if printed is None else [round(n, 2) for n in printed],
        "max_context": [proof.max_context_low, proof.max_context_high],
        "verdict": proof.verdict.value,
    }


def json_schema() -> dict[str, Any]:
    """JSON schema of a recipe file."""
    schema = Recipe.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
