"""A file of tensors, read with its every fault told in one line.

In: a safetensors file, which may come from anywhere. Out: arrays by name. Never: unpickles, or knows what they are for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError

from tc_deploy.errors import first_line


def read_tensors(path: Path, largest_bytes: int | None = None) -> dict[str, NDArray[Any]]:
    """Read a safetensors file. The library sees to it that what its header declares is what the file holds.

    Args:
        path: the file.
        largest_bytes: more than it can need; a larger one is not read.

    Raises:
        ValueError: it is none, larger, or holds an element type that numpy lacks.
    """
    try:
        size_bytes = path.stat().st_size
        if largest_bytes is not None and size_bytes > largest_bytes:
            raise ValueError(f"expected at most {largest_bytes} bytes, found {size_bytes}")
        if not path.is_file():
            raise ValueError("it is no file")
        return safetensors.numpy.load_file(path)
    except (OSError, SafetensorError, AttributeError, KeyError, TypeError) as error:  # the last three: an element type
        raise ValueError(f"not a safetensors file of numpy types: {first_line(error)}") from None


def what_is_wrong(
    found: NDArray[Any] | None, dtype: np.dtype[Any] | type, shape: tuple[int, ...] | None = None
) -> str | None:
    """What keeps an array from being a finite one of this type and shape, in words; None where nothing does."""
    expected = f"expected finite {np.dtype(dtype)}" if shape is None else f"expected finite {np.dtype(dtype)} {shape}"
    if found is None:
        return f"{expected}, found nothing"
    if found.dtype != dtype or (shape is not None and found.shape != shape):
        return f"{expected}, found {found.dtype} {found.shape}"
    if not np.isfinite(found).all():
        return f"{expected}, found values that are not"
    return None
