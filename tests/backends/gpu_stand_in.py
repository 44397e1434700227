# ruff: noqa: N802, N815 - the names are CUDA's
"""A stand-in for a GPU, for machines without one. It is not a GPU and proves nothing of one.

What it takes the place of is asynchronous, so it is too: work is queued, and done when somebody waits. It checks what
CUDA does not: that work goes to the one stream, that a tensor lies in live memory and keeps its size, and that tensors
do not overlap. While work is captured it refuses, as CUDA does, to wait, to allocate and to copy what is not pinned.
"""

from __future__ import annotations

import bisect
import ctypes
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
from cuda.bindings import runtime as cuda

ALIGNMENT = 256
OK = cuda.cudaError_t.cudaSuccess
UNSUPPORTED = cuda.cudaError_t.cudaErrorStreamCaptureUnsupported
Work = Callable[[], object]


class StandInCudaRuntime:
    """In the place of ``cuda.bindings.runtime``: host memory and a queue.

    Args:
        name: the GPU's.
        compute_capability: the GPU's.
        memory_bytes: how much there is.
    """

    cudaError_t = cuda.cudaError_t
    cudaMemcpyKind = cuda.cudaMemcpyKind
    cudaStreamCaptureMode = cuda.cudaStreamCaptureMode
    cudaStreamNonBlocking = cuda.cudaStreamNonBlocking
    cudaHostAllocDefault = cuda.cudaHostAllocDefault

    def __init__(self, name: str = "Stand-in GPU", compute_capability: str = "8.9", memory_bytes: int = 2**30) -> None:
        self._name, self._capability, self._memory_bytes = name, compute_capability, memory_bytes
        self._blocks: dict[int, np.ndarray] = {}
        self._pinned: dict[int, np.ndarray] = {}
        self._tensors: dict[int, list[tuple[int, int]]] = {}
        """By block, where the tensors in it have been seen to begin and end, sorted."""
        self._queue: list[Work] = []
        self._recorded: list[Work] | None = None
        self._spoilt = False
        self._graphs: dict[int, list[Work]] = {}
        self._launchables: dict[int, list[Work]] = {}
        self._streams: set[int] = set()
        self._made = 0
        self.waits = 0
        self.launches = 0
        """Of captured work."""
        self.allocations = 0
        self.runs: list[str] = []
        """Names of the graphs that ran, in order."""

    @property
    def live_bytes(self) -> int:
        return sum(block.nbytes for block in self._blocks.values())

    @property
    def leaks(self) -> dict[str, int]:
        """What is there that somebody has to free."""
        kinds = {"pinned": self._pinned, "graphs": self._graphs, "launchables": self._launchables}
        return {name: len(kept) for name, kept in {"memory": self._blocks, **kinds}.items() if kept}

    @property
    def is_capturing(self) -> bool:
        return self._recorded is not None

    def spoil(self) -> Any:
        """Do to a capture what a call that it does not allow does."""
        self._spoilt = True
        return UNSUPPORTED

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

    def cudaGetLastError(self) -> tuple[Any]:
        return (OK,)

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
        if self.is_capturing:
            return self.spoil(), None
        if self.live_bytes + size > self._memory_bytes:
            return self.cudaError_t.cudaErrorMemoryAllocation, None
        self.allocations += 1
        return OK, self._allocate(self._blocks, size)

    def cudaFree(self, address: int) -> tuple[Any]:
        if self.is_capturing:
            return (self.spoil(),)
        self.wait()
        del self._blocks[address]
        self._tensors.pop(address, None)
        return (OK,)

    def cudaHostAlloc(self, size: int, flags: int) -> tuple[Any, int | None]:
        assert flags == self.cudaHostAllocDefault
        return (self.spoil(), None) if self.is_capturing else (OK, self._allocate(self._pinned, size))

    def cudaFreeHost(self, address: int) -> tuple[Any]:
        assert not self._queue, "freed while the GPU may still copy"
        del self._pinned[address]
        return (OK,)

    def _allocate(self, blocks: dict[int, np.ndarray], size: int) -> int:
        # What lies in new memory is anything but zeros.
        room = np.full(size + ALIGNMENT, 0xA5, np.uint8)
        start = -room.ctypes.data % ALIGNMENT
        address = room.ctypes.data + start
        blocks[address] = room[start : start + size]
        return int(address)

    def cudaMemsetAsync(self, address: int, value: int, count: int, stream: int) -> tuple[Any]:
        self.enqueue(stream, lambda: self._blocks[address][:count].fill(value))
        return (OK,)

    def cudaMemcpyAsync(self, to: int, source: int, count: int, kind: Any, stream: int) -> tuple[Any]:
        if kind == self.cudaMemcpyKind.cudaMemcpyDeviceToDevice:
            here, there = (functools.partial(self.view, address, np.uint8, (count,)) for address in (to, source))
            self.enqueue(stream, lambda: np.copyto(here(), there()))
            return (OK,)
        to_gpu = kind == self.cudaMemcpyKind.cudaMemcpyHostToDevice
        assert to_gpu or kind == self.cudaMemcpyKind.cudaMemcpyDeviceToHost
        host = source if to_gpu else to
        is_pinned = any(start <= host < start + block.nbytes for start, block in self._pinned.items())
        if self.is_capturing and not is_pinned:
            return (self.spoil(),)
        # What is pinned is read when the copy is made, whatever lies there by then.
        kept = None if is_pinned or not to_gpu else ctypes.create_string_buffer(ctypes.string_at(source, count), count)

        def copy() -> None:
            tensor = self.view(to if to_gpu else source, np.uint8, (count,)).ctypes.data
            ctypes.memmove(*((tensor, kept or source) if to_gpu else (to, tensor)), count)

        self.enqueue(stream, copy)
        return (OK,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[Any]:
        assert stream in self._streams
        if self.is_capturing:
            return (self.spoil(),)
        self.waits += 1
        self.wait()
        return (OK,)

    def cudaStreamBeginCapture(self, stream: int, mode: Any) -> tuple[Any]:
        assert stream in self._streams
        assert mode == self.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        assert not self.is_capturing
        self._recorded, self._spoilt = [], False
        return (OK,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[Any, int | None]:
        assert stream in self._streams
        assert self._recorded is not None
        recorded, self._recorded = self._recorded, None
        if self._spoilt:
            return self.cudaError_t.cudaErrorStreamCaptureInvalidated, None
        self._made += 1
        self._graphs[self._made] = recorded
        return OK, self._made

    def cudaGraphInstantiate(self, graph: int, flags: int) -> tuple[Any, int]:
        assert flags == 0
        self._made += 1
        self._launchables[self._made] = list(self._graphs[graph])
        return OK, self._made

    def cudaGraphDestroy(self, graph: int) -> tuple[Any]:
        del self._graphs[graph]
        return (OK,)

    def cudaGraphUpload(self, launchable: int, stream: int) -> tuple[Any]:
        assert launchable in self._launchables
        assert stream in self._streams
        return (OK,)

    def cudaGraphLaunch(self, launchable: int, stream: int) -> tuple[Any]:
        self.launches += 1
        for work in self._launchables[launchable]:
            self.enqueue(stream, work)
        return (OK,)

    def cudaGraphExecDestroy(self, launchable: int) -> tuple[Any]:
        assert not self._queue, "freed while the GPU may still run it"
        del self._launchables[launchable]
        return (OK,)

    def enqueue(self, stream: int, work: Work) -> None:
        assert stream in self._streams, "work on another stream is in no order with the rest"
        (self._queue if self._recorded is None else self._recorded).append(work)

    def wait(self) -> None:
        queue, self._queue = self._queue, []
        for work in queue:
            work()

    def view(self, address: int, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
        """The tensor that lies there, or some rows of it, in live memory, and nothing else in any part of it."""
        size = np.dtype(dtype).itemsize * int(np.prod(shape))
        found = [start for start, block in self._blocks.items() if start <= address <= start + block.nbytes - size]
        assert found, "no live memory of that size"
        assert address % ALIGNMENT == 0
        tensors, tensor = self._tensors.setdefault(found[0], []), (address, address + size)
        place = bisect.bisect_left(tensors, tensor)
        if tensors[place : place + 1] != [tensor]:
            near = tensors[max(place - 1, 0) : place + 1]
            if not any(begin <= address and address + size <= end for begin, end in near):
                for begin, end in near:
                    apart = end <= address or begin >= address + size
                    assert apart, "it overlaps another tensor, or has changed its size"
                tensors.insert(place, tensor)
        start = address - found[0]
        return self._blocks[found[0]][start : start + size].view(dtype).reshape(shape)
