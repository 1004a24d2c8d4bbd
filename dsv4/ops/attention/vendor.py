# SPDX-License-Identifier: Apache-2.0
"""FlashMLA's sparse decode, from the library in vLLM's wheel, on the same page bytes.

It has binaries for sm90 and sm100 only and reads 584-byte rows only. The library is loaded by path: the core imports no
engine, and the operators it registers are all that is used.
"""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import torch
from torch import Tensor

from dsv4.model.kv_layout import KvFormat
from dsv4.ops.kernels import on_amd
from dsv4.ops.pages import Pages
from dsv4.ops.rope import apply_rope

ROW_BYTES = 584
CAPABILITIES = ((9, 0), (10, 0))


@functools.cache
def library() -> Path | None:
    """The FlashMLA library of an installed vLLM."""
    spec = importlib.util.find_spec("vllm")
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        for file in sorted(Path(folder).glob("_flashmla_C*.so")):
            return file
    return None


def refuse_flash_mla(device: torch.device) -> str | None:
    """Why FlashMLA does not serve on `device`."""
    if device.type != "cuda" or on_amd():
        return "FlashMLA is for NVIDIA GPUs"
    capability = torch.cuda.get_device_capability(device)
    if capability not in CAPABILITIES:
        return f"FlashMLA has no binary for compute capability {capability[0]}.{capability[1]}"
    if library() is None:
        return "no vLLM with a FlashMLA library is installed"
    return "no committed record of benchmarks/bench_ops.py shows it faster here than the Triton kernel"


def flash_mla(
    q: Tensor,
    window: Pages,
    window_slots: Tensor,
    window_lens: Tensor,
    entries: Pages | None,
    entry_slots: Tensor | None,
    entry_row: Tensor | None,
    entry_lens: Tensor | None,
    sink: Tensor,
    rope_dim: int,
    cos_sin: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `reference.sparse_attention`. Raises ValueError for plain rows."""
    if window.format is not KvFormat.FP8_DS_MLA:
        raise ValueError(f"FlashMLA reads 584-byte rows, not {window.format.value}")
    torch.ops.load_library(str(library()))
    extra: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
    if entries is not None and entry_slots is not None and entry_row is not None and entry_lens is not None:
        extra = rows_of(entries), entry_slots[entry_row.long(), None].contiguous(), entry_lens
    out, lse, _, _ = torch.ops._flashmla_C.sparse_decode_fwd(
        q[:, None], rows_of(window), window_slots[:, None].contiguous(), window_lens, sink, None, None,
        extra[0], extra[1], extra[2], q.shape[-1], q.shape[-1] ** -0.5, None,
    )  # fmt: skip
    out = out[:, 0]
    if cos_sin is not None:
        out = apply_rope(out, cos_sin, inverse=True)
    return out, lse[:, :, 0]


def rows_of(pages: Pages) -> Tensor:
    """Pages as the library's [P, rows, 1, 584]; it takes values and scales apart itself."""
    stride = pages.data.stride(0)
    return pages.data.as_strided((pages.data.shape[0], pages.rows, 1, ROW_BYTES), (stride, ROW_BYTES, ROW_BYTES, 1))
