# SPDX-License-Identifier: Apache-2.0
"""The draft loop's operators on a CPU against vLLM's own Triton kernels in the interpreter, and the
sampled distribution against the target's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from dsv4_vllm import draft_ops

ROOT = Path(__file__).parents[2]


def cases() -> dict[str, torch.Tensor]:
    """Requests with 0 to 3 drafts, some right, some refused; request 3 is discarded."""
    lens, rng = torch.tensor([3, 0, 2, 3, 1]), torch.Generator().manual_seed(0)
    vocab, total = 11, int(lens.sum())
    probs = torch.rand(total, vocab, generator=rng).softmax(-1)
    drafts = torch.randint(0, vocab, (total,), generator=rng, dtype=torch.int32)
    drafts[1] = -1  # padding, which is refused
    argmax = torch.where(torch.rand(total, generator=rng) < 0.6, drafts, (drafts + 1) % vocab).clamp(min=0)
    return {
        "ends": lens.cumsum(0).to(torch.int32),
        "drafts": drafts,
        "argmax": argmax.long(),
        "bonus": torch.arange(5, dtype=torch.int32)[:, None],
        "probs": probs,
        "draft_probs": torch.rand(total, vocab, generator=rng).softmax(-1),
        "uniform": torch.rand(total, generator=rng, dtype=torch.float64),
        "recovered": torch.randint(0, vocab, (total,), generator=rng, dtype=torch.int32),
        "greedy": torch.tensor([True, True, False, False, False]),
        "inverse_q": torch.rand(5, vocab, generator=rng) + 0.1,
    }


def results(c: dict[str, torch.Tensor]) -> dict[str, list]:
    """What our operators make of the cases."""
    n, width, vocab = 5, 4, c["probs"].shape[1]
    found = {}
    ends = c["ends"].long()
    empty = lambda: torch.full((n, width), -1, dtype=torch.int64)  # noqa: E731
    for name, greedy in (("greedy", None), ("some greedy", c["greedy"])):
        out = empty()
        draft_ops.reject_greedy(out, ends, c["drafts"].long(), c["argmax"], c["bonus"].long(), greedy, width - 1)
        found[name] = out.tolist()
    for name, draft_probs in (("certain", None), ("by probability", c["draft_probs"])):
        out = empty()
        draft_ops.reject_random(
            out, ends, c["drafts"].long(), draft_probs, c["probs"], c["bonus"].long(), c["recovered"].long(),
            c["uniform"].float(), c["greedy"], width - 1, vocab, draft_probs is None,
        )  # fmt: skip
        found[name] = out.tolist()
        again = torch.zeros(len(c["drafts"]), dtype=torch.int64)
        draft_ops.sample_recovered(
            again, ends, c["drafts"].long(), draft_probs, c["probs"], c["inverse_q"], vocab, draft_probs is None
        )
        found[f"recovered {name}"] = again.tolist()
    spread = torch.zeros(len(c["drafts"]))
    draft_ops.expand(spread, torch.tensor([0.0, 1.0, 0.5, 2.0, 0.0]), c["ends"], 0, 1)
    found["spread"] = spread.tolist()
    sampled = torch.tensor([[3, 4, -1, -1], [5, -1, -1, -1], [1, 2, 3, -1], [7, 8, -1, -1], [99, -1, -1, -1]])
    discarded = torch.tensor([False, False, False, True, False])
    next_ids, counts = torch.zeros(n, dtype=torch.int64), torch.zeros(n, dtype=torch.int64)
    draft_ops.prepare_next_tokens(sampled, discarded, torch.arange(10, 15), next_ids, counts, vocab, width, n)
    found["next"], found["counts"] = next_ids.tolist(), counts.tolist()
    at, rejected = torch.zeros(n, dtype=torch.int32), torch.zeros(n, dtype=torch.int64)
    draft_ops.prepare_inputs(ends, counts, torch.tensor([0, 4, 5, 8, 12, 14], dtype=torch.int32), at, rejected, n)
    found["at"], found["rejected"] = at.tolist(), rejected.tolist()
    positions, lens = torch.tensor([0, 7, 30, 31, 9]), torch.tensor([1, 8, 31, 32, 10], dtype=torch.int32)
    table = torch.arange(20, dtype=torch.int32).view(5, 4) + 3
    out_positions, slots = torch.zeros(5, dtype=torch.int64), torch.zeros(7, dtype=torch.int64)
    draft_ops.step_metadata(positions, table, lens, out_positions, slots, 8, 32, -1)
    found["positions"], found["slots"], found["lens"] = out_positions.tolist(), slots.tolist(), lens.tolist()
    return found


def kernels(c: dict[str, torch.Tensor]) -> dict[str, list]:
    """The same by vLLM's kernels."""
    from vllm.v1.sample import rejection_sampler as r
    from vllm.v1.spec_decode import utils as u

    n, width, vocab = 5, 4, c["probs"].shape[1]
    found = {}
    empty = lambda: torch.full((n, width), -1, dtype=torch.int32)  # noqa: E731
    for name, greedy in (("greedy", None), ("some greedy", c["greedy"])):
        out = empty()
        r.rejection_greedy_sample_kernel[(n,)](
            out, c["ends"], c["drafts"], c["argmax"], c["bonus"], greedy, width - 1, None, None, SYNTHETIC_MODE=False
        )
        found[name] = out.tolist()
    for name, draft_probs in (("certain", None), ("by probability", c["draft_probs"])):
        certain, out = draft_probs is None, empty()
        r.rejection_random_sample_kernel[(n,)](
            out, c["ends"], c["drafts"], draft_probs, c["probs"], c["bonus"], c["recovered"], c["uniform"],
            c["greedy"], width - 1, vocab, None, NO_DRAFT_PROBS=certain, SYNTHETIC_MODE=False,
        )  # fmt: skip
        found[name] = out.tolist()
        again = torch.zeros_like(c["drafts"])
        r.sample_recovered_tokens_kernel[(n, width - 1)](
            again, c["ends"], c["drafts"], draft_probs, c["probs"], c["inverse_q"], vocab, 16,
            NO_DRAFT_PROBS=certain, USE_FP64_GUMBEL=False,
        )  # fmt: skip
        found[f"recovered {name}"] = again.tolist()
    spread = torch.zeros(len(c["drafts"]))
    r.expand_kernel[(n,)](spread, torch.tensor([0.0, 1.0, 0.5, 2.0, 0.0]), c["ends"], 0.0, 1.0, MAX_NUM_TOKENS=128)
    found["spread"] = spread.tolist()
    sampled = torch.tensor(
        [[3, 4, -1, -1], [5, -1, -1, -1], [1, 2, 3, -1], [7, 8, -1, -1], [99, -1, -1, -1]], dtype=torch.int32
    )
    discarded = torch.tensor([False, False, False, True, False])
    next_ids, counts = torch.zeros(n, dtype=torch.int32), torch.zeros(n, dtype=torch.int32)
    u.eagle_prepare_next_token_padded_kernel[(n,)](
        sampled, discarded, torch.arange(10, 15, dtype=torch.int32), next_ids, counts, vocab, width, n, width,
        BLOCK_SIZE_TOKENS=4,
    )  # fmt: skip
    found["next"], found["counts"] = next_ids.tolist(), counts.tolist()
    at, rejected = torch.zeros(n, dtype=torch.int32), torch.zeros(n, dtype=torch.int32)
    starts = torch.tensor([0, 4, 5, 8, 12, 14], dtype=torch.int32)
    u.eagle_prepare_inputs_padded_kernel[(n,)](c["ends"], counts, starts, at, rejected, n)
    found["at"], found["rejected"] = at.tolist(), rejected.tolist()
    positions, lens = torch.tensor([0, 7, 30, 31, 9]), torch.tensor([1, 8, 31, 32, 10], dtype=torch.int32)
    table = torch.arange(20, dtype=torch.int32).view(5, 4) + 3
    out_positions, slots = torch.zeros(5, dtype=torch.int64), torch.zeros(7, dtype=torch.int64)
    u.eagle_step_slot_mapping_metadata_kernel[(7,)](
        positions, table, 4, lens, out_positions, slots, block_size=8, max_model_len=32, n_blocks_per_req=4,
        PAD_ID=-1, batch_size=5,
    )  # fmt: skip
    found["positions"], found["slots"], found["lens"] = out_positions.tolist(), slots.tolist(), lens.tolist()
    return found


