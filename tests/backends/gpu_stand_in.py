"""A stand-in for a GPU and for TensorRT's runtime, for machines without one. It is not a GPU and proves nothing of one.

What it takes the place of is asynchronous, so it is too: work is queued, and done when somebody reads. An execution
context computes with ONNX Runtime, from the addresses that it was given, whatever lies there by then. It checks what
TensorRT does not: names, sizes, 256-byte alignment, that every tensor has a shape and an address, that an address is
of live memory, and that no output overlaps another tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime

from tc_deploy.manifest import GpuRecord

ALIGNMENT = 256
ADA = GpuRecord(name="Stand-in GPU", compute_capability="8.9", driver="none")


class StandInCuda:
    """In the place of ``tc_deploy.backends.cuda.Cuda``: host memory and a queue."""

    stream = 7

    def __init__(self, gpu: GpuRecord = ADA) -> None:
        self._gpu = gpu
        self._blocks: dict[int, np.ndarray] = {}
        self._queue: list[Callable[[], None]] = []
        self.reads = 0
        self.runs: list[str] = []
        """Names of the graphs that ran, in order."""

    def gpu(self) -> GpuRecord:
        return self._gpu

    @property
    def live_bytes(self) -> int:
        return sum(block.nbytes for block in self._blocks.values())

    def allocate(self, size_bytes: int) -> int:
        room = np.zeros(size_bytes + ALIGNMENT, np.uint8)
        start = -room.ctypes.data % ALIGNMENT
        address = room.ctypes.data + start
        self._blocks[address] = room[start : start + size_bytes]
        return address

    def free(self, address: int) -> None:
        self.wait()
        del self._blocks[address]

    def write(self, address: int, array: np.ndarray) -> None:
        staged = np.frombuffer(array.tobytes(), np.uint8)

        def copy() -> None:
            self._blocks[address][:] = staged

        self._queue.append(copy)

    def read(self, address: int, array: np.ndarray) -> None:
        self.reads += 1
        self.wait()
        array[...] = self.view(address, array.dtype, array.shape)

    def enqueue(self, stream: int, work: Callable[[], None]) -> None:
        assert stream == self.stream, "work on another stream is in no order with the rest"
        self._queue.append(work)

    def wait(self) -> None:
        queue, self._queue = self._queue, []
        for work in queue:
            work()

    def view(self, address: int, dtype: np.dtype[Any], shape: tuple[int, ...]) -> np.ndarray:
        block = self._blocks[address]
        assert block.nbytes == max(1, np.dtype(dtype).itemsize * int(np.prod(shape))), "size of the memory"
        return block[: np.dtype(dtype).itemsize * int(np.prod(shape))].view(dtype).reshape(shape)


class StandInRuntime:
    """In the place of ``tensorrt.Runtime``.

    Args:
        cuda: where engines run.
        engines: an engine's bytes to its name and its ONNX file.
    """

    engine_host_code_allowed = True

    def __init__(self, cuda: StandInCuda, engines: dict[bytes, tuple[str, str]]) -> None:
        self._cuda, self._engines = cuda, engines
        self.deserialised: list[str] = []

    def deserialize_cuda_engine(self, engine: bytes) -> StandInEngine | None:
        assert not self.engine_host_code_allowed
        if engine not in self._engines:
            return None
        name, onnx = self._engines[engine]
        self.deserialised.append(name)
        return StandInEngine(self._cuda, name, onnxruntime.InferenceSession(onnx, providers=["CPUExecutionProvider"]))


class StandInEngine:
    """In the place of ``tensorrt.ICudaEngine``."""

    def __init__(self, cuda: StandInCuda, name: str, session: Any) -> None:
        self._cuda, self._name, self._session = cuda, name, session
        self.names = sorted(tensor.name for tensor in (*session.get_inputs(), *session.get_outputs()))

    @property
    def num_io_tensors(self) -> int:
        return len(self.names)

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def create_execution_context(self) -> StandInContext:
        return StandInContext(self._cuda, self._name, self._session)


class StandInContext:
    """In the place of ``tensorrt.IExecutionContext``."""

    def __init__(self, cuda: StandInCuda, name: str, session: Any) -> None:
        self._cuda, self._name, self._session = cuda, name, session
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
            self._cuda.runs.append(self._name)
            dtypes = {tensor.name: tensor.type for tensor in self._session.get_inputs()}
            feeds = {
                name: self._cuda.view(addresses[name], np.dtype(_NUMPY[dtypes[name]]), shapes[name]) for name in inputs
            }
            for name, array in zip(outputs, self._session.run(outputs, feeds), strict=True):
                self._cuda.view(addresses[name], array.dtype, array.shape)[...] = array

        self._cuda.enqueue(stream, run)
        return True


_NUMPY = {"tensor(float)": np.float32, "tensor(int32)": np.int32, "tensor(int64)": np.int64}
