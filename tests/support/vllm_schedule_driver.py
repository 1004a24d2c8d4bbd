# SPDX-License-Identifier: Apache-2.0
"""One vLLM engine that lives through many schedules: a line of JSON in, a line of JSON out, until
stdin ends.

The first line holds the LLM arguments. A schedule is a list of {"step": n, "prompt": [ids],
"max_tokens": n, "abort": n or null}: when each request arrives, and after how many generated tokens
its client leaves. The prefix cache lives on from schedule to schedule; pages that nobody owns are
NaN before every step.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

from tests.support.vllm_driver import accepted, poison_unowned_pages


def run_schedule(engine: Any, schedule: list[dict[str, Any]], serial: int) -> list[dict[str, Any]]:
    """Each request's prompt, tokens, log-probabilities and cached prompt tokens, in the order of
    the schedule."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    waiting = sorted(range(len(schedule)), key=lambda i: schedule[i]["step"])
    found: dict[str, dict[str, Any]] = {}
    step = 0
    while waiting or engine.has_unfinished_requests():
        while waiting and (schedule[waiting[0]]["step"] <= step or not engine.has_unfinished_requests()):
            i = waiting.pop(0)
            params = SamplingParams(
                max_tokens=schedule[i]["max_tokens"], temperature=0, detokenize=False, ignore_eos=True, logprobs=0,
                output_kind=RequestOutputKind.CUMULATIVE,
            )  # fmt: skip
            engine.add_request(f"{serial}-{i}", {"prompt_token_ids": schedule[i]["prompt"]}, params)
            found[f"{serial}-{i}"] = {
                "prompt": schedule[i]["prompt"],
                "tokens": [],
                "logprobs": [],
                "prompt_logprobs": None,
                "cached": 0,
            }
        for output in engine.step():
            completion = output.outputs[0]
            tokens = list(completion.token_ids)
            seen = found[output.request_id]
            seen["tokens"], seen["cached"] = tokens, output.num_cached_tokens or 0
            seen["logprobs"] = [entry[t].logprob for t, entry in zip(tokens, completion.logprobs, strict=True)]
            leaves_after = schedule[int(output.request_id.split("-")[1])]["abort"]
            if leaves_after is not None and len(tokens) >= leaves_after and not output.finished:
                engine.abort_request([output.request_id])
        step += 1
    return [found[f"{serial}-{i}"] for i in range(len(schedule))]


def main() -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from vllm import LLM

    engine = json.loads(sys.stdin.readline())
    llm = LLM(enforce_eager=True, skip_tokenizer_init=True, disable_log_stats=False, **engine)
    poisoned = poison_unowned_pages(llm)
    for serial, line in enumerate(sys.stdin):
        outputs = run_schedule(llm.llm_engine, json.loads(line), serial)
        preemptions = next((m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions"), 0)
        told = {"outputs": outputs, "preemptions": preemptions, "poisoned": poisoned["pages"], "accepted": {}}
        if engine.get("speculative_config"):
            told["accepted"] = accepted(llm)
        print(json.dumps(told), file=out, flush=True)


if __name__ == "__main__":
    main()
