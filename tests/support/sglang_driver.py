# SPDX-License-Identifier: Apache-2.0
"""Runs one SGLang engine and prints what it generated: `python sglang_driver.py < plan.json >
result.json`.

The plan is {"engine": Engine arguments, "phases": [[request, ...], ...], "updates": {"1": {"disk":
folder}, "2": arguments of `replace_weights`}} and options for
`sglang_instruments`; a request is {"prompt": [ids], "max_tokens": n, "prompt_logprobs": bool}. The
requests of a phase are submitted together, phases one after another, each behind its update of the
weights.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any


def describe(prompt: list[int], output: dict[str, Any], prompt_logprobs: bool) -> dict[str, Any]:
    """A request's tokens and the log-probability of each prompt token (but the first) and each
    generated one."""
    meta = output["meta_info"]
    return {
        "prompt": prompt,
        "tokens": output["output_ids"],
        "prompt_logprobs": [entry[0] for entry in meta["input_token_logprobs"]][1:] if prompt_logprobs else None,
        "logprobs": [entry[0] for entry in meta["output_token_logprobs"]],
        "cached": meta["cached_tokens"],
        "retractions": meta["num_retractions"],
    }


def replace_weights(
    engine: Any,
    disk: str | None = None,
    tensors: str | None = None,
    distributed: str | None = None,
    buckets: int = 1,
    without: tuple[str, ...] = (),
    only: tuple[str, ...] = (),
) -> list[Any]:
    """[success, message] of the first step that failed, or of the last.

    disk, tensors or distributed: the folder of the weights
    """
    if disk is not None:
        return list(engine.update_weights_from_disk(disk))[:2]
    from safetensors.torch import load_file

    folder = Path(str(tensors or distributed))
    found = {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
    named = [(name, t) for name, t in found.items() if name not in without and (not only or name in only)]
    engine.begin_weight_update()
    for i in range(buckets):
        if distributed is not None:
            done = broadcast(engine, named[i::buckets])
        else:
            done = engine.update_weights_from_tensor(named[i::buckets])
        if not done[0]:
            break
    ended = engine.end_weight_update()
    return list(done if not done[0] else ended)[:2]


GROUPS: list[Any] = []  # of this process as rank 0, the trainer, and the engine as rank 1


def broadcast(engine: Any, named: list[tuple[str, Any]]) -> Any:
    """Weights by gloo, from this process, as one tensor of bytes: gloo has no FP8.

    The widest first: SGLang refuses tensors at odd places of the bytes.
    """
    import torch
    from sglang.srt.utils import init_custom_process_group
    from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

    named = sorted(named, key=lambda item: -item[1].itemsize)
    with ThreadPoolExecutor(1) as pool:
        if not GROUPS:
            port = free_port()
            address = f"tcp://127.0.0.1:{port}"
            mine = pool.submit(
                init_custom_process_group, backend="gloo", init_method=address, world_size=2, rank=0, group_name="w"
            )
            joined = engine.init_weights_update_group("127.0.0.1", port, 1, 2, "w", backend="gloo")
            assert joined[0], joined
            GROUPS.append(mine.result())
        flat = FlattenedTensorBucket(named_tensors=named).get_flattened_tensor()
        sending = pool.submit(torch.distributed.broadcast, flat, src=0, group=GROUPS[0])
        names, dtypes = [name for name, _ in named], [str(t.dtype).removeprefix("torch.") for _, t in named]
        shapes = [list(t.shape) for _, t in named]
        done = engine.update_weights_from_distributed(names, dtypes, shapes, "w", load_format="flattened_bucket")
        sending.result(60)
    return done


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def main() -> None:
    plan = json.load(sys.stdin)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # worker processes inherit file descriptor 1 and log there
    import sglang

    start = time.monotonic()
    engine = sglang.Engine(**{"skip_tokenizer_init": True, "log_level": "info", **plan["engine"]})
    ready = time.monotonic() - start
    phases, updates = [], []
    for number, phase in enumerate(plan["phases"]):
        if update := plan.get("updates", {}).get(str(number)):
            updates.append(replace_weights(engine, **update))
        params = [{"max_new_tokens": r["max_tokens"], "temperature": 0, "ignore_eos": True} for r in phase]
        outputs = engine.generate(
            input_ids=[r["prompt"] for r in phase],
            sampling_params=params,
            return_logprob=[True] * len(phase),
            # From 0, the whole prompt is computed again for its log-probabilities, and no cached
            # prefix is used.
            logprob_start_len=[0 if r["prompt_logprobs"] else -1 for r in phase],
        )
        phases.append([describe(r["prompt"], o, r["prompt_logprobs"]) for r, o in zip(phase, outputs, strict=True)])
    states = engine.get_server_info()["internal_states"]
    result = {
        "ready_s": ready,
        "phases": phases,
        "updates": updates,
        "retractions": sum(o["retractions"] for phase in phases for o in phase),
        "workers": [worker for state in states for worker in state.get("dsv4", [])] if plan.get("status", True) else [],
        "counts": states[0].get("dsv4_test", {}),
    }
    json.dump(result, out)
    out.flush()
    engine.shutdown()


if __name__ == "__main__":
    main()
