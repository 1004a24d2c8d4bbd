# SPDX-License-Identifier: Apache-2.0
"""Our kernels launched in each decoder layer of an engine, seen from inside its process, in
Triton's interpreter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

LIMIT = {"swa": 6, "hca": 8, "csa": 12}
# The feed-forward half of a layer: an engine that brings its own router or activation launches
# those instead.
FEED_FORWARD = frozenset({"route_topk", "route_hash", "swiglu"})


def record_launches(layer_class: type) -> list[dict[str, Any]]:
    """Collect {"layer", "kind", "tokens", "kernels"} of every call of a decoder layer: which
    kernels of dsv4 it launched."""
    from triton.runtime.interpreter import GridExecutor

    calls: list[dict[str, Any]] = []
    run, forward = GridExecutor.__call__, layer_class.forward
    inside = False

    def counted(self: Any, *args: Any, **kwargs: Any) -> None:
        if inside and self.fn.__module__.startswith("dsv4."):
            calls[-1]["kernels"].append(self.fn.__name__.removesuffix("_kernel"))
        run(self, *args, **kwargs)

    def watched(self: Any, before: Any, rope: Any, input_ids: Any) -> Any:
        nonlocal inside
        spec = self.attn.layer
        calls.append({"layer": spec.index, "kind": spec.kind.value, "tokens": rope.window.shape[0], "kernels": []})
        inside = True
        try:
            return forward(self, before, rope, input_ids)
        finally:
            inside = False

    GridExecutor.__call__, layer_class.forward = counted, watched
    return calls


def assert_decode_limits(calls: Sequence[dict[str, Any]], requests: int, split: set[str]) -> None:
    """No decode step of this many requests launched more kernels in a layer than its kind may,
    experts left out.

    split: the kinds of layer whose attention was split and joined, without which a launch would be
    missing.
    """
    decode = [c for c in calls if c["tokens"] == requests]
    assert {c["kind"] for c in decode} == set(LIMIT), "not every kind of layer was seen in a decode step"
    report, over = [], False
    for call in decode:
        mixing = [k for k in call["kernels"] if k not in FEED_FORWARD]
        over |= len(mixing) > LIMIT[call["kind"]]
        report.append(
            f"layer {call['layer']} ({call['kind']}, at most {LIMIT[call['kind']]}): {len(mixing)} {' '.join(mixing)}"
        )
    print("\n".join(report[: 1 + max(c["layer"] for c in decode)]))
    assert all("attend" in call["kernels"] for call in decode), report
    assert {call["kind"] for call in decode if "combine" in call["kernels"]} == split, report
    assert not over, "\n".join(report)
