# ruff: noqa: N802, N815 - the names are CUDA's
"""A stand-in for a GPU and for TensorRT's runtime, for machines without one. It is not a GPU and proves nothing of one.

What it takes the place of is asynchronous, so it is too: work is queued, and done when somebody reads. An execution
context computes with ONNX Runtime, from the addresses that it was given, whatever lies there by then. It checks what
TensorRT does not: names, sizes, 256-byte alignment, that every tensor has a shape and an address, that an address is
of live memory, and that no output overlaps another tensor.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
from cuda.bindings import runtime as cuda

ALIGNMENT = 256
OK = cuda.cudaError_t.cudaSuccess


class StandInCudaRuntime:
    """In the place of ``cuda.bindings.runtime``: host memory and a queue.

    Args:
        name: the GPU's.
        compute_capability: the GPU's.
        memory_bytes: how much there is.
    """

    cudaError_t = cuda.cudaError_t
    cudaMemcpyKind = cuda.cudaMemcpyKind
    cudaStreamNonBlocking = cuda.cudaStreamNonBlocking

    def __init__(self, name: str = "Stand-in GPU", compute_capability: str = "8.9", memory_bytes: int = 2**30) -> None:
        self._name, self._capability, self._memory_bytes = name, compute_capability, memory_bytes
        self._blocks: dict[int, np.ndarray] = {}
        self._queue: list[Callable[[], None]] = []
        self._streams: set[int] = set()
        self._made = 0
        self.waits = 0
        self.runs: list[str] = []
        """Names of the graphs that ran, in order."""

    @property
    def live_bytes(self) -> int:
        return sum(block.nbytes for block in self._blocks.values())

    def cudaGetDeviceCount(self) -> tuple[Any, int]:
        return OK, 1

    def cudaSetDevice(self, device: int) -> tuple[Any]:
        assert device == 0
        return (OK,)

    def cudaGetDeviceProperties(self, device: int) -> tuple[Any, Any]:
        assert device == 0
        major, minor = map(int, self._capability.split("."))
        return OK, SimpleNamespace(name=self._name.encode() + b"\0" * 8, major=major, minor=minor)

    def cudaDriverGetVersion(self) -> tuple[Any, int]:
        return OK, 13020

    def cudaGetErrorString(self, error: Any) -> tuple[Any, bytes]:
        return cuda.cudaGetErrorString(error)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Any, int]:
        assert flags == self.cudaStreamNonBlocking
        self._made += 1
        self._streams.add(self._made)
        return OK, self._made

    def cudaStreamDestroy(self, stream: int) -> tuple[Any]:
        self.wait()
        self._streams.remove(stream)
        return (OK,)

    def cudaMalloc(self, size: int) -> tuple[Any, int | None]:
        if self.live_bytes + size > self._memory_bytes:
            return self.cudaError_t.cudaErrorMemoryAllocation, None
        # What lies in new memory is anything but zeros.
        room = np.full(size + ALIGNMENT, 0xA5, np.uint8)
        start = -room.ctypes.data % ALIGNMENT
        address = room.ctypes.data + start
        self._blocks[address] = room[start : start + size]
        return OK, address

    def cudaFree(self, address: int) -> tuple[Any]:
        self.wait()
        del self._blocks[address]
        return (OK,)

    def cudaMemsetAsync(self, address: int, value: int, count: int, stream: int) -> tuple[Any]:
        self.enqueue(stream, lambda: self.view(address, np.uint8, (count,)).fill(value))
        return (OK,)

    def cudaMemcpyAsync(self, to: int, source: int, count: int, kind: Any, stream: int) -> tuple[Any]:
        if kind == self.cudaMemcpyKind.cudaMemcpyHostToDevice:
            staged = np.frombuffer(ctypes.string_at(source, count), np.uint8)
            self.enqueue(stream, lambda: self.view(to, np.uint8, (count,)).__setitem__(slice(None), staged))
        else:
            assert kind == self.cudaMemcpyKind.cudaMemcpyDeviceToHost
            self.enqueue(stream, lambda: ctypes.memmove(to, self.view(source, np.uint8, (count,)).ctypes.data, count))
        return (OK,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[Any]:
        assert stream in self._streams
        self.waits += 1
        self.wait()
        return (OK,)

    def enqueue(self, stream: int, work: Callable[[], object]) -> None:
        assert stream in self._streams, "work on another stream is in no order with the rest"
        self._queue.append(work)

    def wait(self) -> None:
        queue, self._queue = self._queue, []
        for work in queue:
            work()

    def view(self, address: int, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
        """The live memory that begins there and has just that size."""
        block, size = self._blocks[address], np.dtype(dtype).itemsize * int(np.prod(shape))
        assert block.nbytes == max(1, size), "size of the memory"
        return block[:size].view(dtype).reshape(shape)


class StandInRuntime:
    """In the place of ``tensorrt.Runtime``.

    Args:
        gpu: where engines run.
        engines: an engine's bytes to its name and its ONNX file.
        verdict: what :meth:`get_engine_validity` gives.
    """

    engine_host_code_allowed = True
    engine_header_size = 64

    def __init__(
        self, gpu: StandInCudaRuntime, engines: dict[bytes, tuple[str, str]], verdict: tuple[Any, int] = (None, 0)
    ) -> None:
        self._gpu, self._engines, self._verdict = gpu, engines, verdict
        self.deserialised: list[str] = []
        self.kernels: list[StandInKernels] = []
        """Of every engine with a runtime configuration, in the order of loading."""
        self.wants_weights: set[str] = set()
        """Names of engines that do not run until they are given weights."""

    def get_engine_validity(self, header: bytes) -> tuple[Any, int]:
        assert len(header) == self.engine_header_size
        return self._verdict

    def refit(self, engine: StandInEngine, onnx: Any) -> bool:
        """In the place of a refitter: takes the weights of the very graph that the engine was built from."""
        self.wants_weights.discard(engine.name)
        return str(onnx) == self._files[engine.name]

    @property
    def _files(self) -> dict[str, str]:
        return dict(self._engines.values())

    def deserialize_cuda_engine(self, engine: bytes) -> StandInEngine | None:
        assert not self.engine_host_code_allowed
        if engine not in self._engines:
            return None
        name, onnx = self._engines[engine]
        self.deserialised.append(name)
        session = onnxruntime.InferenceSession(onnx, providers=["CPUExecutionProvider"])
        return StandInEngine(self._gpu, name, session, self)


class StandInKernels:
    """In the place of ``tensorrt_rtx.IRuntimeCache``: says what it was given and what it would keep."""

    def __init__(self, name: str) -> None:
        self.name, self.given = name, None

    def deserialize(self, blob: bytes) -> bool:
        self.given = bytes(blob)
        return True

    def serialize(self) -> bytes:
        return f"kernels of {self.name}".encode()


class StandInConfig:
    """In the place of ``tensorrt_rtx.IRuntimeConfig``."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.kernels: StandInKernels | None = None

    def create_runtime_cache(self) -> StandInKernels:
        return StandInKernels(self._name)

    def set_runtime_cache(self, kernels: StandInKernels) -> bool:
        self.kernels = kernels
        return True


