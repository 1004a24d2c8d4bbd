# SPDX-License-Identifier: Apache-2.0
"""An SGLang plugin that watches and breaks dsv4 in the engine's own processes, as the plan of a
test says.

Options of the plan: "poison": fill memory that nobody owns with NaN before every step; "record": a
file for every row that was quantised, for replay through the reference model; "mutation": [module,
old, new], break a module's source; "chunk": prefill chunks of that many tokens, whatever page they
end in; "skip_hook": a hook target that silently does not apply; "allow_fp4_indexer": mxfp4 index
keys on any device;
"graphs": sizes of decode graphs, replayed from tapes;
"drafts": texts, whose tokens are put in the place of drafted ones, right up to a random depth, or
none; "watch_drafts": report what was drafted and how much of it was kept;
"mapping": report where tensors were loaded; "launches": report the kernels that each layer
launched, "variants" those that the warm-up would not have compiled. Under TRITON_INTERPRET=1 the
interpreter computes in bf16 as GPUs do.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

PLAN: dict[str, Any] = (
    json.loads(Path(os.environ["TEST_SGLANG_PLAN"]).read_text()) if "TEST_SGLANG_PLAN" in os.environ else {}
)
RUN_BATCH = "sglang.srt.managers.scheduler.Scheduler.run_batch"
COUNTS: dict[str, Any] = {"poisoned_pages": 0, "prefill_steps": 0, "largest_prefill": 0}
RECORDED: list[dict[str, list[Any]]] = []
GRAPHS: list[Any] = []
DRAFTS: list[Any] = []
VARIANTS: list[Any] = []
MAPPED: list[dict[tuple[Any, ...], None]] = []


def register() -> None:
    """sglang.srt.plugins entry point."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if os.environ.get("TRITON_INTERPRET") == "1":
        from tests.support import interpreter_bf16

        interpreter_bf16.install()
    if PLAN.get("mutation"):
        from tests.support.mutation import mutate

        mutate(*PLAN["mutation"])
    if PLAN.get("skip_hook"):
        HookRegistry._patched.add(PLAN["skip_hook"])  # what SGLang believes it has patched, it leaves alone
    if PLAN.get("chunk"):
        HookRegistry.register(
            "sglang.srt.managers.schedule_policy.PrefillAdder.__init__", chunks_of_any_size, HookType.AROUND
        )
    if PLAN.get("allow_fp4_indexer"):
        from sglang.srt.arg_groups import serving_hook

        serving_hook.is_gfx95_supported = lambda: True  # one of the devices that its check lets through
    if PLAN.get("mapping"):
        from tests.support.mapping import record_mapping

        MAPPED.append(record_mapping())
    if "drafts" in PLAN or PLAN.get("watch_drafts"):
        from tests.support.sglang_drafts import Drafts

        DRAFTS.append(Drafts(PLAN.get("drafts")))
    HookRegistry.register(RUN_BATCH, before_batch, HookType.BEFORE)
    HookRegistry.register("sglang.srt.managers.scheduler.Scheduler.get_internal_state", add_counts, HookType.AFTER)


def chunks_of_any_size(original: Callable[..., Any], adder: Any, *args: Any, **kwargs: Any) -> None:
    """SGLang wants chunks of whole pages, except on one GPU; this takes that path with a budget of
    our own."""
    original(adder, *args, **kwargs)
    adder.exact_chunk_fill = True
    adder.rem_chunk_tokens = PLAN["chunk"]


