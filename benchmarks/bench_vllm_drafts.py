# SPDX-License-Identifier: Apache-2.0
"""dsv4 in vLLM with and without MTP drafts, in one run on the CPU: the tiny checkpoint whose draft
is often right, the same prompts, the two engines in turn.

python benchmarks/bench_vllm_drafts.py --json benchmarks/results/vllm_drafts.json
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import cpu_bench

PROMPT, NEW = 32, 128


@click.command()
@click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path), help="Write the record here.")
@click.option("--rounds", default=5, show_default=True, help="Times each measurement is repeated.")
@click.option("--drafted", "-k", default=2, show_default=True, help="Tokens that are drafted in each step.")
@click.option("--threads", default=1, show_default=True, help="OpenMP threads.")
def main(path: Path | None, rounds: int, drafted: int, threads: int) -> None:
    os.environ.update(
        OMP_NUM_THREADS=str(threads),
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        HF_HUB_OFFLINE="1",
        DSV4_STATE="paged",  # what drafts need, so that drafts are all that differs
    )
    from dsv4.reference.tiny import write_tiny

    with tempfile.TemporaryDirectory() as scratch:
        folder = write_tiny(Path(scratch) / "tiny", "flash", agree=True)
        drafts = {"method": "mtp", "num_speculative_tokens": drafted}
        engines = {"without": load(folder), "with": load(folder, speculative_config=drafts)}
        cases = {f"decode_batch_{n}": measure(engines, n, rounds) for n in (1, 8)}
    record = {
        "what": "dsv4 in vLLM with and without MTP drafts, tiny Flash checkpoint that agrees, fp32, CPU",
        **cpu_bench.machine(threads, "vllm"),
        "rounds": rounds,
        "num_speculative_tokens": drafted,
        "acceptance": acceptance(engines["with"]),
        **cases,
    }
    text = json.dumps(record, indent=2)
    if path:
        path.write_text(text + "\n")
    print(text)


def load(folder: Path, **options: Any) -> Any:
    from vllm import LLM

    return LLM(
        str(folder),
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=1024,
        max_num_seqs=8,
        kv_cache_memory_bytes=256 << 20,
        enable_prefix_caching=False,
        disable_log_stats=False,
        **options,
    )


def measure(engines: dict[str, Any], batch: int, rounds: int) -> dict[str, Any]:
    """Generated tokens per second of both, and the ratio of the rounds. Both give the same
    tokens."""
    import torch

    ids = torch.randint(3, 259, (batch, PROMPT), generator=torch.Generator().manual_seed(batch)).tolist()
    tokens = {name: generate(llm, ids)[1] for name, llm in engines.items()}  # and a warm-up
    assert tokens["with"] == tokens["without"], "drafts changed what is served"
    seconds = [{name: generate(llm, ids)[0] for name, llm in engines.items()} for _ in range(rounds)]
    ratios = [each["without"] / each["with"] for each in seconds]
    speed = {
        f"{name}_tokens_per_s": round(batch * NEW / statistics.median(s[name] for s in seconds), 1) for name in engines
    }
    return speed | {
        "ratio": round(statistics.median(ratios), 2),
        "ratio_min_max": [round(min(ratios), 2), round(max(ratios), 2)],
    }


def generate(llm: Any, prompts: list[list[int]]) -> tuple[float, list[list[int]]]:
    """Seconds, and the tokens."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=NEW, temperature=0, detokenize=False, ignore_eos=True)
    start = time.perf_counter()
    found = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    return time.perf_counter() - start, [list(each.outputs[0].token_ids) for each in found]


def acceptance(llm: Any) -> dict[str, Any]:
    """By the engine's own counters, of all its steps."""
    from tests.support.vllm_driver import accepted

    found = accepted(llm)
    return {
        "drafted": found["tokens"],
        "kept": found["kept"],
        "kept_share_by_position": [round(n / found["drafts"], 3) for n in found["kept_by_position"]],
        "tokens_per_step": round(1 + found["kept"] / found["drafts"], 2),
    }


if __name__ == "__main__":
    main()