def test_each_operator_does_what_its_kernel_does():
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    code = (
        "import json; from tests.plugins.test_vllm_draft_ops import cases, kernels;"
        " out = kernels(cases()); print('RESULT' + json.dumps(out))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = json.loads(done.stdout.rsplit("RESULT", 1)[1])
    ours = results(cases())
    for name, values in theirs.items():
        assert ours[name] == values, name


def test_tokens_follow_the_targets_distribution():
    """10,000 draws of a drafted and a following token. Chi-square over 8 tokens: 7 degrees of
    freedom, 24.3 is its 99.9th percentile; the seed is fixed.
    """
    draws, vocab = 10_000, 8
    rng = torch.Generator().manual_seed(1)
    target, draft = (torch.randn(vocab, generator=rng).softmax(-1) for _ in range(2))
    ids = draft.expand(draws, -1).multinomial(1, generator=rng)[:, 0]
    ends = torch.arange(1, draws + 1)
    races = 1 / torch.empty(draws, vocab).exponential_(generator=rng)
    recovered, out = torch.zeros(draws, dtype=torch.int64), torch.full((draws, 2), -1)
    p, q = target.expand(draws, -1), draft.expand(draws, -1)
    draft_ops.sample_recovered(recovered, ends, ids, q, p, races, vocab, False)
    uniform = torch.rand(draws, generator=rng)
    greedy, bonus = torch.zeros(draws, dtype=torch.bool), torch.zeros(draws, 1, dtype=torch.int64)
    draft_ops.reject_random(out, ends, ids, q, p, bonus, recovered, uniform, greedy, 1, vocab, False)
    seen = out[:, 0].bincount(minlength=vocab).float()
    assert float(((seen - draws * target).square() / (draws * target)).sum()) < 24.3
    assert float(((seen - draws * draft).square() / (draws * draft)).sum()) > 1000  # the draft alone is far off
