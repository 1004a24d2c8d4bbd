# SPDX-License-Identifier: Apache-2.0
"""A CUDA graph's semantics on a CPU.

While a graph is captured, every launch is put on a tape: an operator of PyTorch, a Triton kernel in
the interpreter, or one of dsv4's operators whose reference stands in for its kernel. A launch keeps
its tensors by address and its host values as they were. Replay launches the tape again, at the
same addresses, whatever the Python code around it would do now.

- Reading a device value on the host during capture raises, and so does bringing host data in.
- What a capture allocates lies in the graph's pool, which others use between replays: before each
  replay it is filled with NaN, which as an integer is the largest.
- The pool's memory is counted while a Python object holds it, so that what a capture keeps alive
  shows.
"""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

aten = torch.ops.aten
# Little-endian 0x7FFFFFFF: NaN as fp32, bf16 and e4m3, the largest as int32.
POISON = (0xFF, 0xFF, 0xFF, 0x7F)
# What CUDA would wait for, or refuse, on a stream that captures.
HOST_READS = {
    aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero, aten.unique_dim,
    aten._unique2, aten.repeat_interleave,
}  # fmt: skip
NO_LAUNCH = {aten.empty, aten.empty_like, aten.new_empty, aten.empty_strided, aten.scalar_tensor}
HOST_DATA = {aten.lift_fresh, aten.lift_fresh_copy}


class CaptureError(RuntimeError):
    """Something that a capturing stream forbids."""


class Pool:
    """The memory of graphs that share a pool: bytes held now, at most, and taken in all."""

    def __init__(self) -> None:
        self.held = self.peak = self.taken = 0
        self._holders: dict[int, int] = {}

    def hold(self, tensor: Tensor) -> None:
        """Count the tensor's storage until no tensor that was handed out shares it."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._holders:
            self.held, self.taken = self.held + size, self.taken + size
            self.peak = max(self.peak, self.held)
        self._holders[key] = self._holders.get(key, 0) + 1
        weakref.finalize(tensor, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._holders[key] -= 1
        if not self._holders[key]:
            del self._holders[key]
            self.held -= size


@dataclasses.dataclass
class Launch:
    """function, args and kwargs as they were; made: the results whose memory is the pool's."""

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    made: list[tuple[int, Tensor]]

    @property
    def works(self) -> bool:
        """Whether a GPU would be launched: not for memory alone, nor for nothing."""
        packet = getattr(self.function, "overloadpacket", None)
        return packet not in NO_LAUNCH and all(t.numel() for t in tensors_of(self.args[:1]))

    def run(self) -> None:
        result = tensors_of(self.function(*self.args, **self.kwargs))
        for place, where in self.made:
            where.copy_(result[place])


class Tape:
    """What one graph, or one segment of a graph with breaks, launches."""

    def __init__(self, pool: Pool, storages: dict[int, torch.UntypedStorage]) -> None:
        self.pool, self.launches = pool, list[Launch]()
        self._storages = storages  # of the whole capture, by address

    def record(
        self,
        name: str,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        writes: bool = True,
    ) -> Any:
        """Launch, and keep the launch. writes: whether it may write its arguments; one that neither
        writes nor makes anything is a view, and is not launched again."""
        given = {t.untyped_storage()._cdata for t in tensors_of((args, kwargs))}
        with _disable_current_modes():
            kept = aliases(args), aliases(kwargs)
            result = function(*args, **kwargs)
            made = []
            for place, tensor in enumerate(tensors_of(result)):
                key = tensor.untyped_storage()._cdata
                if key not in given:
                    self._storages[key] = tensor.untyped_storage()
                    made.append((place, alias(tensor)))
                if key in self._storages:
                    self.pool.hold(tensor)
            if made or writes:
                self.launches.append(Launch(name, function, *kept, made))
        return result

    def poison(self) -> None:
        for storage in self._storages.values():
            memory = torch.empty(0, dtype=torch.uint8).set_(storage)
            for place, value in enumerate(POISON):
                memory[place :: len(POISON)] = value

    def replay(self) -> None:
        for launch in self.launches:
            launch.run()


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists, dicts and dataclasses, in a fixed order."""
    if isinstance(value, Tensor):
        return [value]
    return [t for part in _parts(value) for t in tensors_of(part)]


def _parts(value: Any) -> list[Any]:
    if isinstance(value, (tuple, list)):
        return list(value)
    if isinstance(value, dict):
        return list(value.values())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, field.name) for field in dataclasses.fields(value)]
    return []


def alias(tensor: Tensor) -> Tensor:
    """Another tensor of the same memory. PyTorch's own views would hold on to the object too."""
    where = tensor.storage_offset(), tensor.shape, tensor.stride()
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage(), *where)