def before_batch(scheduler: Any, batch: Any, *args: Any, **kwargs: Any) -> None:
    if batch.forward_mode.is_extend():
        COUNTS["prefill_steps"] += 1
        COUNTS["largest_prefill"] = max(COUNTS["largest_prefill"], sum(batch.extend_lens))
    if PLAN.get("graphs") and not GRAPHS:
        from tests.support.sglang_graphs import Graphs

        GRAPHS.append(Graphs(scheduler.tp_worker.model_runner, PLAN["graphs"]))
    if PLAN.get("poison"):
        COUNTS["poisoned_pages"] += poison(scheduler)
    if PLAN.get("launches") and "launches" not in COUNTS:
        from dsv4_sglang.model import V4DecoderLayer
        from tests.support.launches import record_launches

        COUNTS["launches"] = record_launches(V4DecoderLayer)
    if PLAN.get("variants") and not VARIANTS:
        from tests.support.variants import ServedVariants

        VARIANTS.append(ServedVariants())
    if PLAN.get("record") and not RECORDED:
        from tests.support.replay import record_quantised

        layers = scheduler.tp_worker.model_runner.token_to_kv_pool.layers
        names = {
            id(pages): f"model.layers.{i}.attn.{role.value}_cache"
            for i, layer in layers.items()
            for role, pages in layer.items()
        }
        RECORDED.append(record_quantised(names))


def poison(scheduler: Any) -> int:
    """Fill every page and slot that no request and no cached prefix owns with NaN; returns how many
    pages.

    0xFF in every byte is NaN as fp32, bf16, e4m3 and ue8m0. Pages are poisoned while free, so a
    page that a request gets later starts as NaN too. Page 0, which padding uses, and scratch memory
    are poisoned with them.
    """
    import torch

    from dsv4.model.kv_layout import CacheRole
    from dsv4_sglang.caches import ring_pages_per_owner

    allocator = scheduler.token_to_kv_pool_allocator
    runners = [scheduler.tp_worker.model_runner]
    if scheduler.draft_worker is not None:
        runners.append(scheduler.draft_worker.draft_worker.draft_runner)
    full, window = (_free(side) for side in (allocator.full_attn_allocator, allocator.swa_attn_allocator))
    slots = torch.tensor([0, *scheduler.req_to_token_pool.free_slots], dtype=torch.long)
    for pool in (runner.token_to_kv_pool for runner in runners):
        for layer in pool.served:
            for role, pages in pool.layers[layer.index].items():
                if role in (CacheRole.STATE, CacheRole.INDEX_STATE):
                    owners, ring = (
                        (window if layer.compress_ratio == 4 else slots),
                        ring_pages_per_owner(layer, pool.drafted),
                    )
                    where = (owners[:, None] * ring + torch.arange(ring)).flatten()
                else:
                    where = window if role is CacheRole.WINDOW else full
                pages.data.flatten(1).view(torch.uint8)[where] = 0xFF
        for memory in pool._scratch.values():
            memory.fill_(float("nan"))
    return len(full) + len(window) - 2


def _free(side: Any) -> Any:
    import torch

    return torch.cat([torch.zeros(1, dtype=torch.long), side.get_all_free_pages().long()])


def add_counts(result: Any, scheduler: Any, *args: Any, **kwargs: Any) -> Any:
    """Hand the counts to the driver, and save what was recorded."""
    result.internal_state["dsv4_test"] = COUNTS
    if MAPPED:
        from tests.support.mapping import parameters

        found = {"mapped": list(MAPPED[0]), "parameters": parameters(scheduler.tp_worker.model_runner.model)}
        result.internal_state["dsv4_test"] = COUNTS | found
    if GRAPHS:
        result.internal_state["dsv4_test"] = COUNTS | {"graphs": GRAPHS[0].report()}
    if DRAFTS:
        result.internal_state["dsv4_test"] = COUNTS | {"drafts": DRAFTS[0].report()}
    if VARIANTS:
        runner = scheduler.tp_worker.model_runner
        report = VARIANTS[0].report(lambda: runner.model.prepare_before_cuda_graph_capture(runner))
        result.internal_state["dsv4_test"] = COUNTS | {"variants": report}
    if RECORDED:
        import torch

        torch.save(RECORDED[0], PLAN["record"])
    return result
