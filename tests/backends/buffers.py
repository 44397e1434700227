"""Buffers one at a time, for tests that need no more; a pipeline asks for all of its at once."""

from __future__ import annotations

from typing import Any

import numpy as np

from tc_deploy.backends.base import BufferSpec, Device


def buffer_of(device: Device, dtype: np.dtype[Any] | str, shape: tuple[int, ...], *, exchanged: bool = False) -> Any:
    """A buffer of its own memory, as the device makes it."""
    [buffer] = device.buffers([BufferSpec(dtype=np.dtype(dtype), shape=shape, exchanged=exchanged)])
    return buffer
