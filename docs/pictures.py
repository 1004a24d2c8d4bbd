# SPDX-License-Identifier: Apache-2.0
"""Draws the pictures of docs/anatomy.md from the code: `python docs/pictures.py`; tests hold the
committed files to it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib

from dsv4.model.config import CSA_RATIO, LayerKind
from dsv4.model.kv_layout import (
    CacheFormats,
    CacheRole,
    IndexFormat,
    KvFormat,
    StateMapping,
    layer_caches,
    state_ring_rows,
)
from dsv4.planning.deployment import find_checkpoint

matplotlib.use("Agg")
matplotlib.rcParams.update({"svg.hashsalt": "dsv4", "svg.fonttype": "none", "font.size": 9})
from matplotlib import pyplot  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.patches import Rectangle  # noqa: E402

HERE = Path(__file__).parent
FORMATS = CacheFormats(KvFormat.FP8_DS_MLA, IndexFormat.FP8)
BLUE, ORANGE, GREEN, GREY, WHITE = "#9ecae1", "#fdae6b", "#a1d99b", "#d9d9d9", "#ffffff"


def box(axes: Axes, at: tuple[float, float], size: tuple[float, float], text: str, colour: str = WHITE) -> None:
    """at: lower left corner; size: width, height."""
    axes.add_patch(Rectangle(at, *size, facecolor=colour, edgecolor="black", linewidth=0.8))
    axes.text(at[0] + size[0] / 2, at[1] + size[1] / 2, text, ha="center", va="center")


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "linewidth": 0.8})


def words(axes: Axes) -> None:
    """Which tokens an entry pools, and what a query sees."""
    tokens, query, window = 20, 17, 6
    for t in range(tokens):
        seen = query - window < t <= query
        box(axes, (t, 2), (1, 0.8), str(t), BLUE if seen else WHITE if t <= query else GREY)
    axes.text(-0.3, 2.4, "tokens", ha="right", va="center")
    axes.text(tokens + 0.3, 2.4, f"window of query {query}, here {window} wide (128)", va="center")
    for j in range(tokens // CSA_RATIO):
        first = j * CSA_RATIO
        visible = j < (query + 1) // CSA_RATIO
        box(axes, (first, 0), (CSA_RATIO, 0.8), f"entry {j}", GREEN if visible else GREY)
        arrow(axes, (first + 2, 2), (first + 2, 0.8))
        if j:
            arrow(axes, (first - 2, 2), (first + 1.4, 0.8))
    axes.text(-0.3, 0.4, "entries", ha="right", va="center")
    axes.text(
        tokens + 0.3,
        0.4,
        f"CSA: one per {CSA_RATIO} tokens, pooled from\nits own window (columns B)\nand the one before (columns A)",
        va="center",
    )
    axes.text(-0.3, 1.4, "pooling", ha="right", va="center")
    axes.text(query + 1, 3.1, "open window: 16, 17", ha="center")
    axes.set(xlim=(-3, 31), ylim=(-0.3, 3.5))


def page(axes: Axes) -> None:
    """The bytes of a CSA page with summaries."""
    config = find_checkpoint("flash").config
    layer = next(layer for layer in config.layers if layer.kind is LayerKind.CSA)
    spec = next(s for s in layer_caches(config, layer, FORMATS, StateMapping.SUMMARY) if s.role is CacheRole.COMPRESSED)
    rows, values, scales = spec.rows_per_page, spec.row.value_bytes, spec.row.scale_bytes
    parts = [
        (rows * values, f"{rows} rows of values\n{rows} x {values} B", BLUE),
        (rows * scales, f"scales\n{rows} x {scales} B", ORANGE),
        (spec.tail_bytes, f"tail: a summary\n{spec.tail_bytes:,} B", GREEN),
        (spec.page_bytes - spec.tail_offset - spec.tail_bytes, "pad", GREY),
    ]
    widths, at = (9.0, 3.4, 4.2, 2.8), 0.0  # not to scale: values would hide the rest
    offset = 0
    for (size, text, colour), width in zip(parts, widths, strict=True):
        box(axes, (at, 1.6), (width, 1), text, colour)
        axes.text(at, 1.45, f"{offset:,}", ha="left", va="top", fontsize=7)
        at, offset = at + width, offset + size
    axes.text(at, 1.45, f"{spec.page_bytes:,}", ha="center", va="top", fontsize=7)
    box(axes, (0, 0), (5, 0.8), "448 e4m3", BLUE)
    box(axes, (5, 0), (2.4, 0.8), "64 bf16", BLUE)
    box(axes, (9.8, 0), (3.2, 0.8), "7 ue8m0 + 1", ORANGE)
    axes.text(7.6, 0.4, "one row", va="center")
    axes.text(13.2, 0.4, f"slot = page * {rows} + row;\nthe page's stride is the engine's", va="center")
    axes.set(xlim=(-0.2, 20.5), ylim=(-0.3, 2.9))


STEP = (
    ("mhc.post_pre", "mix the last site in, collapse the\nstreams, normalise: y", GREEN),
    ("wq_a, wkv, wq_b, wgate ...", "the engine's GEMMs: q, kv, kv and gate\nof both compressors, index query", GREY),
    ("attention.norm_rope_store", "norm and rotate q and kv;\nkv into its window page", BLUE),
    ("summary.compress", "this token into the open windows;\nevery 4th: an entry and an index key", ORANGE),
    ("indexer.prepare_query, logits, topk", "512 (Flash) or 1024 (Pro)\nentries, as slots", ORANGE),
    ("attention.sparse", "128 window rows, the chosen entries,\nthe sink; o, rotated back", BLUE),
    ("attention.output_a, wo_b", "grouped, then whole projection: the\nnext site's y to mix in", GREY),
)


def step(axes: Axes) -> None:
    """A decode step of one CSA layer's attention site, in order."""
    top = len(STEP)
    for i, (name, what, colour) in enumerate(STEP):
        y = top - i
        box(axes, (0, y), (7.4, 0.7), name, colour)
        axes.text(7.8, y + 0.35, what, va="center")
        if i:
            arrow(axes, (3.7, y + 1), (3.7, y + 0.7))
    axes.set(xlim=(-0.3, 16), ylim=(0.8, top + 1))


