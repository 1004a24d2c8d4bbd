# SPDX-License-Identifier: Apache-2.0
"""dsv4 in SGLang against HF transformers' own `generate` on one tiny checkpoint, on the CPU. See
`cpu_bench`.

    python benchmarks/bench_sglang_cpu.py --json benchmarks/results/sglang_cpu.json

SGLang's scheduler is a process of its own that polls without pause, so HF needs a core beside it:
with as many OpenMP threads as cores HF decodes 18 times slower than with one, and the ratio would
flatter us.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click
import cpu_bench
from cpu_bench import PREFILL
from served import sglang_serve


@click.command()
@click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path), help="Write the record here.")
@click.option(
    "--rounds", default=5, show_default=True, help="Times each measurement is repeated, the two sides in turn."
)
@click.option(
    "--threads", default=max(1, (os.cpu_count() or 1) - 1), show_default=True, help="OpenMP threads of both sides."
)
def main(path: Path | None, rounds: int, threads: int) -> None:
    os.environ.update(OMP_NUM_THREADS=str(threads), HF_HUB_OFFLINE="1")
    serve = lambda folder: sglang_serve(folder, "--served-model-name", "tiny")  # noqa: E731
    cpu_bench.run("sglang", "SGLang", serve, load, path=path, rounds=rounds, threads=threads)


def load(folder: Path) -> cpu_bench.Generate:
    import sglang

    engine = sglang.Engine(
        model_path=str(folder),
        dtype="float32",
        device="cpu",
        skip_tokenizer_init=True,
        context_length=PREFILL + 256,
        max_total_tokens=8 * 1024,
        swa_full_tokens_ratio=0.75,
        chunked_prefill_size=PREFILL,
        max_running_requests=8,
        disable_radix_cache=True,
    )

    def generate(ids: Any, new: int) -> None:
        params = {"max_new_tokens": new, "temperature": 0, "ignore_eos": True}
        engine.generate(input_ids=ids.tolist(), sampling_params=params)

    return generate


if __name__ == "__main__":
    main()