class StandInEngine:
    """In the place of ``tensorrt.ICudaEngine``."""

    def __init__(self, gpu: StandInCudaRuntime, name: str, session: Any, runtime: StandInRuntime | None = None) -> None:
        self._gpu, self.name, self._session, self._runtime = gpu, name, session, runtime
        self.names = sorted(tensor.name for tensor in (*session.get_inputs(), *session.get_outputs()))

    @property
    def num_io_tensors(self) -> int:
        return len(self.names)

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def create_runtime_config(self) -> StandInConfig:
        return StandInConfig(self.name)

    def create_execution_context(self, config: StandInConfig | None = None) -> StandInContext:
        if self._runtime is not None:
            assert self.name not in self._runtime.wants_weights, "an engine without weights"
            self._runtime.kernels += [] if config is None or config.kernels is None else [config.kernels]
        return StandInContext(self._gpu, self.name, self._session)


class StandInContext:
    """In the place of ``tensorrt.IExecutionContext``."""

    def __init__(self, gpu: StandInCudaRuntime, name: str, session: Any) -> None:
        self._gpu, self._name, self._session = gpu, name, session
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if name not in {tensor.name for tensor in self._session.get_inputs()}:
            return False
        self._shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        known = {tensor.name for tensor in (*self._session.get_inputs(), *self._session.get_outputs())}
        if name not in known or address % ALIGNMENT:
            return False
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        inputs = [tensor.name for tensor in self._session.get_inputs()]
        outputs = [tensor.name for tensor in self._session.get_outputs()]
        if self._shapes.keys() != set(inputs) or self._addresses.keys() != {*inputs, *outputs}:
            return False
        # As the launch of a kernel does, it keeps the addresses of now.
        shapes, addresses = dict(self._shapes), dict(self._addresses)
        written = [addresses[name] for name in outputs]
        assert len({*written}) == len(written), "two outputs share memory"
        assert not {*written} & {addresses[name] for name in inputs}, "an output overlaps an input"

        def run() -> None:
            self._gpu.runs.append(self._name)
            dtypes = {tensor.name: tensor.type for tensor in self._session.get_inputs()}
            feeds = {
                name: self._gpu.view(addresses[name], np.dtype(_NUMPY[dtypes[name]]), shapes[name]) for name in inputs
            }
            for name, array in zip(outputs, self._session.run(outputs, feeds), strict=True):
                self._gpu.view(addresses[name], array.dtype, array.shape)[...] = array

        self._gpu.enqueue(stream, run)
        return True


_NUMPY = {"tensor(float)": np.float32, "tensor(int32)": np.int32, "tensor(int64)": np.int64}
