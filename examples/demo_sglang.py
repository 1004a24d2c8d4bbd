# SPDX-License-Identifier: Apache-2.0
"""A small DeepSeek-V4 through the real `sglang serve` on this machine: one chat question, and proof of who answered.

`make demo-sglang` runs it. No GPU and no network are needed.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from demo_vllm import PROMPT, TOLERANCE
from rich.console import Console
from rich.table import Table
from served import Server, sglang_serve

from dsv4.reference_model import ReferenceModel
from dsv4.tiny import write_tiny


def main() -> int:
    console = Console()
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_tiny(Path(scratch) / "tiny-flash", "flash")
        size = sum(f.stat().st_size for f in folder.iterdir()) / 1e6
        console.print(f"checkpoint: {size:.0f} MB in the released format (FP8 blocks, packed FP4 experts, e8m0 scales)")
        console.print("starting sglang serve ...")
        with Server(sglang_serve(folder, "--served-model-name", "tiny")) as server:
            console.print(f"sglang serve: ready after {server.ready_s:.0f} s at {server.url}")
            worker = server.get("/dsv4/status")["workers"][0]
            chat = {"model": "tiny", "messages": [{"role": "user", "content": "Who are you?"}], "max_tokens": 16, "temperature": 0}
            message = server.post("/v1/chat/completions", chat)["choices"][0]["message"]
            worst, count = _compare(server, folder)
    table = Table(show_header=False)
    table.add_row("served class", worker["model_class"])
    table.add_row("attention backend", ", ".join(worker["attention_backends"]))
    table.add_row("KV pool", worker["kv_pool"])
    table.add_row("operators", ", ".join(sorted({op["impl"] for op in worker["ops"].values()})))
    table.add_row("reply (random weights)", repr(message.get("content") or message.get("reasoning_content")))
    table.add_row("prompt log-probabilities", f"{count} compared with the fp32 reference, largest difference {worst:.1e}")
    console.print(table)
    if not worker["served_by_dsv4"] or worst > TOLERANCE:
        console.print(f"[red]FAILED: served_by_dsv4={worker['served_by_dsv4']}, difference {worst:.1e} (allowed {TOLERANCE:.0e})")
        return 1
    console.print(f"[green]OK: dsv4 answered, and its log-probabilities equal the fp32 reference within {TOLERANCE:.0e}")
    return 0


def _compare(server: Server, folder: Path) -> tuple[float, int]:
    """Largest difference of a prompt's log-probabilities between the server and the fp32 reference, and how many."""
    body = {"text": PROMPT, "sampling_params": {"max_new_tokens": 1, "temperature": 0}, "return_logprob": True, "logprob_start_len": 0}
    entries = server.post("/generate", body)["meta_info"]["input_token_logprobs"]
    ids = [token for _, token, _ in entries]
    got = torch.tensor([logprob for logprob, _, _ in entries[1:]])
    want = ReferenceModel.from_folder(folder).logprobs(ids)[:-1].gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1)
    return float((got - want).abs().max()), len(got)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except RuntimeError as error:  # the server's own words
        sys.exit(str(error))
