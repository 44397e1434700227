"""Where buffers lie in one piece of memory: arithmetic, for a device that has not to be there.

In: sizes. Out: an offset for each, in their order. Never: allocates.
"""

from __future__ import annotations

from collections.abc import Iterable

ALIGNMENT_BYTES = 256
"""TensorRT wants every tensor's address to be a multiple of it, and so CUDA aligns what it allocates."""


def arena_offsets(sizes_bytes: Iterable[int]) -> tuple[list[int], int]:
    """Lay out buffers one behind the other.

    Args:
        sizes_bytes: of each buffer; one of nothing still gets an address of its own.

    Returns:
        The offset of each, a multiple of :data:`ALIGNMENT_BYTES`; and the size of all.
    """
    offsets = []
    end = 0
    for size_bytes in sizes_bytes:
        offsets.append(end)
        end += -(-max(size_bytes, 1) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    return offsets, end
