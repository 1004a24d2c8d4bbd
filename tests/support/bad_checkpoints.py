# SPDX-License-Identifier: Apache-2.0
"""Copies of a tiny checkpoint with one thing wrong each, and the words that a refusal of each must
contain."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Change = Callable[[Path], None]


def copy(folder: Path, to: Path, change: Change) -> Path:
    shutil.copytree(folder, to)
    change(to)
    return to


def set_config(**fields: object) -> Change:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    return change


def edit_tensors(edit: Callable[[dict[str, torch.Tensor]], None]) -> Change:
    """Edit the shard that holds layer 2's wq_b."""

    def change(folder: Path) -> None:
        for file in folder.glob("*.safetensors"):
            tensors = load_file(file)
            if "layers.2.attn.wq_b.weight" in tensors:
                edit(tensors)
                save_file(tensors, file)

    return change


def truncate(folder: Path) -> None:
    file = max(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1000])


def remove_shard(folder: Path) -> None:
    max(folder.glob("*.safetensors")).unlink()


def bad_checkpoints(tiny_flash: Path, tiny_pro: Path) -> dict[str, tuple[Change, list[str]]]:
    """What is done to a copy of `tiny_flash`, and words of the message, by name."""
    config = json.loads((tiny_flash / "config.json").read_text())

    def wrong_shape(t: dict[str, torch.Tensor]) -> None:
        t["layers.2.attn.wq_b.weight"] = t["layers.2.attn.wq_b.weight"][:-128].contiguous()

    def wrong_dtype(t: dict[str, torch.Tensor]) -> None:
        t["layers.2.attn.attn_sink"] = t["layers.2.attn.attn_sink"].bfloat16()

    def no_such_expert(folder: Path) -> None:
        for file in folder.glob("*.safetensors"):
            tensors = load_file(file)
            if "layers.1.ffn.gate.tid2eid" in tensors:
                tensors["layers.1.ffn.gate.tid2eid"][7, 1] = 8
                save_file(tensors, file)

    def mismatch(folder: Path) -> None:
        shutil.copy(tiny_pro / "config.json", folder / "config.json")

    return {
        "truncated": (truncate, ["truncated", "model-0000"]),
        "missing-shard": (remove_shard, ["model-0000", "missing"]),
        "shape": (edit_tensors(wrong_shape), ["layers.2.attn.wq_b.weight", "shape"]),
        "dtype": (edit_tensors(wrong_dtype), ["layers.2.attn.attn_sink", "BF16"]),
        "table": (no_such_expert, ["layers.1.ffn.gate.tid2eid", "0 to 8", "experts 0 to 7"]),
        "mismatch": (mismatch, ["layers.0.attn.compressor", "config.json"]),
        "ratio": (set_config(compress_ratios=[7, *config["compress_ratios"][1:]]), ["compress_ratios[0] is 7"]),
        "nvfp4": (
            set_config(quantization_config=config["quantization_config"] | {"moe_quant_algo": "NVFP4"}),
            ["NVFP4"],
        ),
        "vision": (set_config(vision_n_layers=32), ["Vision-Exp"]),
    }
