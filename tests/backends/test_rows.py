"""Rows of a buffer are the buffer's own memory, on every device: what slots that lie side by side need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from backends.buffers import buffer_of

from tc_deploy.backends.registry import backend

CPU_DEVICES: dict[str, Callable[[], Any]] = {
    "onnxruntime": lambda: backend("onnxruntime").open({}),
    "openvino": lambda: backend("openvino").open({}),
    "torch": lambda: backend("torch").open({}),
}


@pytest.mark.parametrize("name", CPU_DEVICES)
@pytest.mark.parametrize("dtype", ["float32", "int32"])
def test_rows_are_the_buffer_s_own_memory(name: str, dtype: str) -> None:
    device = CPU_DEVICES[name]()
    whole, other = buffer_of(device, dtype, (4, 3)), buffer_of(device, dtype, (4, 3))
    assert not whole.read().any()
    part, values = whole.rows(1, 3), np.arange(6).reshape(2, 3).astype(dtype)
    part.write(values)
    assert whole.read().tolist() == [[0, 0, 0], [0, 1, 2], [3, 4, 5], [0, 0, 0]]
    assert part.rows(1, 2).read().tolist() == [[3, 4, 5]]
    other.rows(2, 4).copy(part)
    whole.write(np.ones((4, 3), dtype))
    # What was copied stays.
    assert other.read().tolist() == [[0, 0, 0], [0, 0, 0], [0, 1, 2], [3, 4, 5]]
    assert part.read().tolist() == [[1, 1, 1], [1, 1, 1]]
