# SPDX-License-Identifier: Apache-2.0
"""A small DeepSeek-V4 through a real engine's server on this machine: one chat question, and proof
of who answered."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from served import Engine, Server
from tokenizers import Tokenizer

from dsv4.reference.model import ReferenceModel
from dsv4.reference.tiny import write_tiny

# Correct fp32 implementations of the model differ by less: up to 5e-5 was measured.
TOLERANCE = 2e-4
PROMPT = "DeepSeek-V4 attends to a window of 128 tokens and to compressed entries of everything before it. " * 3


def main(engine: Engine) -> int | str:
    """The exit status for `sys.exit`: 0, or what went wrong."""
    console = Console()
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_tiny(Path(scratch) / "tiny-flash", "flash")
        size = sum(f.stat().st_size for f in folder.iterdir()) / 1e6
        console.print(f"checkpoint: {size:.0f} MB in the released format (FP8 blocks, packed FP4 experts, e8m0 scales)")
        console.print(f"starting {engine.name} serve ...")
        try:
            with Server(engine.command(folder)) as server:
                console.print(f"{engine.name} serve: ready after {server.ready_s:.0f} s at {server.url}")
                worker = server.get("/dsv4/status")["workers"][0]
                chat = {
                    "model": "tiny",
                    "messages": [{"role": "user", "content": "Who are you?"}],
                    "max_tokens": 16,
                    "temperature": 0,
                }
                message = server.post("/v1/chat/completions", chat)["choices"][0]["message"]
                worst, count = _compare(engine, server, folder)
        except RuntimeError as error:  # the server's own words
            return str(error)
    table = Table(show_header=False)
    table.add_row("served class", worker["model_class"])
    table.add_row("attention backends", ", ".join(worker["attention_backends"]))
    table.add_row("operators", ", ".join(sorted({op["impl"] for op in worker["ops"].values()})))
    table.add_row(
        "reply (random weights)",
        repr(next(filter(None, map(message.get, ("content", "reasoning", "reasoning_content"))), None)),
    )
    table.add_row(
        "prompt log-probabilities", f"{count} compared with the fp32 reference, largest difference {worst:.1e}"
    )
    console.print(table)
    if not worker["served_by_dsv4"] or worst > TOLERANCE:
        return f"FAILED: served_by_dsv4={worker['served_by_dsv4']}, difference {worst:.1e} (allowed {TOLERANCE:.0e})"
    console.print(
        f"[green]OK: dsv4 answered, and its log-probabilities equal the fp32 reference within {TOLERANCE:.0e}"
    )
    return 0


def _compare(engine: Engine, server: Server, folder: Path) -> tuple[float, int]:
    """Largest difference of a prompt's log-probabilities between the server and the fp32 reference,
    and how many."""
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(PROMPT).ids
    got = torch.tensor(engine.prompt_logprobs(server, ids))
    want = ReferenceModel.from_folder(folder).logprobs(ids)[:-1].gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1)
    return float((got - want).abs().max()), len(got)
