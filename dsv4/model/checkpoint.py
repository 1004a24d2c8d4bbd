# SPDX-License-Identifier: Apache-2.0
"""Tensors of a DeepSeek-V4 checkpoint: names, shapes, dtypes, tensor-parallel axes; validation from headers alone.

`tensor_specs` says what config.json implies, `read_headers` what a folder holds, `validate` compares the two. No weight
is ever read. Dtypes are spelled as in safetensors. Source: spec section 2.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError, safe_open

from dsv4.errors import CheckpointError
from dsv4.model.config import FP4_BLOCK, FP8_BLOCK, DraftKind, ExpertDtype, LayerKind, LayerSpec, Routing, V4Config

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
DRAFT_PREFIX = "mtp."
ITEMSIZE = {"F8_E4M3": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "BF16": 2, "F16": 2, "F32": 4, "I32": 4, "F64": 8, "I64": 8}

ScaleDtype = Literal["F8_E8M0", "F32"]


class Component(str, Enum):
    """What a tensor belongs to, for byte accounting. Every `mtp.*` tensor is MTP."""

    EMBED = "embed"
    HEAD = "head"
    ATTENTION = "attention"
    COMPRESSOR = "compressor"
    INDEXER = "indexer"
    ROUTER = "router"
    TID2EID = "tid2eid"
    ROUTED_EXPERTS = "routed_experts"
    SHARED_EXPERTS = "shared_experts"
    MHC = "mhc"
    NORM = "norm"
    MTP = "mtp"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor that config.json implies.

    shape: as stored (FP4 weights hold two elements per I8). shard_axis: axis split over tensor-parallel ranks, None
    when replicated. alternates: other dtypes a legal checkpoint may use; the loader decides by the tensor itself.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    component: Component
    shard_axis: int | None = None
    alternates: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor, unsharded."""
        return math.prod(self.shape) * ITEMSIZE[self.dtype]

    @property
    def is_draft(self) -> bool:
        """Belongs to the speculative draft, which may be absent or skipped."""
        return self.name.startswith(DRAFT_PREFIX)

    @property
    def is_routed_expert(self) -> bool:
        """Belongs to one routed expert, of the backbone or of the draft (expert parallelism moves it whole)."""
        return ".ffn.experts." in self.name


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """One tensor that a folder holds."""

    file: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor; 0 for a dtype that no V4 checkpoint uses."""
        return math.prod(self.shape) * ITEMSIZE.get(self.dtype, 0)


@dataclass(frozen=True)
class CheckpointReport:
    """A folder that passed `validate`.

    draft: the draft its tensors hold ("none" when `mtp.*` is absent). ignored: `mtp.*` tensors of a draft that
    config.json does not declare.
    """

    folder: Path
    config: V4Config
    headers: Mapping[str, TensorHeader]
    draft: DraftKind
    expert_scale_dtype: str  # of layer 0's experts, as found
    ignored: tuple[str, ...]

    @property
    def total_bytes(self) -> int:
        return sum(header.nbytes for header in self.headers.values())

    @property
    def files(self) -> tuple[str, ...]:
        return tuple(sorted({header.file for header in self.headers.values()}))


# --------------------------------------------------------------------------------------------------------------------
# What config.json implies


def tensor_specs(config: V4Config, fp8_scale_dtype: ScaleDtype = "F8_E8M0", include_draft: bool = True) -> dict[str, TensorSpec]:
    """Every tensor of `config`'s checkpoint by name, backbone first, then the draft.

    fp8_scale_dtype: dtype of the block scales when experts are FP8 (Base checkpoints exist with either; the released
    FP4 checkpoints have F8_E8M0 throughout). Source: spec sections 1.3 and 2.1.
    """
    specs = {spec.name: spec for spec in _backbone(config)}
    if include_draft:
        specs |= {spec.name: spec for spec in _draft(config)}
    if config.expert_dtype == "fp8":
        return {name: _either_scale(spec, fp8_scale_dtype) for name, spec in specs.items()}
    return specs


def bytes_by_component(config: V4Config) -> dict[Component, int]:
    """Checkpoint bytes of each component."""
    total: dict[Component, int] = defaultdict(int)
    for spec in tensor_specs(config).values():
        total[spec.component] += spec.nbytes
    return dict(total)


def _either_scale(spec: TensorSpec, dtype: ScaleDtype) -> TensorSpec:
    if not spec.name.endswith(".scale"):
        return spec
    return replace(spec, dtype=dtype, alternates=("F32" if dtype == "F8_E8M0" else "F8_E8M0",))


def _backbone(c: V4Config) -> Iterator[TensorSpec]:
    yield TensorSpec("embed.weight", (c.vocab_size, c.hidden_size), "BF16", Component.EMBED, 0)
    yield TensorSpec("head.weight", (c.vocab_size, c.hidden_size), "BF16", Component.HEAD, 0)
    yield TensorSpec("norm.weight", (c.hidden_size,), "BF16", Component.NORM)
    yield from _hc_head(c, "")
    for layer in c.layers:
        yield from _block(c, layer, f"layers.{layer.index}.")


def _draft(c: V4Config) -> Iterator[TensorSpec]:
    for stage in range(c.num_draft_layers):
        layer = LayerSpec(c.num_hidden_layers + stage, LayerKind.SWA, Routing.TOPK)
        prefix = f"{DRAFT_PREFIX}{stage}."
        extras = _mtp_extras(c, prefix) if c.draft == "mtp" else _dspark_extras(c, stage, prefix)
        for spec in (*_block(c, layer, prefix), *extras):
            yield replace(spec, component=Component.MTP)


def _mtp_extras(c: V4Config, p: str) -> Iterator[TensorSpec]:
    d = c.hidden_size
    yield from _fp8(p + "e_proj", d, d, Component.MTP)
    yield from _fp8(p + "h_proj", d, d, Component.MTP)
    for norm in ("enorm", "hnorm", "norm"):
        yield TensorSpec(f"{p}{norm}.weight", (d,), "BF16", Component.MTP)
    yield from _hc_head(c, p)


def _dspark_extras(c: V4Config, stage: int, p: str) -> Iterator[TensorSpec]:
    d, rank = c.hidden_size, c.dspark_markov_rank
    if stage == 0:
        yield from _fp8(p + "main_proj", d, d * len(c.dspark_target_layer_ids), Component.MTP)
        yield TensorSpec(p + "main_norm.weight", (d,), "BF16", Component.MTP)
    if stage == c.num_draft_layers - 1:
        yield TensorSpec(p + "norm.weight", (d,), "BF16", Component.MTP)
        yield from _hc_head(c, p)
        yield TensorSpec(p + "markov_head.markov_w1.weight", (c.vocab_size, rank), "BF16", Component.MTP, 0)
        yield TensorSpec(p + "markov_head.markov_w2.weight", (c.vocab_size, rank), "BF16", Component.MTP, 0)
        yield TensorSpec(p + "confidence_head.proj.weight", (1, d + rank), "BF16", Component.MTP)


def _block(c: V4Config, layer: LayerSpec, p: str) -> Iterator[TensorSpec]:
    yield from _attention(c, layer, p + "attn.")
    yield from _ffn(c, layer, p + "ffn.")
    for norm in ("attn_norm", "ffn_norm"):
        yield TensorSpec(f"{p}{norm}.weight", (c.hidden_size,), "BF16", Component.NORM)
    mixes = (2 + c.hc_mult) * c.hc_mult  # pre, post, comb: 24 in V4
    for site in ("hc_attn", "hc_ffn"):
        yield TensorSpec(f"{p}{site}_fn", (mixes, c.hc_mult * c.hidden_size), "F32", Component.MHC)
        yield TensorSpec(f"{p}{site}_base", (mixes,), "F32", Component.MHC)
        yield TensorSpec(f"{p}{site}_scale", (3,), "F32", Component.MHC)


def _attention(c: V4Config, layer: LayerSpec, p: str) -> Iterator[TensorSpec]:
    yield TensorSpec(p + "attn_sink", (c.num_attention_heads,), "F32", Component.ATTENTION, 0)
    yield TensorSpec(p + "q_norm.weight", (c.q_lora_rank,), "BF16", Component.NORM)
    yield TensorSpec(p + "kv_norm.weight", (c.head_dim,), "BF16", Component.NORM)
    o_rank = c.o_groups * c.o_lora_rank
    yield from _fp8(p + "wq_a", c.q_lora_rank, c.hidden_size, Component.ATTENTION)
    yield from _fp8(p + "wq_b", c.num_attention_heads * c.head_dim, c.q_lora_rank, Component.ATTENTION, 0)
    yield from _fp8(p + "wkv", c.head_dim, c.hidden_size, Component.ATTENTION)
    yield from _fp8(p + "wo_a", o_rank, c.heads_per_group * c.head_dim, Component.ATTENTION, 0)
    yield from _fp8(p + "wo_b", c.hidden_size, o_rank, Component.ATTENTION, 1)
    if layer.kind is not LayerKind.SWA:
        yield from _compressor(c, layer, p + "compressor.", c.head_dim, Component.COMPRESSOR)
    if layer.kind is LayerKind.CSA:
        yield from _fp8(p + "indexer.wq_b", c.index_n_heads * c.index_head_dim, c.q_lora_rank, Component.INDEXER)
        yield TensorSpec(p + "indexer.weights_proj.weight", (c.index_n_heads, c.hidden_size), "BF16", Component.INDEXER)
        yield from _compressor(c, layer, p + "indexer.compressor.", c.index_head_dim, Component.INDEXER)


def _compressor(c: V4Config, layer: LayerSpec, p: str, head_dim: int, component: Component) -> Iterator[TensorSpec]:
    width = layer.overlap * head_dim
    for linear in ("wkv", "wgate"):
        yield TensorSpec(f"{p}{linear}.weight", (width, c.hidden_size), "BF16", component)
    yield TensorSpec(p + "ape", (layer.compress_ratio, width), "F32", component)
    yield TensorSpec(p + "norm.weight", (head_dim,), "BF16", Component.NORM)


def _ffn(c: V4Config, layer: LayerSpec, p: str) -> Iterator[TensorSpec]:
    d, i = c.hidden_size, c.moe_intermediate_size
    yield TensorSpec(p + "gate.weight", (c.n_routed_experts, d), "BF16", Component.ROUTER)
    if layer.routing is Routing.HASH:
        yield TensorSpec(p + "gate.tid2eid", (c.vocab_size, c.num_experts_per_tok), "I64", Component.TID2EID, None, ("I32",))
    else:
        yield TensorSpec(p + "gate.bias", (c.n_routed_experts,), "F32", Component.ROUTER)
    for name, rows, columns, axis in (("w1", i, d, 0), ("w3", i, d, 0), ("w2", d, i, 1)):
        shared = i * c.n_shared_experts
        shared_rows, shared_columns = (shared, d) if axis == 0 else (d, shared)
        yield from _fp8(f"{p}shared_experts.{name}", shared_rows, shared_columns, Component.SHARED_EXPERTS, axis)
        for expert in range(c.n_routed_experts):
            yield from _routed(f"{p}experts.{expert}.{name}", rows, columns, c.expert_dtype, axis)


def _routed(p: str, rows: int, columns: int, dtype: ExpertDtype, axis: int) -> tuple[TensorSpec, TensorSpec]:
    component = Component.ROUTED_EXPERTS
    if dtype == "fp8":
        return _fp8(p, rows, columns, component, axis)
    return (
        TensorSpec(p + ".weight", (rows, columns // 2), "I8", component, axis),
        TensorSpec(p + ".scale", (rows, -(-columns // FP4_BLOCK)), "F8_E8M0", component, axis),
    )


def _fp8(p: str, rows: int, columns: int, component: Component, axis: int | None = None) -> tuple[TensorSpec, TensorSpec]:
    blocks = (-(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK))
    return (
        TensorSpec(p + ".weight", (rows, columns), "F8_E4M3", component, axis),
        TensorSpec(p + ".scale", blocks, "F8_E8M0", component, axis),
    )


def _hc_head(c: V4Config, p: str) -> Iterator[TensorSpec]:
    component = Component.MTP if p else Component.MHC
    yield TensorSpec(p + "hc_head_fn", (c.hc_mult, c.hc_mult * c.hidden_size), "F32", component)
    yield TensorSpec(p + "hc_head_base", (c.hc_mult,), "F32", component)
    yield TensorSpec(p + "hc_head_scale", (1,), "F32", component)


# --------------------------------------------------------------------------------------------------------------------
# What a folder holds


def read_headers(folder: str | Path) -> dict[str, TensorHeader]:
    """Header of every tensor in `folder`, read from the shards' first bytes.

    With an index file the shards it names are read, else every *.safetensors file. Raises CheckpointError naming every
    absent or truncated shard, and every tensor that the index promises and the shards do not hold.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; give a downloaded checkpoint")
    index = _read_index(folder)
    files = sorted(set(index.values())) if index is not None else sorted(f.name for f in folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder}: holds neither {INDEX_FILE} nor a *.safetensors file; is the download complete?")
    _refuse_absent(folder, files)
    headers, problems = _read_shards(folder, files)
    if problems:
        raise CheckpointError(_list(f"{folder}: {len(problems)} of {len(files)} shards cannot be read; download them again", problems))
    _check_index(folder, index or {}, headers)
    return headers


