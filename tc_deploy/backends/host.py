"""The buffer of engines that compute in host memory: one piece of it, seen by numpy and by the engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from tc_deploy.backends.base import Buffer, BufferSpec
from tc_deploy.hardware import check_fits_memory


def check_array(array: NDArray[Any], dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    """Check that an array fits a buffer.

    Raises:
        ValueError: it has another dtype or shape; nothing is converted or broadcast.
    """
    if (array.dtype, array.shape) != (dtype, shape):
        raise ValueError(f"expected {dtype} {shape}, found {array.dtype} {array.shape}")


def check_fits(specs: Sequence[BufferSpec]) -> None:
    """Check that buffers can be had in host memory.

    Raises:
        OutOfMemoryError: the machine has less.
    """
    check_fits_memory(sum(spec.size_bytes for spec in specs), "the buffers of a batch of this size")


class HostBuffer:
    """A tensor in host memory.

    Args:
        array: the memory as numpy sees it.
        value: the same memory as the engine sees it.
        part: gives some rows of it as the engine sees them; told them also as numpy does, where they begin and end.
    """

    def __init__(self, array: NDArray[Any], value: Any, part: Callable[[Any, NDArray[Any], int, int], Any]) -> None:
        self.array, self.value, self._part = array, value, part

    def write(self, array: NDArray[Any]) -> None:
        """Copy ``array`` in.

        Raises:
            ValueError: it has another dtype or shape; nothing is converted or broadcast.
        """
        check_array(array, self.array.dtype, self.array.shape)
        self.array[...] = array

    def read(self) -> NDArray[Any]:
        """A copy."""
        return self.array.copy()

    def rows(self, start: int, stop: int) -> HostBuffer:
        """Some of its rows."""
        array = self.array[start:stop]
        return HostBuffer(array, self._part(self.value, array, start, stop), self._part)

    def copy(self, source: Buffer) -> None:
        """Copy another one in."""
        np.copyto(self.array, cast("HostBuffer", source).array)
