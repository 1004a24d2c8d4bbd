# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint folder holds, by its safetensors headers, and whether that is what config.json
implies.

`read_headers` reads, `validate` compares with `dsv4.model.tensors`. No weight is ever read, but for
the hash tables, which are indices.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from safetensors import SafetensorError, safe_open

from dsv4.errors import CheckpointError
from dsv4.model import layouts
from dsv4.model.config import DraftKind, V4Config
from dsv4.model.tensors import DRAFT_PREFIX, ITEMSIZE, Component, TensorSpec, tensor_specs

INDEX_FILE = "model.safetensors.index.json"
_SHARD = re.compile(r"[^/\\\0]{1,200}\.safetensors")  # a file's name, not a path


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

    draft: the draft its tensors hold ("none" when `mtp.*` is absent). ignored: `mtp.*` tensors of a
    draft that config.json does not declare.
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


def read_headers(folder: str | Path) -> dict[str, TensorHeader]:
    """Header of every tensor in `folder`, read from the shards' first bytes.

    With an index file the shards it names are read, else every *.safetensors file. Raises
    CheckpointError naming every absent or truncated shard, and every tensor that the index promises
    and the shards do not hold.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; give a downloaded checkpoint")
    index = _read_index(folder)
    files = sorted(set(index.values())) if index is not None else sorted(f.name for f in folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(
            f"{folder}: holds neither {INDEX_FILE} nor a *.safetensors file; "
            + (layouts.of_files(folder) or "is the download complete?")
        )
    _refuse_absent(folder, files)
    headers, problems = _read_shards(folder, files)
    if problems:
        raise CheckpointError(
            _list(f"{folder}: {len(problems)} of {len(files)} shards cannot be read; download them again", problems)
        )
    _check_index(folder, index or {}, headers)
    return headers


def _read_index(folder: Path) -> dict[str, str] | None:
    file = folder / INDEX_FILE
    if not file.exists():
        return None
    try:
        weight_map = dict(json.loads(file.read_text())["weight_map"].items())
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as e:
        raise CheckpointError(f"{file}: is no index with a weight_map ({str(e)[:200]}); download it again") from e
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _SHARD.fullmatch(shard):
            raise CheckpointError(
                f"{file}: {name[:200]!r} is in {str(shard)[:80]!r}, which is no *.safetensors file of this folder;"
                " download it again"
            )
    return weight_map


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
            # "numpy" keeps torch out; get_slice reads the header only, so dtypes numpy lacks are
            # fine.
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
    lost = [
        f"{name}: not in {shard}" for name, shard in index.items() if name not in headers or headers[name].file != shard
    ]
    if lost:
        title = f"{folder / INDEX_FILE}: {len(lost)} of {len(index)} tensors are not in the shard it names; download the shards again"
        raise CheckpointError(_list(title, lost))


# --------------------------------------------------------------------------------------------
# The comparison


def validate(folder: str | Path, config: V4Config | None = None, require_draft: bool = False) -> CheckpointReport:
    """Compare `folder`'s headers with `config` (default: its own config.json).

    `mtp.*` may be absent altogether unless `require_draft`; when some of it is there, all of it
    must be. Raises ConfigError for a bad config.json and CheckpointError naming every missing,
    extra or mis-typed tensor, or hash tables that name experts which do not exist.
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
    compare(str(folder), config, specs, {n: h for n, h in headers.items() if n not in set(ignored)})
    _check_tables(folder, config, specs, headers)
    return CheckpointReport(
        folder=folder,
        config=config,
        headers=headers,
        draft=config.draft if has_draft else "none",
        expert_scale_dtype=headers["layers.0.ffn.experts.0.w1.scale"].dtype,
        ignored=ignored,
    )


def validate_again(folder: Path, config: V4Config) -> None:
    """`validate` a checkpoint that is to replace the one that is served with `config`.

    Raises CheckpointError too where its own config.json says something else.
    """
    own = V4Config.from_path(folder)
    if own != config:
        changed = [f.name for f in fields(config) if getattr(own, f.name) != getattr(config, f.name)]
        raise CheckpointError(
            f"{folder}: its config.json has another {', '.join(changed)} than the checkpoint that is served; start a"
            " server on it instead"
        )
    validate(folder, config)


def _check_tables(
    folder: Path, config: V4Config, specs: Mapping[str, TensorSpec], headers: Mapping[str, TensorHeader]
) -> None:
    for name, spec in specs.items():
        if spec.component is Component.TID2EID:
            with safe_open(folder / headers[name].file, framework="numpy") as shard:
                table = shard.get_tensor(name)
            check_table(str(folder), name, int(table.min()), int(table.max()), config)


def check_table(where: str, name: str, least: int, most: int, config: V4Config) -> None:
    """Raise CheckpointError unless a hash table's expert ids, from `least` to `most`, exist."""
    if least < 0 or most >= config.n_routed_experts:
        raise CheckpointError(
            f"{where}: {name} holds expert ids from {least} to {most}, config.json has experts 0 to"
            f" {config.n_routed_experts - 1}; download the checkpoint again, or give the config.json that came with it"
        )


def compare(where: str, config: V4Config, specs: Mapping[str, TensorSpec], headers: Mapping[str, TensorHeader]) -> None:
    """Raise CheckpointError, beginning with `where`, unless `headers` are what `specs` say."""
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
    lines = _group(
        [(n, "is missing") for n in missing] + [(n, "is not a tensor of this model") for n in extra] + shape + dtype
    )
    raise CheckpointError(_list(f"{where}: {counts}; {hint}", lines))


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
        guess = (
            f"is this a {families[0]} checkpoint with a {families[1]} config?"
            if all(families)
            else "do the two belong together?"
        )
        return f"its hidden size is {got}, config.json says {want}: {guess}"
    if told := layouts.of_names(extra, missing, specs) or layouts.of_dtypes(config, specs, headers):
        return told
    if missing and all(name.startswith(DRAFT_PREFIX) for name in missing):
        return f"the {config.draft} draft is incomplete: download it again, or remove mtp.* altogether"
    if num_misshapen > len(specs) // 2:
        return "is this a Flash checkpoint with a Pro config?"
    return "download the checkpoint again, or give the config.json that came with it"


_MOST_LINES = 60  # of one message: whoever reads it needs the kind, not each of 70,000 names
_LITERAL = 8  # tensors of one pattern that are listed one by one, where all problems have room


def _group(problems: Sequence[tuple[str, str]]) -> list[str]:
    """One line per problem; many tensors of one pattern share a line,
    `layers.{0-42}.attn.wq_b.weight`.
    """
    groups: dict[tuple[str, str], list[tuple[int, ...]]] = defaultdict(list)
    for name, problem in problems:
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "{}", name)
        groups[pattern, problem].append(tuple(int(n) for n in re.findall(r"(?<=\.)(\d+)(?=\.)", name)))
    literal = _LITERAL if len(problems) <= _MOST_LINES else 1
    return [
        f"{name} {problem}"
        for (pattern, problem), indices in groups.items()
        for name in _names(pattern, indices, literal)
    ]


def _names(pattern: str, indices: Sequence[tuple[int, ...]], literal: int) -> list[str]:
    if len(indices) <= literal:
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
    more = [f"and {len(items) - _MOST_LINES} more like these"] if len(items) > _MOST_LINES else []
    return "\n  ".join((title, *items[:_MOST_LINES], *more))
