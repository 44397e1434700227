"""TensorRT and TensorRT-RTX at run time: engines on one GPU and one stream, with no wait inside a run.

In: engines whose checksum and identity have been checked. Out: a device, as the runtime knows it. An owner's buffers
lie in one piece of device memory, and those that the host exchanges with it also in one of pinned host memory; all
engines compute in one piece of scratch memory. Tensors go by name. Graphs that always run in the same order are
captured as one CUDA graph and replayed. Never: lets an engine bring its own host code. Run on a stand-in so far, and on
no GPU yet.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from tc_deploy.backends.arena import ALIGNMENT_BYTES, arena_offsets
from tc_deploy.backends.base import BoundGraph, Buffer, BufferSpec, Capture
from tc_deploy.backends.cuda import Cuda
from tc_deploy.backends.host import check_array
from tc_deploy.backends.in_turn import InTurn
from tc_deploy.backends.tensorrt.rtx import RtxExtras
from tc_deploy.errors import BackendError, BundleError
from tc_deploy.manifest import ONNX_FOLDER, EngineRecord, TensorRecord, read_engine_record

_Shapes: TypeAlias = tuple[tuple[str, tuple[int, ...]], ...]
"""Of a graph's inputs, by name."""


class TrtArena:
    """One piece of device memory, filled with zeros, and one of pinned host memory.

    Args:
        cuda: the GPU.
        specs: the buffers in it, in the order of their offsets.

    Raises:
        BackendError: there is not that much of one of the two.
    """

    def __init__(self, cuda: Cuda, specs: Sequence[BufferSpec]) -> None:
        offsets, size_bytes = arena_offsets(spec.size_bytes for spec in specs)
        first = cuda.allocate(size_bytes)
        weakref.finalize(self, cuda.free, first)
        self.addresses = [first + offset for offset in offsets]
        exchanged = [number for number, spec in enumerate(specs) if spec.exchanged]
        offsets, size_bytes = arena_offsets(specs[number].size_bytes for number in exchanged)
        pinned = cuda.allocate_pinned(size_bytes) if exchanged else np.empty(0, np.uint8)
        self.pinned: dict[int, NDArray[Any]] = {}
        """By a buffer's number, its part of the host memory."""
        for number, offset in zip(exchanged, offsets, strict=True):
            spec = specs[number]
            part = pinned[offset : offset + spec.size_bytes]
            self.pinned[number] = part.view(spec.dtype).reshape(spec.shape)


class TrtScratch:
    """Scratch memory for any of several contexts, which run one after another: one piece, as large as the largest asks.

    Args:
        cuda: the GPU.
        size_bytes: of it.

    Raises:
        BackendError: there is not that much.
    """

    def __init__(self, cuda: Cuda, size_bytes: int) -> None:
        self.size_bytes = max(size_bytes, ALIGNMENT_BYTES)
        self.address = cuda.allocate(self.size_bytes)
        weakref.finalize(self, cuda.free, self.address)