def mappings(axes: Axes) -> None:
    """Compressor state of one CSA and one HCA layer in each mapping, by what it grows with."""
    config = find_checkpoint("flash").config
    kinds = {
        kind: next(layer for layer in config.layers if layer.kind is kind) for kind in (LayerKind.CSA, LayerKind.HCA)
    }
    text = {
        StateMapping.PAGED: "paged: a raw row per token in flight,\nin sliding-window groups of the pool",
        StateMapping.RING: "ring: raw rows of the open windows;\nCSA's hang on window pages,\nHCA's on the request",
        StateMapping.SUMMARY: "summary: maximum, sum, weighted sum\nper channel; one block per request,\none tail per CSA page",
    }
    for i, (mapping, says) in enumerate(text.items()):
        y = 2 * (len(text) - i)
        axes.text(0, y + 0.7, says, va="center")
        for k, (kind, layer) in enumerate(kinds.items()):
            specs = layer_caches(config, layer, FORMATS, mapping)
            state = [s for s in specs if s.role in (CacheRole.STATE, CacheRole.INDEX_STATE)]
            size = sum(s.row.row_bytes for s in state)
            unit = "a request" if mapping is StateMapping.SUMMARY else "a token in flight"
            if mapping is StateMapping.RING:
                size *= state_ring_rows(layer, speculative=False)
                unit = "a window page" if kind is LayerKind.CSA else "a request"
            tails = sum(s.tail_bytes for s in specs)
            more = f"\n+ {tails:,} B a page" if tails else ""
            box(
                axes,
                (8.5 + 5.2 * k, y),
                (4.8, 1.4),
                f"{kind.value.upper()}: {size:,} B\n{unit}{more}",
                ORANGE if k else BLUE,
            )
    axes.set(xlim=(-0.3, 19.5), ylim=(1.7, 7.8))


PICTURES: dict[str, tuple[Callable[[Axes], None], tuple[float, float]]] = {
    "anatomy-words.svg": (words, (10, 2.2)),
    "anatomy-page.svg": (page, (8.5, 2.0)),
    "anatomy-step.svg": (step, (8, 4.6)),
    "anatomy-mappings.svg": (mappings, (8.5, 3.4)),
}


def draw(folder: Path) -> None:
    """Write every picture into `folder`."""
    for name, (picture, size) in PICTURES.items():
        figure, axes = pyplot.subplots(figsize=size)
        axes.set_axis_off()
        picture(axes)
        figure.savefig(folder / name, metadata={"Date": None}, bbox_inches="tight")
        pyplot.close(figure)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
