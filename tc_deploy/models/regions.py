"""The region of a picture of the size that a model was trained at which has another picture's shape.

Its rows and columns are what sizes with positions of their own are counted by (``get_resize_crop_region_for_grid`` of
diffusers' pipelines, whose modules load text encoders).
"""

from __future__ import annotations

from typing import TypeAlias

Corner: TypeAlias = tuple[int, int]


def centred_region(grid: tuple[int, int], base: tuple[int, int]) -> tuple[Corner, Corner]:
    """Upper left and lower right corner, in rows and columns, of ``grid`` made as large as fits into ``base``."""
    (height, width), (most, widest) = grid, base
    if height / width > most / widest:
        size = (most, round(most / height * width))
    else:
        size = (round(widest / width * height), widest)
    top, left = (round((whole - part) / 2.0) for whole, part in zip(base, size, strict=True))
    return (top, left), (top + size[0], left + size[1])
