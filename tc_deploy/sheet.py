"""Pictures side by side on one sheet.

In: pictures of one size as arrays. Out: one array. Never: scales a picture, or reads or writes a file.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

GAP = 2
"""Pixels between two pictures: without them dark pictures flow together."""
GREY = 128
"""Of the gaps and of places without a picture; it stands out from dark and bright pictures alike."""


def sheet_of(images: NDArray[np.uint8], columns: int | None = None) -> NDArray[np.uint8]:
    """Lay pictures out in rows, with grey gaps between them.

    Args:
        images: (n, H, W) or (n, H, W, 3).
        columns: pictures in a row; None comes as close to a square as their number allows.

    Returns:
        (rows * (H + GAP) - GAP, columns * (W + GAP) - GAP), or with 3 channels. One picture is its own sheet.
    """
    count, height, width = images.shape[:3]
    columns = math.ceil(math.sqrt(count)) if columns is None else columns
    rows = math.ceil(count / columns)
    sheet = np.full((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, *images.shape[3:]), GREY, np.uint8)
    for index, image in enumerate(images):
        top, left = index // columns * (height + GAP), index % columns * (width + GAP)
        sheet[top : top + height, left : left + width] = image
    return sheet
