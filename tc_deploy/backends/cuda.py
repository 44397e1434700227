"""As much of CUDA's runtime as an engine needs: the GPU, memory on it, one stream.

Calls go through cuda-bindings, so nothing here needs torch or a CUDA toolkit. Work is queued on the stream in the order
of the calls; only reading waits for it.
"""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tc_deploy.errors import BackendError
from tc_deploy.hardware import nvidia_gpus
from tc_deploy.manifest import GpuRecord

_DEVICE = 0
"""The first GPU that CUDA_VISIBLE_DEVICES leaves visible."""


def _cuda_runtime() -> Any:
    try:
        from cuda.bindings import runtime
    except ImportError:
        raise BackendError(
            "cuda-bindings is not installed; install tc-deploy[rtx] or tc-deploy[tensorrt], as you built"
        ) from None
    return runtime


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

    def write(self, address: int, array: NDArray[Any]) -> None:
        """Copy an array to the GPU; ``array`` may change as soon as this returns."""
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
        self._do("cudaStreamSynchronize", self.stream)

    def _do(self, function: str, *arguments: Any) -> Any:
        """Call a function of CUDA's and return what it gives beside its error code."""
        error, *values = getattr(self._cuda, function)(*arguments)
        if error != self._cuda.cudaError_t.cudaSuccess:
            raise BackendError(f"CUDA fails in {function}: {self._text(error)}")
        return values[0] if values else None

    def _text(self, error: Any) -> str:
        return bytes(self._cuda.cudaGetErrorString(error)[1]).decode()
