# SPDX-License-Identifier: Apache-2.0
"""dsv4 in vLLM against HF transformers' own `generate` on one tiny checkpoint, on the CPU. See
`cpu_bench`.

python benchmarks/bench_vllm_cpu.py --json benchmarks/results/vllm_cpu.json
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click
import cpu_bench
from cpu_bench import PREFILL
from served import vllm_serve


@click.command()
@click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path), help="Write the record here.")
@click.option(
    "--rounds", default=5, show_default=True, help="Times each measurement is repeated, the two sides in turn."
)
@click.option("--threads", default=os.cpu_count() or 1, show_default=True, help="OpenMP threads of both sides.")
def main(path: Path | None, rounds: int, threads: int) -> None:
    os.environ.update(
        OMP_NUM_THREADS=str(threads),
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        HF_HUB_OFFLINE="1",
    )
    serve = lambda folder: vllm_serve(folder, "--served-model-name", "tiny")  # noqa: E731
    cpu_bench.run("vllm", "vLLM", serve, load, path=path, rounds=rounds, threads=threads)


def load(folder: Path) -> cpu_bench.Generate:
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(folder),
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=PREFILL + 128,
        max_num_batched_tokens=PREFILL + 128,
        max_num_seqs=8,
        kv_cache_memory_bytes=1 << 30,
        enable_prefix_caching=False,
    )

    def generate(ids: Any, new: int) -> None:
        params = SamplingParams(max_tokens=new, temperature=0, detokenize=False, ignore_eos=True)
        llm.generate([{"prompt_token_ids": row} for row in ids.tolist()], params, use_tqdm=False)

    return generate


if __name__ == "__main__":
    main()
