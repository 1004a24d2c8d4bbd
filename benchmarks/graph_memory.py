# SPDX-License-Identifier: Apache-2.0
"""Bytes that vLLM's captured graphs hold, at the real widths of Flash and Pro and the engine's own
capture sizes, without a GPU.

    python benchmarks/graph_memory.py --json benchmarks/results/graph_memory.json

Graphs share one pool of memory. Nothing of it is alive between replays (the tape's tests: 0 bytes
are held), so what it takes is the most that one capture holds at once: that of the largest size.
vLLM builds the real model for an invented A100 on PyTorch's meta device, and a pool counts every
allocation while the model runs the largest step of each kind of graph; kernels are not launched.
One rank holds all heads, which is the most. Linears, norms and experts stand for the engine's
kernels by their results; the workspace of Marlin's experts is vLLM's own, outside of graphs.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
MODELS = {"flash": "DeepSeek-V4-Flash", "pro": "DeepSeek-V4-Pro"}
SERVE_SEQS = 256  # what `vllm serve` takes on A100, L40S and RTX 4090 where --max-num-seqs is not given
MIB = 1 << 20


@click.command()
@click.option("--json", "path", type=click.Path(dir_okay=False, path_type=Path), help="Write the record here.")
@click.option("--model", type=click.Choice(list(MODELS)), help="Measure one, in this process, and print it.")
def main(path: Path | None, model: str | None) -> None:
    if model is not None:
        print(json.dumps(measure(model)))
        return
    record = {name: measured(name) for name in MODELS}
    for name, found in record.items():
        print(f"{name}: " + ", ".join(f"{kind} {n / MIB:.0f} MiB" for kind, n in found["bytes"].items()))
    if path is not None:
        path.write_text(json.dumps(record, indent=1) + "\n")


def measured(model: str) -> dict[str, Any]:
    """`measure` in a process of its own."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("DSV4_", "VLLM_"))}
    env |= {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--model", model]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(model: str) -> dict[str, Any]:
    """The most that one capture of each kind holds; sizes are vLLM's own."""
    from dsv4.reference.tiny import write_tiny
    from tests.support import fake_gpu

    os.environ |= {"VLLM_PLUGINS": "dsv4", "DSV4_CPU_PLATFORM": "off", "CUDA_VISIBLE_DEVICES": ""}
    fake_gpu.install((8, 0), "NVIDIA A100-SXM4-80GB")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "released"
        tiny = write_tiny(Path(scratch) / "tiny", "flash", num_layers=4)
        shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
        shutil.copy(ROOT / "recipes" / "configs" / f"{MODELS[model]}.json", folder / "config.json")
        return fake_gpu.on_model(folder, {"max_num_seqs": SERVE_SEQS}, "meta", held_by_graphs)


def held_by_graphs(model: Any, config: Any, registry: Any) -> dict[str, Any]:
    compilation, seqs = config.compilation_config, config.scheduler_config.max_num_seqs
    sizes = list(compilation.cudagraph_capture_sizes)
    decode = max(size for size in sizes if size <= seqs)
    stub(model)
    return {
        "capture_sizes": [len(sizes), sizes[-1]],
        "max_num_seqs": seqs,
        "max_model_len": config.model_config.max_model_len,
        "bytes": {
            f"decode, {decode} requests": peak(model, config, decode, attends=True),
            f"mixed, {sizes[-1]} tokens": peak(model, config, sizes[-1], attends=False),
        },
    }


def peak(model: Any, config: Any, num_tokens: int, attends: bool) -> int:
    """The most that one step holds at once. attends: a full graph; else one with breaks, whose
    attention runs outside and takes its memory elsewhere."""
    import torch
    from vllm.forward_context import set_forward_context

    from dsv4_vllm.model import V4Attention
    from tests.support import tape

    for attention in (m for m in model.modules() if isinstance(m, V4Attention)):
        attention.attend = attention._attend_in_step if attends else lambda **inputs: None
    pool = tape.Pool()
    recorder = tape.Recorder(tape.Tape(pool, {}))
    tape.Graph.recording = recorder.tape
    ids, positions = (torch.empty(num_tokens, dtype=dtype, device="meta") for dtype in (torch.int32, torch.int64))
    with torch.inference_mode(), set_forward_context(None, config, num_tokens=num_tokens), recorder:
        model(ids, positions)
    tape.Graph.recording = None
    return pool.peak


def stub(model: Any) -> None:
    """Let kernels launch nothing, and the engine's layers allocate what its kernels do."""
    import torch
    from triton.runtime.interpreter import GridExecutor
    from vllm.model_executor.layers.layernorm import RMSNorm
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    from dsv4.ops import kernels
    from dsv4.ops.compressor.projected import EntryInputs
    from dsv4.ops.registry import OPERATORS, Choice
    from dsv4.probe.engine import symbol
    from dsv4_vllm.caches import V4Cache
    from dsv4_vllm.model import V4Attention, V4Moe
    from tests.support import fake_gpu

    for cache in (m for m in model.modules() if isinstance(m, V4Cache)):
        cache.bind_kv_cache(cache.empty_pages(1, torch.device("meta")))
    GridExecutor.__call__ = lambda self, *args, **kwargs: None
    kernels._processors = lambda device: fake_gpu.CARD.multi_processor_count
    for operator in OPERATORS.values():
        offer = operator.offers[-1]
        operator._choices["meta"] = Choice(operator.name, offer.name, "nothing is launched", symbol(offer.target))
    for module in model.modules():
        if isinstance(module, LinearBase):
            module.forward = lambda x, width=module.output_size: (x.new_empty(*x.shape[:-1], width), None)
        elif isinstance(module, RMSNorm):
            module.forward = torch.empty_like
        elif isinstance(module, VocabParallelEmbedding):
            width = module.embedding_dim
            module.forward = lambda ids, width=width: torch.empty(len(ids), width, dtype=torch.bfloat16, device="meta")
        elif isinstance(module, V4Attention) and module.entry_proj is not None:
            module.project = lambda x, sizes=module.entry_proj.output_sizes: EntryInputs.split(
                x.new_empty(len(x), sum(sizes), dtype=torch.float32), sizes
            )
        elif isinstance(module, V4Moe):
            module.forward = lambda x, ids, shared=module.shared_experts: torch.empty_like(x) + shared(x)


if __name__ == "__main__":
    main()
