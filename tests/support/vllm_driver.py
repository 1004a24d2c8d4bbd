# SPDX-License-Identifier: Apache-2.0
"""Runs one vLLM engine in this process and prints what it generated: `python -m
tests.support.vllm_driver < plan.json > result.json`.

The plan is {"engine": LLM arguments, "phases": [[request, ...], ...]} and options; a request is
{"prompt": [ids], "max_tokens": n, "prompt_logprobs": bool}, greedy but for "temperature" and
"seed". The requests of a phase are submitted together, phases one after another. Options:
"poison": NaN in unowned pages; "record": a file for every row that was quantised, for replay
through the reference model; "mutation": [module, old, new], break a module's source on purpose;
"updates": {"1": arguments of `replace_weights` before that phase}; "launches": report the kernels
that each layer launched; "variants": those that the warm-up would not have compiled; "graphs":
{"sizes", "mode"}, capture and replay steps; "memory": report what attention takes; "drafts": report
what was drafted, and draft what "drafts" says comes next, wrong from a random depth on; without
such a sequence, what the draft itself does.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")


def poison_unowned_pages(llm: Any) -> dict[str, int]:
    """Before every step, fill each page that no request and no cached prefix owns with NaN, in
    every cache.

    0xFF in every byte is NaN as fp32, bf16, e4m3 and ue8m0. Pages are poisoned while free, so a
    page that a request gets later starts as NaN too. Returns a counter of poisoned pages.
    """
    from dsv4_vllm.caches import V4Cache

    core = llm.llm_engine.engine_core.engine_core
    pool = core.scheduler.kv_cache_manager.block_pool
    runner = core.model_executor.driver_worker.worker.model_runner
    caches = [m.kv_cache for model in models(runner) for m in model.modules() if isinstance(m, V4Cache)]
    execute, count = runner.execute_model, {"pages": 0}
    already: set[int] = set()

    def poisoned(*args: Any, **kwargs: Any) -> Any:
        import torch

        unowned = {b.block_id for b in pool.blocks if b.is_null or (b.ref_cnt == 0 and b.block_hash is None)}
        fresh = torch.tensor(
            sorted(unowned - already), dtype=torch.long
        )  # the others are NaN still: nobody owned them since
        for cache in caches:
            cache.view(torch.uint8)[fresh] = 0xFF
        already.clear()
        already.update(unowned)
        count["pages"] += len(fresh)
        return execute(*args, **kwargs)

    runner.execute_model = poisoned
    return count


def models(runner: Any) -> list[Any]:
    """The served one, and its draft."""
    drafter = getattr(runner, "speculator", None) or getattr(runner, "drafter", None)
    return [runner.get_model(), *([] if drafter is None else [drafter.model])]


def record_quantised(llm: Any) -> dict[str, list[Any]]:
    """Start recording in this process. See `replay.record_quantised`."""
    from dsv4_vllm.caches import V4Cache
    from tests.support.replay import record_quantised

    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    return record_quantised({id(m.pages): m.prefix for m in runner.get_model().modules() if isinstance(m, V4Cache)})


def replace_weights(
    llm: Any, disk: str | None = None, tensors: str | None = None, without: tuple[str, ...] = ()
) -> tuple[bool, str]:
    """Whether it was done, and the message where it was not."""
    arguments: dict[str, Any] = {"weights_path": disk}
    if tensors is not None:
        from safetensors.torch import load_file

        found = {name: t for file in Path(tensors).glob("*.safetensors") for name, t in load_file(file).items()}
        arguments = {"weights_iterator": [(name, t) for name, t in found.items() if name not in without]}
    try:
        llm.collective_rpc("reload_weights", kwargs=arguments)
    except Exception as error:
        return False, str(error)
    llm.reset_prefix_cache()
    return True, ""


def accepted(llm: Any) -> dict[str, Any]:
    """The engine's own counters of drafts."""
    found = {m.name.removeprefix("vllm:spec_decode_"): m for m in llm.get_metrics() if "spec_decode" in m.name}
    return {
        "drafts": found["num_drafts"].value,
        "tokens": found["num_draft_tokens"].value,
        "kept": found["num_accepted_tokens"].value,
        "kept_by_position": list(found["num_accepted_tokens_per_pos"].values),
    }


