# SPDX-License-Identifier: Apache-2.0
"""A checkpoint that dsv4 has no entry for, planned from its config.json and safetensors headers: a
downloaded folder, or a repository on the hub.

Base, FP8 repacks, NVFP4, W4A16, bf16 and pruned experts all are; whether dsv4 serves them is said
apart (`Checkpoint.unserved`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dsv4.errors import CheckpointError, ConfigError, PlanError, UnsupportedCheckpointError
from dsv4.model.checkpoint import TensorHeader, read_headers, validate
from dsv4.model.config import V4Config
from dsv4.model.tensors import DRAFT_PREFIX, tensor_specs
from dsv4.planning.deployment import Checkpoint
from dsv4.planning.memory.weights import Bytes, Inventory, inventory

# Bits of one element, by safetensors' names.
_BITS = {
    **dict.fromkeys(("F64", "I64", "U64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("BF16", "F16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "BOOL"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


def checkpoint_in(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`. With config.json alone, its tensors are those that it implies.
    Raises PlanError for what is no DeepSeek-V4.
    """
    config, unserved = _config(_raw(folder / "config.json"), str(folder))
    if not any(folder.glob("*.safetensors*")):
        return _checkpoint(folder.resolve().name, str(folder), config, inventory(config), unserved)
    try:
        headers = read_headers(folder)
    except CheckpointError as e:
        raise PlanError(" ".join(str(e).split())) from e
    if not unserved:
        try:
            validate(folder)
        except (CheckpointError, ConfigError) as e:
            unserved = str(e).splitlines()[0]
    config = _with_draft_of(config, headers)
    return _checkpoint(folder.resolve().name, str(folder), config, tally(config, headers, str(folder)), unserved)


def checkpoint_on_hub(repo: str) -> Checkpoint:
    """The checkpoint in a hub repository: its config.json and headers are read, no weights. Raises
    PlanError.
    """
    try:
        from huggingface_hub import get_safetensors_metadata, hf_hub_download

        raw = _raw(Path(hf_hub_download(repo, "config.json")))
        files = get_safetensors_metadata(repo).files_metadata
    except PlanError:
        raise
    except Exception as e:
        why = " ".join(str(e).split())[:160]
        raise PlanError(f"{repo}: cannot be read from the hub ({why}); give a downloaded folder") from e
    headers = {
        name: TensorHeader(file, tensor.dtype, tuple(tensor.shape))
        for file, metadata in files.items()
        for name, tensor in metadata.tensors.items()
    }
    config, unserved = _config(raw, repo)
    config = _with_draft_of(config, headers)
    unserved = unserved or "only its headers were read: dsv4 check says whether dsv4 serves it"
    return _checkpoint(repo.split("/")[-1], repo, config, tally(config, headers, repo), unserved)


def tally(config: V4Config, headers: Mapping[str, TensorHeader], where: str) -> Inventory:
    """The bytes of `headers` as engines place them. Whatever a tensor's format, its module decides
    how it is sharded; modules that `config` does not imply count whole on every rank.
    """
    axes = {_module(name): spec.shard_axis is not None for name, spec in tensor_specs(config).items()}
    layers = [Bytes() for _ in config.layers]
    first, last, draft = Bytes(), Bytes(), Bytes()
    for name, header in headers.items():
        part = _bytes(name, _size(name, header, where), axes)
        plain = name.removeprefix("model.")
        if plain.startswith(DRAFT_PREFIX):
            draft += part
        elif plain.startswith("layers."):
            index = int(plain.split(".")[1])
            if index >= len(layers):
                raise PlanError(f"{where}: holds {name}, config.json says {len(layers)} layers")
            layers[index] += part
        elif plain.startswith("embed"):
            first += part
        else:
            last += part
    return Inventory(first, tuple(layers), last, draft)


def _raw(file: Path) -> dict[str, Any]:
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except OSError as e:
        raise PlanError(f"{file}: cannot be read ({e.strerror}); is this a checkpoint folder?") from e
    except ValueError as e:
        raise PlanError(f"{file}: not JSON ({e}); download it again") from e
    if not isinstance(raw, dict):
        raise PlanError(f"{file}: is no JSON object")
    return raw


def _config(raw: dict[str, Any], where: str) -> tuple[V4Config, str]:
    """The geometry, and why dsv4 does not serve such a checkpoint ("" when it may)."""
    try:
        return V4Config.from_dict(raw, where), ""
    except ConfigError as e:
        refusal = e
    # Another quantisation of the same architecture: its tensors say the rest.
    plain = {k: v for k, v in raw.items() if k not in ("quantization_config", "expert_dtype")}
    try:
        return V4Config.from_dict(plain, where), str(refusal)
    except (UnsupportedCheckpointError, ConfigError):
        raise PlanError(str(refusal)) from refusal


def _with_draft_of(config: V4Config, headers: Mapping[str, TensorHeader]) -> V4Config:
    """Without the draft where the tensors hold none."""
    if any(name.removeprefix("model.").startswith(DRAFT_PREFIX) for name in headers):
        return config
    return replace(config, draft="none", num_draft_layers=0)


def _checkpoint(name: str, where: str, config: V4Config, weights: Inventory, unserved: str) -> Checkpoint:
    return Checkpoint(
        id=name,
        repo=where,
        family="pro" if config.hidden_size > 4096 else "flash",
        released="",
        total_bytes=weights.total,
        config=config,
        weights=weights,
        unserved=unserved,
    )


def _module(name: str) -> str:
    """`layers.0.attn.wq_b` of `layers.0.attn.wq_b.weight`, of its scales and of packed forms."""
    return name.rpartition(".")[0]


def _bytes(name: str, size: int, axes: Mapping[str, bool]) -> Bytes:
    plain = name.removeprefix("model.")
    if ".experts." in plain and "shared" not in plain:
        return Bytes(experts=size)
    if not axes.get(_module(plain), False):
        return Bytes(replicated=size)
    return Bytes(sharded=size, wo_a=size if ".wo_a." in plain else 0)


def _size(name: str, header: TensorHeader, where: str) -> int:
    bits = _BITS.get(header.dtype)
    if bits is None:
        raise PlanError(f"{where}: {name} has dtype {header.dtype}, whose size dsv4 does not know")
    count = 1
    for n in header.shape:
        count *= n
    return -(-count * bits // 8)