def _read_index(folder: Path) -> dict[str, str] | None:
    file = folder / INDEX_FILE
    if not file.exists():
        return None
    try:
        weight_map = json.loads(file.read_text())["weight_map"]
        return {str(name): str(shard) for name, shard in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as e:
        raise CheckpointError(f"{file}: is no index with a weight_map ({e}); download it again") from e


def _refuse_absent(folder: Path, files: Sequence[str]) -> None:
    absent = [name for name in files if not (folder / name).is_file()]
    if absent:
        title = f"{folder}: {len(absent)} of {len(files)} shards named by {INDEX_FILE} are missing; download them"
        raise CheckpointError(_list(title, absent))


def _read_shards(folder: Path, files: Sequence[str]) -> tuple[dict[str, TensorHeader], list[str]]:
    headers: dict[str, TensorHeader] = {}
    problems: list[str] = []
    for file in files:
        try:
            # "numpy" keeps torch out; get_slice reads the header only, so dtypes numpy lacks are fine.
            with safe_open(folder / file, framework="numpy") as shard:
                names = list(shard.keys())
                for name in names:
                    tensor = shard.get_slice(name)
                    if name in headers:
                        problems.append(f"{file}: {name} is also in {headers[name].file}")
                    headers[name] = TensorHeader(file, tensor.get_dtype(), tuple(tensor.get_shape()))
        except (SafetensorError, OSError) as e:
            size = (folder / file).stat().st_size
            problems.append(f"{file}: truncated or not safetensors ({e}; {size} bytes on disk)")
    return headers, problems


def _check_index(folder: Path, index: Mapping[str, str], headers: Mapping[str, TensorHeader]) -> None:
    lost = [f"{name}: not in {shard}" for name, shard in index.items() if name not in headers or headers[name].file != shard]
    if lost:
        title = f"{folder / INDEX_FILE}: {len(lost)} of {len(index)} tensors are not in the shard it names; download the shards again"
        raise CheckpointError(_list(title, lost))


# --------------------------------------------------------------------------------------------------------------------
# The comparison


def validate(folder: str | Path, config: V4Config | None = None, require_draft: bool = False) -> CheckpointReport:
    """Compare `folder`'s headers with `config` (default: its own config.json).

    `mtp.*` may be absent altogether unless `require_draft`; when some of it is there, all of it must be. Raises
    ConfigError for a bad config.json and CheckpointError naming every missing, extra or mis-typed tensor.
    """
    folder = Path(folder)
    headers = read_headers(folder)
    config = config or V4Config.from_path(folder)
    has_draft = any(name.startswith(DRAFT_PREFIX) for name in headers)
    if require_draft and config.draft == "none":
        raise CheckpointError(
            f"{folder}: config.json declares no draft (num_nextn_predict_layers, dspark_block_size); turn speculation off"
        )
    specs = tensor_specs(config, include_draft=has_draft or require_draft)
    ignored = tuple(n for n in headers if n.startswith(DRAFT_PREFIX)) if config.draft == "none" else ()
    _compare(folder, config, specs, {n: h for n, h in headers.items() if n not in set(ignored)})
    return CheckpointReport(
        folder=folder,
        config=config,
        headers=headers,
        draft=config.draft if has_draft else "none",
        expert_scale_dtype=headers["layers.0.ffn.experts.0.w1.scale"].dtype,
        ignored=ignored,
    )


def _compare(folder: Path, config: V4Config, specs: Mapping[str, TensorSpec], headers: Mapping[str, TensorHeader]) -> None:
    missing = [name for name in specs if name not in headers]
    extra = [name for name in headers if name not in specs]
    shape, dtype = [], []
    for name, spec in specs.items():
        got = headers.get(name)
        if got is None:
            continue
        if got.shape != spec.shape:
            shape.append((name, f"has shape {list(got.shape)}, config.json implies {list(spec.shape)}"))
        if got.dtype != spec.dtype and got.dtype not in spec.alternates:
            want = " or ".join((spec.dtype, *spec.alternates))
            dtype.append((name, f"has dtype {got.dtype}, expected {want}"))
    if not (missing or extra or shape or dtype):
        return
    counts = f"{len(missing)} missing, {len(extra)} extra, {len(shape)} misshapen, {len(dtype)} mis-typed of {len(specs)} tensors"
    hint = _hint(config, specs, headers, missing, extra, len(shape))
    lines = _group([(n, "is missing") for n in missing] + [(n, "is not a tensor of this model") for n in extra] + shape + dtype)
    raise CheckpointError(_list(f"{folder}: {counts}; {hint}", lines))


_FAMILY_OF_HIDDEN_SIZE = {4096: "Flash", 7168: "Pro"}


def _hint(
    config: V4Config,
    specs: Mapping[str, TensorSpec],
    headers: Mapping[str, TensorHeader],
    missing: Sequence[str],
    extra: Sequence[str],
    num_misshapen: int,
) -> str:
    """The likeliest cause, as one question or instruction."""
    embed = headers.get("embed.weight")
    if embed is not None and len(embed.shape) == 2 and embed.shape[1] != config.hidden_size:
        got, want = embed.shape[1], config.hidden_size
        families = _FAMILY_OF_HIDDEN_SIZE.get(got), _FAMILY_OF_HIDDEN_SIZE.get(want)
        guess = f"is this a {families[0]} checkpoint with a {families[1]} config?" if all(families) else "do the two belong together?"
        return f"its hidden size is {got}, config.json says {want}: {guess}"
    if any(name.startswith("model.") for name in extra):
        return "these are HF transformers' names; use the released checkpoint"
    if any(name.endswith(("weight_scale_2", "input_scale", "weight_packed")) for name in extra):
        return "this looks like an NVFP4 or other conversion; use the released checkpoint"
    expert = headers.get("layers.0.ffn.experts.0.w1.weight")
    if expert is not None and expert.dtype != specs["layers.0.ffn.experts.0.w1.weight"].dtype:
        found = {"I8": "fp4", "F8_E4M3": "fp8"}.get(expert.dtype, expert.dtype)
        return f'experts are {found}, config.json says {config.expert_dtype}: set "expert_dtype" to "{found}" in config.json'
    if missing and all(name.startswith(DRAFT_PREFIX) for name in missing):
        return f"the {config.draft} draft is incomplete: download it again, or remove mtp.* altogether"
    if num_misshapen > len(specs) // 2:
        return "is this a Flash checkpoint with a Pro config?"
    return "download the checkpoint again, or give the config.json that came with it"


_LITERAL = 8  # groups up to this size are listed tensor by tensor


def _group(problems: Sequence[tuple[str, str]]) -> list[str]:
    """One line per problem; many tensors of one pattern share a line, `layers.{0-42}.attn.wq_b.weight`."""
    groups: dict[tuple[str, str], list[tuple[int, ...]]] = defaultdict(list)
    for name, problem in problems:
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "{}", name)
        groups[pattern, problem].append(tuple(int(n) for n in re.findall(r"(?<=\.)(\d+)(?=\.)", name)))
    return [f"{name} {problem}" for (pattern, problem), indices in groups.items() for name in _names(pattern, indices)]


