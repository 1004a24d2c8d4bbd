# SPDX-License-Identifier: Apache-2.0
"""A tiny checkpoint through an engine's real server, as users start it, against the fp32 reference:
the last stage of `gpu.py`.

Prompts are asked for the log-probabilities of all their tokens, alone; then three requests decode
together, a number that no graph is captured for, and what each generated is held against the
reference on the same tokens. On a GPU all flags are the engine's defaults, so graphs are on, pages
are packed and activations bf16; on a CPU the server runs in fp32, as in the tests.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from served import SGLANG, SGLANG_CHAT_ARGS, VLLM, VLLM_CHAT_ARGS, Engine, Server

LEAST_S = 60.0  # less is not enough to start a server
PROMPTS, NEW_TOKENS = (5, 130, 700), 24
BY_NAME = {"vllm": VLLM, "sglang": SGLANG}
# Correct fp32 implementations differ by up to 5e-5 in any position (docs/model.md, 7).
WORST_FP32 = 2e-4
# On a GPU the reference stores the same packed rows and is fp32 in all else. What is left is bf16
# and what it flips: single positions may be far off, and only the mean says something. Measured on
# a CPU with the engines in bf16 and packed pages: 0.13 (HF, bf16, plain rows: 0.08). CSA layers
# without entries, or with all of them instead of the chosen, are 0.22 and 0.28 off in fp32 already.
MEAN_PACKED = 0.18
# What the engines log once they have captured their graphs.
CAPTURED = {"vllm": "Graph capturing finished", "sglang": "Capture cuda graph end"}

# The log-probability of each token but the first of a sequence.
Reference = Callable[[list[int]], torch.Tensor]


def prepare(folder: Path, device: str) -> tuple[Path, Reference]:
    """A checkpoint, and the fp32 reference with the rows that a server on `device` stores."""
    from dsv4.model.kv_layout import IndexFormat, KvFormat
    from dsv4.reference.model import Quantisation, ReferenceModel
    from dsv4.reference.tiny import write_tiny

    checkpoint = write_tiny(folder / "tiny", "flash")
    stored = Quantisation() if device == "cpu" else Quantisation(kv=KvFormat.FP8_DS_MLA, index=IndexFormat.FP8)
    model = ReferenceModel.from_folder(checkpoint, stored)

    def chosen(ids: list[int]) -> torch.Tensor:
        return model.logprobs(ids)[:-1].gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1)

    return checkpoint, chosen


def command(engine: Engine, folder: Path, device: str) -> list[str]:
    """The server's command line."""
    if device == "cpu":
        return engine.command(folder)
    program = str(Path(sys.executable).with_name(engine.name))
    if engine.name == "vllm":
        return [program, "serve", str(folder), "--served-model-name", "tiny", *VLLM_CHAT_ARGS]
    return [program, "serve", "--model-path", str(folder), "--served-model-name", "tiny", *SGLANG_CHAT_ARGS]


def ask(name: str, folder: Path, reference: Reference, device: str, seconds: float) -> dict[str, Any]:
    """What one engine's server said, in `seconds` at most; wrong: why it is not right, or None."""
    engine = BY_NAME[name]
    argv = command(engine, folder, device)
    row: dict[str, Any] = {"command": " ".join(argv[1:]), "limit": WORST_FP32 if device == "cpu" else MEAN_PACKED}
    # dsv4 serves wherever this runs: on cards that native V4 serves too.
    env = {"DSV4_MODE": "on", "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *_python_path()])}
    try:
        with Server(argv, env, ready_timeout_s=seconds) as server:
            worker = server.get("/dsv4/status")["workers"][0]
            read, decoded = compare(engine, server, reference)
            captured = CAPTURED[name] in server.log()
    except (RuntimeError, OSError) as error:
        lines = [line for line in str(error).strip().splitlines() if line.strip()]
        return row | {"wrong": f"{lines[0]} {lines[-1]}"[:400] if lines else type(error).__name__}
    row |= {
        "ready_s": round(server.ready_s, 1),
        "model_class": worker["model_class"],
        "pages": worker["kv_format"],
        "operators": sorted({op["impl"] for op in worker["ops"].values()}),
        "graphs": captured,
        "compared": read.numel() + decoded.numel(),
        "worst": max(float(read.max()), float(decoded.max())),
        "mean": float(read.mean()),
        "mean_decoded": float(decoded.mean()),
    }
    return row | {"wrong": judge(row, worker["served_by_dsv4"], device)}


def judge(row: dict[str, Any], served: bool, device: str) -> str | None:
    """What is wrong with a server's answers, None where nothing is."""
    if not served:
        return f"served by {row['model_class']}, not by dsv4"
    for what in ("worst",) if device == "cpu" else ("mean", "mean_decoded"):
        if not row[what] <= row["limit"]:
            return f"{what} difference {row[what]:.2g} from the fp32 reference, at most {row['limit']:g} is right"
    if device != "cpu" and not row["graphs"]:
        return "no graph was captured"
    if device != "cpu" and row["operators"] != ["triton"]:
        return f"operators are served by {', '.join(row['operators'])}"
    return None


def compare(engine: Engine, server: Server, reference: Reference) -> tuple[torch.Tensor, torch.Tensor]:
    """Distances from the reference's log-probabilities: of prompts, and of what was generated."""
    draw = torch.Generator().manual_seed(7)
    prompts = [torch.randint(3, 259, (n,), generator=draw).tolist() for n in PROMPTS]
    read = [torch.tensor(engine.prompt_logprobs(server, ids)) - reference(ids) for ids in prompts]
    decoded = [
        torch.tensor(logprobs) - reference(ids + tokens)[len(ids) - 1 :]
        for ids, (tokens, logprobs) in zip(prompts, engine.generate(server, prompts, NEW_TOKENS), strict=True)
    ]
    return torch.cat(read).abs(), torch.cat(decoded).abs()


def _python_path() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
