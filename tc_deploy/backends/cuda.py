"""As much of CUDA's runtime as an engine needs: the GPU, memory on it, one stream, work captured as a graph.

Calls go through cuda-bindings, so nothing here needs torch or a CUDA toolkit. Work is queued on the stream in the order
of the calls; only reading waits for it, and beginning to capture.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tc_deploy.errors import BackendError
from tc_deploy.hardware import nvidia_gpus
from tc_deploy.libraries import imported
from tc_deploy.manifest import GpuRecord

_CAPTURING = threading.Lock()
_DEVICE = 0
"""The first GPU that CUDA_VISIBLE_DEVICES leaves visible."""


def _cuda_runtime() -> Any:
    return imported("cuda.bindings.runtime")


class Cuda:
    """The first visible GPU, with a stream of its own.

    Args:
        runtime: the module that calls CUDA; None takes ``cuda.bindings.runtime``.

    Raises:
        BackendError: cuda-bindings is not installed, or there is no driver or no GPU.
    """

    def __init__(self, runtime: Any = None) -> None:
        self._cuda = runtime = runtime or _cuda_runtime()
        error, count = runtime.cudaGetDeviceCount()
        if error != runtime.cudaError_t.cudaSuccess or not count:
            reason = nvidia_gpus()[1] or self._text(error)
            raise BackendError(f"no NVIDIA GPU to use here: {reason}; see: tc-deploy doctor")
        self._do("cudaSetDevice", _DEVICE)
        self.stream = int(self._do("cudaStreamCreateWithFlags", runtime.cudaStreamNonBlocking))
        self.waits = 0
        """How often the stream has been waited for: what was queued before the last wait is done."""
        weakref.finalize(self, runtime.cudaStreamDestroy, self.stream)

    def gpu(self) -> GpuRecord:
        """The GPU by name, compute capability and the CUDA version of its driver."""
        properties = self._do("cudaGetDeviceProperties", _DEVICE)
        version = self._do("cudaDriverGetVersion")
        return GpuRecord(
            name=bytes(properties.name).split(b"\0")[0].decode(),
            compute_capability=f"{properties.major}.{properties.minor}",
            driver=f"CUDA {version // 1000}.{version % 1000 // 10}",
        )

    def allocate(self, size_bytes: int) -> int:
        """The address of new memory, 256-byte aligned (CUDA promises as much) and filled with zeros.

        Raises:
            BackendError: the GPU has not that much left.
        """
        address = int(self._do("cudaMalloc", size_bytes))
        self._do("cudaMemsetAsync", address, 0, size_bytes, self.stream)
        return address

    def free(self, address: int) -> None:
        """Give memory back, once the GPU is done with it."""
        self._do("cudaFree", address)

    def allocate_pinned(self, size_bytes: int) -> NDArray[np.uint8]:
        """Memory of the host that the GPU copies from and to by itself; it goes back when the last view of it is gone.

        Raises:
            BackendError: there is not that much.
        """
        address = int(self._do("cudaHostAlloc", size_bytes, self._cuda.cudaHostAllocDefault))
        memory = (ctypes.c_uint8 * size_bytes).from_address(address)
        weakref.finalize(memory, self._free_pinned, address)
        return np.frombuffer(memoryview(memory), np.uint8)

    def _free_pinned(self, address: int) -> None:
        try:
            self.wait()
        finally:
            self._do("cudaFreeHost", address)

    def write(self, address: int, array: NDArray[Any]) -> None:
        """Copy an array to the GPU; it may change as soon as this returns, or if it is pinned, after the next wait."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        array = np.ascontiguousarray(array)
        self._do("cudaMemcpyAsync", address, array.ctypes.data, array.nbytes, kind, self.stream)

    def read(self, address: int, array: NDArray[Any]) -> None:
        """Fill ``array``, which is contiguous, from the GPU once all earlier work is done.

        Raises:
            BackendError: earlier work has failed.
        """
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._do("cudaMemcpyAsync", array.ctypes.data, address, array.nbytes, kind, self.stream)
        self.wait()

    def copy(self, to: int, source: int, size_bytes: int) -> None:
        """Queue a copy from one place on the GPU to another."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._do("cudaMemcpyAsync", to, source, size_bytes, kind, self.stream)

    def wait(self) -> None:
        """Wait for all that was queued.

        Raises:
            BackendError: some of it has failed.
        """
        self._do("cudaStreamSynchronize", self.stream)
        self.waits += 1

    def captured(self, queue: Callable[[], object]) -> Any:
        """Record what a function queues on the stream, and run nothing of it.

        Args:
            queue: queues work, and neither waits nor allocates.

        Returns:
            What :meth:`launch` launches, until :meth:`discard`.

        Raises:
            BackendError: something in it cannot be captured. The stream is as it was.
        """
        self.wait()
        # Other threads may go on allocating: other pipelines are loaded and freed there.
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        with _uncollected():
            self._do("cudaStreamBeginCapture", self.stream, mode)
            try:
                queue()
            except BaseException:
                _, graph = self._end_capture()
                if graph is not None:
                    self._cuda.cudaGraphDestroy(graph)
                raise
            error, graph = self._end_capture()
        self._check("cudaStreamEndCapture", error)
        try:
            launchable = self._do("cudaGraphInstantiate", graph, 0)
        finally:
            self._do("cudaGraphDestroy", graph)
        self._do("cudaGraphUpload", launchable, self.stream)
        return launchable

    def _end_capture(self) -> tuple[Any, Any]:
        error, graph = self._cuda.cudaStreamEndCapture(self.stream)
        # What stays behind would be taken for the error of whatever is called next.
        self._cuda.cudaGetLastError()
        return error, graph

    def launch(self, launchable: Any) -> None:
        """Queue captured work: one call for all of it."""
        self._do("cudaGraphLaunch", launchable, self.stream)

    def discard(self, launchable: Any) -> None:
        """Free captured work, once the GPU is done with it."""
        try:
            self.wait()
        finally:
            self._do("cudaGraphExecDestroy", launchable)

    def _do(self, function: str, *arguments: Any) -> Any:
        """Call a function of CUDA's and return what it gives beside its error code."""
        error, *values = getattr(self._cuda, function)(*arguments)
        self._check(function, error)
        return values[0] if values else None

    def _check(self, function: str, error: Any) -> None:
        if error != self._cuda.cudaError_t.cudaSuccess:
            raise BackendError(f"CUDA fails in {function}: {self._text(error)}")

    def _text(self, error: Any) -> str:
        return bytes(self._cuda.cudaGetErrorString(error)[1]).decode()


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Keep the garbage collector still: memory that it frees on the GPU would spoil a capture."""
    # It is one for all threads, so the first of two captures to end would wake it in the other.
    with _CAPTURING:
        enabled = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if enabled:
                gc.enable()