def _names(pattern: str, indices: Sequence[tuple[int, ...]]) -> list[str]:
    if len(indices) <= _LITERAL:
        return [pattern.format(*index) for index in indices]
    return [pattern.format(*box) for box in _boxes(frozenset(indices))]


def _boxes(indices: frozenset[tuple[int, ...]]) -> list[tuple[str, ...]]:
    """Cover `indices` exactly by products of ranges, one string per axis."""
    if not all(indices):
        return [()]
    rests: dict[int, set[tuple[int, ...]]] = defaultdict(set)
    for first, *rest in indices:
        rests[first].add(tuple(rest))
    alike: dict[frozenset[tuple[int, ...]], list[int]] = defaultdict(list)
    for first in sorted(rests):
        alike[frozenset(rests[first])].append(first)
    return [(_ranges(firsts), *box) for rest, firsts in alike.items() for box in _boxes(rest)]


def _ranges(numbers: Sequence[int]) -> str:
    """`3`, or `{0-5,8}`. numbers: sorted."""
    parts: list[list[int]] = []
    for n in numbers:
        if parts and parts[-1][1] == n - 1:
            parts[-1][1] = n
        else:
            parts.append([n, n])
    text = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
    return text if len(numbers) == 1 else f"{{{text}}}"


def _list(title: str, items: Sequence[str]) -> str:
    return "\n  ".join((title, *items))
