# SPDX-License-Identifier: Apache-2.0
"""How many requests vLLM's own block manager and scheduler hold at once, on a CPU:
`python vllm_capacity.py < cases.json > held.json`.

A case is a `Case` as a dictionary; the answer is a list with one number per case. No model is
loaded: cache groups are those of the V4 layers, blocks are numbers.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

from dsv4.model.kv_layout import CacheFormats, IndexFormat, KvFormat, StateMapping
from dsv4.planning.deployment import find_checkpoint
from dsv4.planning.recipe.question import KvQuestion

FORMATS = CacheFormats(KvFormat.FP8_DS_MLA, IndexFormat.FP8)
SETTLING_TOKENS = 256  # decoded by each request at the end of its context, so that its prefill's blocks are gone


@dataclass(frozen=True, kw_only=True)
class Case:
    """Requests of `context` tokens in a pool of `pool_bytes`, steps of `step` tokens. drafts:
    tokens per step.

    by: `manager` fills requests one after another and lets each decode to its full length, less
    than a page below `context` so that ends lie anywhere in their pages, before the next is
    admitted; `scheduler` queues them all and counts at the moment the first one ends.
    queued: requests in that queue.
    """

    model: str
    state: str
    context: int
    step: int
    asynchronous: bool
    drafts: int
    pool_bytes: int
    by: Literal["manager", "scheduler"]
    queued: int = 0

    @property
    def question(self) -> KvQuestion:
        """What `dsv4.probe` builds cache groups from."""
        checkpoint = find_checkpoint(self.model)
        c = checkpoint.config
        draft_layers = c.num_draft_layers if self.drafts else 0
        return KvQuestion(
            checkpoint=checkpoint.id,
            state=StateMapping(self.state),
            compress_ratios=tuple(layer.compress_ratio for layer in c.layers),
            num_draft_layers=draft_layers,
            speculative=c.draft if self.drafts else "none",
            draft_tokens=self.drafts + 1 if self.drafts else 0,
            stages=((0, c.num_hidden_layers + draft_layers),),
            kv_dtype=FORMATS.kv,
            index_dtype=FORMATS.index,
            head_dim=c.head_dim,
            rope_dim=c.qk_rope_head_dim,
            index_head_dim=c.index_head_dim,
            sliding_window=c.sliding_window,
            max_model_len=self.context,
            max_num_batched_tokens=self.step,
            max_num_seqs=1,
            async_scheduling=self.asynchronous,
            dp=1,
            swa_full_tokens_ratio=None,
            pool_bytes=(self.pool_bytes,),
        )

    @property
    def output(self) -> int:
        """Tokens that the scheduler lets each request decode, one a step: long enough that the
        first still decodes when the last has been prefilled.
        """
        share = self.step - self.queued * (1 + self.drafts)
        return self.queued * self.context // share + 16 + SETTLING_TOKENS

    @property
    def batches(self) -> int:
        """Steps in flight."""
        return 2 if self.asynchronous else 1

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def kv_cache_config(probe: Any, q: KvQuestion) -> Any:
    """The scheduler's KVCacheConfig, by vLLM's own planner."""
    from dsv4.probe.engine import symbol

    planning = symbol("vllm.v1.core.kv_cache_planning vllm.v1.core.kv_cache_utils")
    config, specs = probe._config(q), probe._specs(q)
    lead = probe._leading_arguments(config)
    extra = [planning.get_global_kv_cache_groups(config, [specs])] if lead[1:] else []
    configs = planning.get_kv_cache_configs(config, [specs], list(q.pool_bytes), *extra)
    return symbol("vllm.v1.core.kv_cache_utils:generate_scheduler_kv_cache_config")(configs)


def register_managers() -> None:
    """Once per process, where this vLLM does not do it on import."""
    from dsv4.probe.engine import symbol

    with contextlib.suppress(ImportError):
        symbol("vllm.v1.core.single_type_kv_cache_manager:register_all_kvcache_specs")(None)


def request(name: str, prompt: int, output: int) -> Any:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.request import Request

    return Request(name, [0] * prompt, SamplingParams(max_tokens=output, ignore_eos=True), None)


def held_by_manager(case: Case, kv: Any) -> int:
    """Requests that KVCacheManager holds, each prefilled in chunks, then decoded to its full
    length, before the next."""
    from vllm.v1.core.kv_cache_manager import KVCacheManager

    manager = KVCacheManager(
        kv_cache_config=kv,
        max_model_len=case.context,
        scheduler_block_size=256,
        hash_block_size=256,
        max_in_flight_tokens=case.batches * case.step,
        enable_caching=False,
    )
    held = 0
    while _serve(manager, case, request(f"r{held}", case.context - 2 * SETTLING_TOKENS, SETTLING_TOKENS), held):
        held += 1
    return held


def _serve(manager: Any, case: Case, r: Any, number: int) -> bool:
    """Prefill and decode `r`; False when blocks are refused. 97 spreads ends evenly over 256."""
    in_flight: list[int] = []
    end = case.context - number * 97 % 256
    while r.num_computed_tokens < end:
        left = r.num_prompt_tokens - r.num_computed_tokens
        tokens = min(case.step, left) if left > 0 else min(1 + case.drafts, end - r.num_computed_tokens)
        r.num_in_flight_tokens = sum(in_flight)
        if (
            manager.allocate_slots(
                r,
                tokens,
                num_lookahead_tokens=case.drafts,
                full_sequence_must_fit=r.num_computed_tokens == 0,
            )
            is None
        ):
            return False
        r.num_computed_tokens += tokens
        in_flight = [*in_flight, tokens][-(case.batches - 1) :] if case.batches > 1 else []
    return True


def held_by_scheduler(case: Case, kv: Any) -> int:
    """Requests that run, none preempted, when the first of `case.queued` reaches its full
    length."""
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
    from vllm.v1.structured_output import StructuredOutputManager

    config = _vllm_config(case, kv)
    assert config.max_in_flight_tokens == case.batches * case.step
    scheduler = (AsyncScheduler if case.asynchronous else Scheduler)(
        config, kv, StructuredOutputManager(config), block_size=256, hash_block_size=256
    )
    requests = [request(f"r{i}", case.context - case.output, case.output) for i in range(case.queued)]
    for r in requests:
        scheduler.add_request(r)
    pending: list[tuple[Any, list[list[int]]]] = []
    most = 0
    while not any(r.is_finished() for r in requests):
        most = sum(r in scheduler.running and not r.is_prefill_chunk for r in requests)
        out = scheduler.schedule()
        # Every draft is rejected: what was allocated for it stays with the request.
        sampled = [[] if scheduler.requests[name].is_prefill_chunk else [7] for name in out.num_scheduled_tokens]
        pending.append((out, sampled))
        if len(pending) < case.batches:
            continue
        out, sampled = pending.pop(0)
        names = list(out.num_scheduled_tokens)
        result = ModelRunnerOutput(
            req_ids=names, req_id_to_index={n: i for i, n in enumerate(names)}, sampled_token_ids=sampled
        )
        scheduler.update_from_output(out, result)
        if case.drafts and not case.asynchronous:
            scheduler.update_draft_token_ids(DraftTokenIds(names, [[7] * case.drafts for _ in names]))
    return most


def _vllm_config(case: Case, kv: Any) -> Any:
    """A real VllmConfig, of a model so small that only lengths and limits count."""
    from vllm.engine.arg_utils import EngineArgs

    with tempfile.TemporaryDirectory() as folder:
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}
        text = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 1, **sizes}
        limits = {"vocab_size": 128, "max_position_embeddings": 1 << 20, "dtype": "bfloat16"}
        (Path(folder) / "config.json").write_text(json.dumps({**text, **limits}))
        config = EngineArgs(
            model=folder,
            skip_tokenizer_init=True,
            max_model_len=case.context,
            max_num_batched_tokens=case.step,
            max_num_seqs=min(1024, case.step),
            enable_prefix_caching=False,
        ).create_engine_config()
    config.scheduler_config.async_scheduling = case.asynchronous  # a CPU's default is off
    config.cache_config.num_gpu_blocks = kv.num_blocks
    if case.drafts:
        # What the scheduler and VllmConfig ask of a draft that has caches of its own.
        object.__setattr__(
            config,
            "speculative_config",
            SimpleNamespace(
                num_speculative_tokens=case.drafts,
                num_speculative_tokens_per_batch_size=None,
                method="mtp",
                use_eagle=lambda: True,
                use_eagle_block_drop=lambda: True,
                max_num_new_slots_for_drafting=0,
                use_multi_module_mtp=lambda: False,
                use_dspark=lambda: False,
                use_dflash=lambda: False,
                uses_draft_model=lambda: False,
            ),
        )
    return config


def main() -> None:
    cases = [Case(**case) for case in json.load(sys.stdin)]
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.environ |= {"VLLM_TARGET_DEVICE": "cpu", "VLLM_PLUGINS": ""}
    from dsv4.probe.vllm import VllmProbe

    probe = VllmProbe()
    register_managers()
    held = []
    for case in cases:
        kv = kv_cache_config(probe, case.question)
        held.append({"blocks": kv.num_blocks, "held": _HOW[case.by](case, kv)})
    json.dump(held, out)
    out.flush()


_HOW = {"manager": held_by_manager, "scheduler": held_by_scheduler}

if __name__ == "__main__":
    main()
