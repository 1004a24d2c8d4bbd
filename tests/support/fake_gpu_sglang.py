# SPDX-License-Identifier: Apache-2.0
"""What SGLang makes of its command lines on a GPU that is not here. Run as a program: a JSON plan
on stdin, a JSON report on stdout; nothing before the first process would start is replaced but the
card.

plan: launches, command lines of `sglang serve`, each with its id, argv, folder and card
(capability, name, memory_bytes).
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.support.fake_gpu import CARD, insert, put_under_torch

PROGRAMS = ("nvcc", "ninja")


def install() -> None:
    """Put a card under torch, SGLang and dsv4. Behind the engine's imports: with a card, some of
    them load libraries."""
    import torch
    from sglang.srt.plugins import load_plugins

    load_plugins()
    import sglang.srt.server_args  # noqa: F401
    import sglang.srt.utils.common as common

    from dsv4.machine.decide import Device
    from dsv4_sglang import support

    put_under_torch()
    torch.cuda.mem_get_info = lambda device=None: (CARD.total_memory, CARD.total_memory)
    torch.version.cuda = "13.0"
    support.detect_devices = lambda: (Device("cuda", CARD.name, (CARD.major, CARD.minor)),) * 8
    for module in [module for name, module in sys.modules.items() if name.startswith("sglang.srt.")]:
        for name, answer in (("is_cuda", True), ("is_cuda_alike", True), ("is_cpu", False)):
            if callable(getattr(module, name, None)):
                setattr(module, name, lambda answer=answer: answer)
        if callable(getattr(module, "get_device", None)):
            module.get_device = lambda device_id=None: "cuda"
        if callable(getattr(module, "get_device_memory_capacity", None)):
            module.get_device_memory_capacity = lambda device=None: CARD.total_memory >> 20
    for function in vars(common).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()


def resolve(launch: dict[str, Any]) -> dict[str, Any]:
    from sglang.srt.arg_groups.model_override_base import model_config_of
    from sglang.srt.arg_groups.overrides import resolved_view
    from sglang.srt.server_args import prepare_server_args

    card = launch["card"]
    insert(**card)
    argv = launch["argv"][2:]  # behind `sglang serve`
    argv[argv.index("--model-path") + 1] = launch["folder"]
    # There are no weights here.
    args = prepare_server_args([*argv, "--load-format", "dummy", "--skip-tokenizer-init"])
    args.resolve_once()
    view = resolved_view(args)
    graphs = view.cuda_graph_config
    return {
        "id": launch["id"],
        "device": view.device,
        "kv": view.kv_cache_dtype,
        "decode_graphs": [graphs.decode.backend, graphs.decode.bs],
        "prefill_graphs": graphs.prefill.backend,
        "page_size": view.page_size,
        "window_ratio": view.swa_full_tokens_ratio,
        "tp": view.tp_size,
        "pp": view.pp_size,
        "attention": [view.attention_backend, view.prefill_attention_backend, view.decode_attention_backend],
        "moe": view.moe_runner_backend,
        "context": view.context_length,
        "chunk": view.chunked_prefill_size,
        "max_running_requests": view.max_running_requests,
        "memory": view.mem_fraction_static,
        "quantisation": model_config_of(args).quantization,
        "architectures": list(model_config_of(args).hf_config.architectures),
    }


def main() -> None:
    plan = json.loads(sys.stdin.read())
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # engines log to file descriptor 1
    with tempfile.TemporaryDirectory() as folder:
        programs = Path(folder, "bin")
        programs.mkdir()
        for program in PROGRAMS:
            (programs / program).write_text("#!/bin/sh\n")
            (programs / program).chmod(0o755)
        os.environ |= {"CUDA_HOME": folder, "PATH": f"{programs}:{os.environ['PATH']}"}
        install()
        json.dump([resolve(launch) for launch in plan["launches"]], answer)


if __name__ == "__main__":
    main()
