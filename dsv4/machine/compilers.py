# SPDX-License-Identifier: Apache-2.0
"""The compilers that SGLang needs on a GPU, for Marlin's kernels."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path


def missing_compilers(environ: Mapping[str, str] | None = None) -> str | None:
    """What SGLang would not find when it compiles Marlin, and what to do; None where nothing is
    missing.

    Where SGLang looks is sglang/kernels/jit/utils/compile/toolchain.py.
    """
    environ = os.environ if environ is None else environ
    path = environ.get("PATH")
    found = shutil.which("nvcc", path=path)
    home = environ.get("CUDA_HOME") or environ.get("CUDA_PATH")
    home = home or (str(Path(found).parents[1]) if found else "/usr/local/cuda")
    nvcc = Path(home, "bin", "nvcc")
    ninja = shutil.which("ninja", path=path)
    missing = [what for what, there in ((f"nvcc ({nvcc})", nvcc.exists()), ("ninja", ninja)) if not there]
    if not missing:
        return None
    return (
        f"{' and '.join(missing)} not found: SGLang compiles Marlin's kernels for FP4 experts on this machine."
        " Install the CUDA toolkit, set CUDA_HOME where it is elsewhere, and `pip install ninja`"
    )