def describe(output: Any) -> dict[str, Any]:
    """A request's tokens and the log-probability of each prompt token (but the first) and each
    generated one."""
    completion = output.outputs[0]
    generated = [entry[token].logprob for token, entry in zip(completion.token_ids, completion.logprobs, strict=True)]
    prompt = None
    if output.prompt_logprobs is not None:
        prompt = [
            entry[token].logprob
            for token, entry in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
        ]
    return {
        "prompt": list(output.prompt_token_ids),
        "tokens": list(completion.token_ids),
        "prompt_logprobs": prompt,
        "logprobs": generated,
        "cached": output.num_cached_tokens,
    }


def main() -> None:
    plan = json.load(sys.stdin)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # worker processes inherit file descriptor 1 and log there
    if plan.get("mutation"):
        from tests.support.mutation import mutate

        mutate(*plan["mutation"])
    if os.environ.get("TRITON_INTERPRET") == "1":
        from tests.support import interpreter_bf16

        interpreter_bf16.install()
    mapped = {}
    if plan.get("mapping"):
        from tests.support import mapping

        mapped = mapping.record_mapping()
    from vllm import LLM, SamplingParams

    graphs = None
    if plan.get("graphs"):
        from tests.support import vllm_graphs

        vllm_graphs.install(**plan["graphs"])
    start = time.monotonic()
    llm = LLM(enforce_eager=True, skip_tokenizer_init=True, disable_log_stats=False, **plan["engine"])
    ready = time.monotonic() - start
    poisoned = poison_unowned_pages(llm) if plan.get("poison") else {"pages": 0}
    recorded = record_quantised(llm) if plan.get("record") else None
    launched = []
    if plan.get("launches"):
        from dsv4_vllm.model import V4DecoderLayer
        from tests.support.launches import record_launches

        launched = record_launches(V4DecoderLayer)
    if plan.get("graphs"):
        graphs = vllm_graphs.Graphs(llm)
    taken = None
    if plan.get("memory"):
        from tests.support import vllm_memory

        taken = vllm_memory.record_attention(llm)
    drafts = None
    if "drafts" in plan:
        from tests.support.vllm_drafts import Drafts

        drafts = Drafts(llm, plan["drafts"])
    variants = None
    if plan.get("variants"):
        from tests.support.variants import ServedVariants

        variants = ServedVariants()
    phases, updates = [], []
    for number, phase in enumerate(plan["phases"]):
        if update := plan.get("updates", {}).get(str(number)):
            updates.append(replace_weights(llm, **update))
        params = [
            SamplingParams(
                max_tokens=r["max_tokens"], temperature=r.get("temperature", 0), seed=r.get("seed"), detokenize=False,
                ignore_eos=True, logprobs=0, prompt_logprobs=0 if r.get("prompt_logprobs") else None,
            )
            for r in phase
        ]  # fmt: skip
        outputs = llm.generate([{"prompt_token_ids": r["prompt"]} for r in phase], params, use_tqdm=False)
        phases.append([describe(o) for o in outputs])
    metrics = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
    result = {
        "ready_s": ready,
        "phases": phases,
        "updates": updates,
        "preemptions": metrics.get("vllm:num_preemptions", 0),
        "poisoned_pages": poisoned["pages"],
        "workers": llm.collective_rpc("dsv4_status") if plan.get("status", True) else [],
        "launches": launched,
    }
    if taken is not None:
        result |= {"memory": taken, "still_held": vllm_memory.still_held(llm)}
    if graphs is not None:
        result["graphs"] = graphs.report()
    if drafts is not None:
        result["drafts"] = drafts.rows
    if plan["engine"].get("speculative_config"):
        result["accepted"] = accepted(llm)
    if mapped:
        runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
        result["counts"] = {"mapped": list(mapped), "parameters": mapping.parameters(runner.get_model())}
    if variants is not None:
        runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
        result["variants"] = variants.report(lambda: runner.get_model().kernel_warm_up.compile_many(["dsv4"]))
    if recorded is not None:
        import torch

        torch.save(recorded, plan["record"])
    json.dump(result, out)
    out.flush()


if __name__ == "__main__":
    main()
