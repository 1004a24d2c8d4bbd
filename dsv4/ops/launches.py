# SPDX-License-Identifier: Apache-2.0
"""What Triton would compile for launches on a GPU that is not here, by its own rules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction, compute_cache_key, create_function_from_signature

from dsv4.ops.kernels import pretending


@dataclass(frozen=True)
class Variant:
    """A kernel as it is compiled for a launch.

    key: Triton's own: a launch with another one compiles anew
    signature, constants, attributes: of the arguments, as the compiler takes them
    options: num_warps, num_stages, maxnreg, ..., those that a launch leaves out included
    """

    kernel: Any
    key: str
    signature: Any
    constants: Any
    attributes: Any
    options: Any

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)

    def compile(self, target: str) -> Any:
        """Triton's compiled kernel."""
        source = ASTSource(fn=self.kernel, signature=self.signature, constexprs=self.constants, attrs=self.attributes)
        return triton.compile(source, target=gpu(target), options=dict(self.options.__dict__))


def gpu(target: str) -> GPUTarget:
    """Triton's description of sm90, gfx942, ..."""
    return GPUTarget("cuda", int(target[2:]), 32) if target.startswith("sm") else GPUTarget("hip", target, 64)


def variant(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any], target: str) -> Variant:
    """What a launch with these arguments needs.

    kernel: what `triton.jit` made, or the interpreter's stand-in for it
    """
    jitted = kernel if isinstance(kernel, JITFunction) else JITFunction(kernel.fn, **kernel.kwargs)
    backend = make_backend(gpu(target))
    bind = create_function_from_signature(jitted.signature, jitted.params, backend)
    bound, specialization, given = bind(*args, **kwargs)
    key = compute_cache_key({}, specialization, given)
    options, signature, constants, attributes = jitted._pack_args(backend, kwargs, bound, specialization, given)
    return Variant(jitted, f"{jitted.__name__} {key}", signature, constants, attributes, options)


@contextmanager
def noted(target: str, run: bool = True) -> Iterator[list[Variant]]:
    """Note what each launch would need on a GPU that is not here. run: in the interpreter, where
    there is one."""
    found: list[Variant] = []
    kinds = (JITFunction, InterpretedFunction)
    originals = [kind.run for kind in kinds]

    def noting(original: Any) -> Any:
        def note(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
            found.append(variant(self, args, kwargs, target))
            return original(self, *args, grid=grid, warmup=warmup, **kwargs) if run else None

        return note

    for kind, original in zip(kinds, originals, strict=True):
        kind.run = noting(original)
    try:
        yield found
    finally:
        for kind, original in zip(kinds, originals, strict=True):
            kind.run = original


@contextmanager
def recorded(target: str) -> Iterator[list[Variant]]:
    """Note launches as those of a GPU that is not here, instead of running them."""
    with pretending(target), noted(target, run=False) as found:
        yield found