def aliases(value: Any) -> Any:
    """The same with every tensor replaced by another of the same memory."""
    if isinstance(value, Tensor):
        return alias(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(aliases(part) for part in value))
    if isinstance(value, (tuple, list)):
        return type(value)(aliases(part) for part in value)
    if isinstance(value, dict):
        return {key: aliases(part) for key, part in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        twin = copy.copy(value)
        for field in dataclasses.fields(value):
            object.__setattr__(twin, field.name, aliases(getattr(value, field.name)))
        return twin
    return value


class Recorder(TorchDispatchMode):
    """Sees every operator of PyTorch while a graph is captured."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self.tape = tape

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket
        if packet in HOST_READS or (packet in (aten.index, aten.index_put_) and _by_mask(args[1])):
            raise CaptureError(f"{func} reads device values on the host during capture")
        if packet in HOST_DATA:
            raise CaptureError(f"{func} brings host data into a capture")
        if func.namespace not in ("aten", "prims"):
            with self:  # an engine's own operator, made of others
                return func._op_dk(torch._C.DispatchKey.CPU, *args, **kwargs)
        return self.tape.record(str(func), func, args, kwargs, writes=func._schema.is_mutable)


def _by_mask(indices: Any) -> bool:
    return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)


class Counting(TorchDispatchMode):
    """Counts launches: PyTorch's operators that make or write something, and, where the tape is
    installed, Triton kernels and dsv4's operators whose references stand for them."""

    now: Counting | None = None

    def __init__(self) -> None:
        super().__init__()
        self.launches = 0

    def __enter__(self) -> Counting:
        Counting.now = self
        super().__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        Counting.now = None

    def once(self, launch: Callable[[], Any]) -> Any:
        """One launch, whatever it is made of here."""
        self.launches += 1
        Counting.now = None
        try:
            with _disable_current_modes():
                return launch()
        finally:
            Counting.now = self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tensors_of((args, kwargs or {}))}
        results = [t for t in tensors_of(result) if t.numel()]
        made = any(t.untyped_storage()._cdata not in given for t in results)
        self.launches += func.overloadpacket not in NO_LAUNCH and (made or (func._schema.is_mutable and bool(results)))
        return result


class Graph:
    """Stands for torch.cuda.CUDAGraph."""

    # The tape that is being recorded, and the whole captures by their breaks.
    recording: Tape | None = None
    captured: list[Graph] = []  # noqa: RUF012
    # Who a segment belongs to: segments of one owner share their pool's contents in a replay.
    owner: Callable[[], Any] = staticmethod(lambda: None)
    pools: dict[Any, Pool] = {}  # noqa: RUF012
    _open: tuple[Any, dict[int, torch.UntypedStorage], Graph] | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.tape: Tape | None = None
        self._recorder: Recorder | None = None
        self._poisons = True
        self.replays = 0

    def capture_begin(self, pool: Any = None, **kwargs: Any) -> None:
        if Graph.recording is not None:
            raise CaptureError("a capture inside a capture")
        owner, known = Graph.owner(), Graph._open
        if owner is not None and known is not None and known[0] is owner:
            storages, self._poisons = known[1], False
        else:
            storages = {}
            Graph._open = (owner, storages, self)
        shared = Graph.pools.setdefault(id(pool), Pool())
        self.tape = Graph.recording = Tape(shared, storages)
        Graph.captured.append(self)
        self._recorder = Recorder(self.tape)
        self._recorder.__enter__()

    def capture_end(self) -> None:
        assert self._recorder is not None
        self._recorder.__exit__(None, None, None)
        Graph.recording = self._recorder = None

    def replay(self) -> None:
        assert self.tape is not None
        assert Graph.recording is None
        self.replays += 1
        with torch.inference_mode():
            if self._poisons:
                self.tape.poison()
            self.tape.replay()

    def pool(self) -> None:
        return None

    def reset(self) -> None:
        self.tape = None


@contextmanager
def graph(cuda_graph: Graph, pool: Any = None, stream: Any = None, **kwargs: Any) -> Iterator[None]:
    """Stands for torch.cuda.graph."""
    cuda_graph.capture_begin(pool)
    try:
        yield
    finally:
        cuda_graph.capture_end()


def weak_ref_tensor(tensor: Any) -> Any:
    """A tensor at the same address that holds no memory."""
    if not isinstance(tensor, Tensor) or not tensor.numel():
        return tensor
    span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    memory = (ctypes.c_char * (span * tensor.element_size())).from_address(tensor.data_ptr())
    with _disable_current_modes():
        return torch.frombuffer(memory, dtype=torch.uint8).view(tensor.dtype).as_strided(tensor.shape, tensor.stride())


def install() -> None:
    """Put the tape under torch.cuda's graphs, dsv4's operators and Triton's interpreter."""
    from dsv4.ops.registry import Operator

    torch.cuda.CUDAGraph, torch.cuda.graph = Graph, graph
    call = Operator.__call__

    def operator(self: Operator[..., Any], *args: Any, **kwargs: Any) -> Any:
        device = next(t.device for t in tensors_of((args, kwargs)))
        if Counting.now is not None and self.choice(device).impl == "reference":
            return Counting.now.once(lambda: self.choice(device).function(*args, **kwargs))
        if Graph.recording is None or self.choice(device).impl != "reference":
            return call(self, *args, **kwargs)
        tape, Graph.recording = Graph.recording, None  # inside it is one launch
        try:
            return tape.record(self.name, self.choice(device).function, args, kwargs)
        finally:
            Graph.recording = tape

    Operator.__call__ = operator  # type: ignore[method-assign]
    try:
        from triton.runtime.interpreter import GridExecutor
    except ImportError:
        return
    launch = GridExecutor.__call__

    def launched(self: Any, *args: Any, **kwargs: Any) -> None:
        if Counting.now is not None:
            return Counting.now.once(lambda: launch(self, *args, **kwargs))
        if Graph.recording is None:
            return launch(self, *args, **kwargs)
        tape, Graph.recording = Graph.recording, None
        try:
            tape.record(self.fn.__name__, lambda *a, **k: launch(self, *a, **k), args, kwargs)
        finally:
            Graph.recording = tape

    GridExecutor.__call__ = launched
    tolist, numpy, item = Tensor.tolist, Tensor.numpy, Tensor.item

    def forbid(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def read(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            if Graph.recording is not None:
                raise CaptureError(f"Tensor.{name} reads device values on the host during capture")
            return function(self, *args, **kwargs)

        return read

    for name, function in (("tolist", tolist), ("numpy", numpy), ("item", item)):
        setattr(Tensor, name, forbid(name, function))