class TrtBuffer:
    """One tensor's part of an arena."""

    def __init__(
        self, cuda: Cuda, arena: TrtArena, spec: BufferSpec, address: int, pinned: NDArray[Any] | None
    ) -> None:
        self.dtype, self.shape, self.address = spec.dtype, spec.shape, address
        self._cuda, self._arena, self._pinned = cuda, arena, pinned
        self._waits_at_write = -1

    def write(self, array: NDArray[Any]) -> None:
        """Copy ``array`` in.

        Raises:
            ValueError: it has another dtype or shape; nothing is converted or broadcast.
        """
        check_array(array, self.dtype, self.shape)
        if self._pinned is None:
            self._cuda.write(self.address, array)
            return
        if self._waits_at_write == self._cuda.waits:
            # The GPU may not have copied yet what was written before.
            self._cuda.wait()
        self._pinned[...] = array
        self._cuda.write(self.address, self._pinned)
        self._waits_at_write = self._cuda.waits

    def read(self) -> NDArray[Any]:
        """A copy, once the device is done with what it was told before."""
        if self._pinned is None:
            array = np.empty(self.shape, self.dtype)
            self._cuda.read(self.address, array)
            return array
        self._cuda.read(self.address, self._pinned)
        return self._pinned.copy()

    def rows(self, start: int, stop: int) -> TrtBuffer:
        """Some of its rows; to bind them to an engine, their address must be aligned."""
        spec = BufferSpec(dtype=self.dtype, shape=(stop - start, *self.shape[1:]))
        address = self.address + start * (spec.size_bytes // max(stop - start, 1))
        pinned = None if self._pinned is None else self._pinned[start:stop]
        return TrtBuffer(self._cuda, self._arena, spec, address, pinned)

    def copy(self, source: Buffer) -> None:
        """Queue a copy on the GPU."""
        spec = BufferSpec(dtype=self.dtype, shape=self.shape)
        self._cuda.copy(self.address, cast("TrtBuffer", source).address, spec.size_bytes)


class TrtContext:
    """An execution context for one set of input shapes, which every graph shares that is bound with them.

    Runs are one after another, so they can share its scratch memory; and as its shapes never change, neither does
    anything that a captured graph has taken from it. Between runs it is given the addresses that differ.

    Args:
        path: of the engine, for messages.
        context: TensorRT's own, which has no scratch memory yet.
        scratch: what it computes in; its address, too, is in what is captured.
        shapes: of the inputs.
        stream: where runs are queued.
        profile: number of the optimization profile that has these shapes; None where there is no choice.

    Raises:
        BackendError: TensorRT refuses the profile or a shape.
    """

    def __init__(
        self, path: Path, context: Any, scratch: TrtScratch, shapes: _Shapes, stream: int, profile: int | None
    ) -> None:
        self._path, self._context, self._scratch, self._stream = path, context, scratch, stream
        self._addresses: dict[str, int] = {}
        context.set_device_memory(scratch.address, scratch.size_bytes)
        if profile is not None and not context.set_optimization_profile_async(profile, stream):
            raise BackendError(f"{path}: TensorRT refuses its optimization profile {profile}")
        for name, shape in shapes:
            if not context.set_input_shape(name, shape):
                raise BackendError(f"{path}: TensorRT refuses the shape {shape} of {name}")

    def run(self, addresses: Mapping[str, int]) -> None:
        """Queue one run.

        Raises:
            BackendError: TensorRT refuses an address, or cannot queue.
        """
        for name, address in addresses.items():
            if self._addresses.get(name) != address:
                if not self._context.set_tensor_address(name, address):
                    raise BackendError(f"{self._path}: TensorRT refuses the address of {name}")
                self._addresses[name] = address
        if not self._context.execute_async_v3(self._stream):
            raise BackendError(f"{self._path}: TensorRT cannot run the engine")

    def check_capturable(self) -> None:
        """Check that a run can be captured, as far as the engine says.

        Raises:
            BackendError: it cannot.
        """
        # TensorRT-RTX is asked; TensorRT has no such question and would fail while it is captured.
        ask = getattr(self._context, "is_stream_capturable", None)
        if ask is not None and not ask(self._stream):
            raise BackendError(f"{self._path}: the engine was not built to be captured")


class TrtGraph:
    """One engine, whose graphs are its optimization profiles.

    Args:
        path: of the engine.
        make_context: gives a new execution context without scratch memory, and some to run with.
        record: what was written down of the engine.
        stream: where runs are queued.
    """

    def __init__(
        self, path: Path, make_context: Callable[[], tuple[Any, TrtScratch]], record: EngineRecord, stream: int
    ) -> None:
        self._path, self._make_context, self._record, self._stream = path, make_context, record, stream
        self._contexts: weakref.WeakValueDictionary[_Shapes, TrtContext] = weakref.WeakValueDictionary()

    def bind(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> TrtBoundGraph:
        """Fix the buffers by tensor name.

        Raises:
            BackendError: an axis lies outside what the engine was built for, or there is no memory to run with it.
        """
        buffers = {name: cast("TrtBuffer", buffer) for name, buffer in {**inputs, **outputs}.items()}
        profile = self._profile(buffers)
        names = (tensor.name for tensor in self._record.profiles[profile].inputs)
        shapes = tuple((name, buffers[name].shape) for name in names)
        return TrtBoundGraph(self._context(shapes, profile), buffers)

    def _context(self, shapes: _Shapes, profile: int) -> TrtContext:
        context = self._contexts.get(shapes)
        if context is None:
            number = profile if len(self._record.profiles) > 1 else None
            context = TrtContext(self._path, *self._make_context(), shapes, self._stream, number)
            self._contexts[shapes] = context
        return context

    def _profile(self, buffers: Mapping[str, TrtBuffer]) -> int:
        """Number of the profile that has the buffers' shapes; which of them it is, only axes other than a batch's say.

        Raises:
            BackendError: as for :meth:`bind`.
        """
        fitting = (
            number
            for number, profile in enumerate(self._record.profiles)
            if all(_is_fixed_fit(tensor, buffers[tensor.name]) for tensor in profile.tensors)
        )
        found = next(fitting, 0)
        for tensor in self._record.profiles[found].tensors:
            self._check_buffer(tensor, buffers[tensor.name])
        return found

    def _check_buffer(self, tensor: TensorRecord, buffer: TrtBuffer) -> None:
        for size, found in zip(tensor.shape, buffer.shape, strict=True):
            least, _, largest = self._record.axes[size] if isinstance(size, str) else (size, size, size)
            if not least <= found <= largest:
                raise BackendError(
                    f"{self._path}: {tensor.name}: {size} is {found}, but the engine was built for {least} to"
                    f" {largest}; load with another batch size, or build again with another --batch-profile"
                )
        if buffer.dtype != tensor.numpy_dtype or buffer.address % ALIGNMENT_BYTES:
            raise ValueError(f"{tensor.name}: expected {tensor.dtype} at a multiple of {ALIGNMENT_BYTES}")


def _is_fixed_fit(tensor: TensorRecord, buffer: TrtBuffer) -> bool:
    return all(isinstance(size, str) or size == found for size, found in zip(tensor.shape, buffer.shape, strict=True))


class TrtBoundGraph:
    """A graph with all its tensors bound."""

    def __init__(self, context: TrtContext, buffers: Mapping[str, TrtBuffer]) -> None:
        self.context, self._buffers = context, buffers
        self._addresses = {name: buffer.address for name, buffer in buffers.items()}

    def run(self) -> None:
        """Queue one run; a buffer's ``read`` waits for it.

        Raises:
            BackendError: as for :meth:`TrtContext.run`.
        """
        self.context.run(self._addresses)


class TrtCapture:
    """Bound graphs as one CUDA graph.

    The first run queues one after another, as TensorRT wants of an engine before it is captured, and then captures
    them; later runs are one launch. A failed capture is tried again at the next run.
    """

    def __init__(self, cuda: Cuda, graphs: Sequence[TrtBoundGraph]) -> None:
        self._cuda, self._graphs = cuda, tuple(graphs)
        self._launchable: Any = None

    def prepare(self) -> None:
        """Capture them; each engine has run once before.

        Raises:
            BackendError: something in them cannot be captured.
        """
        if self._launchable is not None:
            return
        try:
            for context in dict.fromkeys(graph.context for graph in self._graphs):
                context.check_capturable()
            self._launchable = self._cuda.captured(self._queue)
        except BackendError as error:
            raise BackendError(
                f"the run cannot be captured as a CUDA graph ({error}); build again with --no-cuda-graph"
            ) from error
        weakref.finalize(self, self._cuda.discard, self._launchable)

    def run(self) -> None:
        """Queue all of them.

        Raises:
            BackendError: TensorRT or CUDA refuses one, or to capture them.
        """
        if self._launchable is None:
            self._queue()
            self.prepare()
        else:
            self._cuda.launch(self._launchable)

    def _queue(self) -> None:
        for graph in self._graphs:
            graph.run()


class TrtDevice:
    """A GPU.

    Args:
        name: the backend's.
        runtime: what deserialises engines: a ``Runtime`` of the Python module.
        cuda: the GPU's memory and stream.
        errors: what the runtime has complained of, for messages.
        user_managed: TensorRT's word for contexts that are given their scratch memory.
        use_cuda_graph: whether graphs that run in order are captured.
        rtx: what TensorRT-RTX has beyond TensorRT; None for TensorRT.
        refit: puts the weights of an ONNX file into an engine that was stripped of them; says whether it could.
    """

    def __init__(
        self,
        name: str,
        runtime: Any,
        cuda: Cuda,
        errors: list[str],
        *,
        user_managed: Any,
        use_cuda_graph: bool = True,
        rtx: RtxExtras | None = None,
        refit: Callable[[Any, Path], bool] = lambda engine, onnx: False,
    ) -> None:
        self._name, self._runtime, self._cuda, self._errors = name, runtime, cuda, errors
        self._user_managed, self._use_cuda_graph = user_managed, use_cuda_graph
        self._rtx, self._refit = rtx, refit
        self._scratch: TrtScratch | None = None
        self._scratch_bytes = 0
        """As much as the most wanting of the engines loaded so far."""
        runtime.engine_host_code_allowed = False

    def buffers(self, specs: Sequence[BufferSpec]) -> list[Buffer]:
        """Allocate one piece for all of them, filled with zeros."""
        arena = TrtArena(self._cuda, specs)
        return [
            TrtBuffer(self._cuda, arena, spec, arena.addresses[number], arena.pinned.get(number))
            for number, spec in enumerate(specs)
        ]

    def capture(self, graphs: Sequence[BoundGraph]) -> Capture:
        """Make one CUDA graph of them, unless the target says not to or one of them is not this device's own."""
        own = [graph for graph in graphs if isinstance(graph, TrtBoundGraph)]
        if not self._use_cuda_graph or len(own) < len(graphs):
            return InTurn(graphs)
        return TrtCapture(self._cuda, own)

    def load(self, path: Path) -> TrtGraph:
        """Deserialise an engine whose checksum and identity have been checked."""
        record = read_engine_record(path)
        self._errors.clear()
        plan = path.read_bytes()
        if self._rtx is not None:
            self._rtx.check(path, self._runtime, plan)
        engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise BackendError(f"{path}: {self._name} refuses the engine: {self._reason()}")
        if record.options.get("strip_weights") and not self._refit(engine, onnx_of(path)):
            raise BackendError(f"{path}: {self._name} cannot put the weights back: {self._reason()}")
        names = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
        if any(names != {tensor.name for tensor in profile.tensors} for profile in record.profiles):
            raise BundleError(f"{path}: its tensors are not those of {path.with_suffix('.json').name}; build again")
        self._scratch_bytes = max(self._scratch_bytes, engine.device_memory_size_v2)
        return TrtGraph(path, functools.partial(self._context, path, engine), record, self._cuda.stream)

    def _context(self, path: Path, engine: Any) -> tuple[Any, TrtScratch]:
        if self._rtx is None:
            context = engine.create_execution_context(self._user_managed)
        else:
            context = self._rtx.context(path, engine, captured=self._use_cuda_graph)
        if context is None:
            raise BackendError(f"{path}: {self._name} has no memory to run the engine: {self._reason()}")
        # Contexts that were made before a more wanting engine was loaded keep what they have.
        if self._scratch is None or self._scratch.size_bytes < self._scratch_bytes:
            self._scratch = TrtScratch(self._cuda, self._scratch_bytes)
        return context, self._scratch

    def _reason(self) -> str:
        return self._errors[0] if self._errors else "it gives no reason"


def onnx_of(engine: Path) -> Path:
    """The graph that an engine was built from, in the bundle whose files have been checked."""
    return engine.parent.parent / ONNX_FOLDER / f"{engine.stem}.onnx"
