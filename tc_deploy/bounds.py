"""How large a number in a document may be: a few bytes must not ask for hours or for all of a machine's memory.

The limits lie far above what anybody uses, and below what does harm. Never: says what fits
together (``consistency.py``).
"""

from __future__ import annotations

from typing import Annotated, Final, TypeAlias

import numpy as np
from pydantic import Field

LARGEST_FLOAT32: Final = float(np.finfo(np.float32).max)
MAX_STEPS: Final = 10_000
"""Ten times what models are trained with."""
MAX_BLOCKS: Final = 10_000
MAX_AXES: Final = 8
MAX_GUIDANCE: Final = 1000.0
"""Of a guidance scale, which is rarely above 20. It multiplies the difference of two outputs, which half precision
knows to one part in 2048 of their size: beyond this a picture is made of rounding errors."""
MAX_SIZE: Final = 2**31 - 1
"""Of an axis: what engines count in."""
MAX_COUNT: Final = 2**63 - 1

Steps: TypeAlias = Annotated[int, Field(gt=0, le=MAX_STEPS)]
Step: TypeAlias = Annotated[int, Field(ge=0, le=MAX_STEPS)]
"""Also the number of steps before it."""
Size: TypeAlias = Annotated[int, Field(gt=0, le=MAX_SIZE)]
Count: TypeAlias = Annotated[int, Field(ge=0, le=MAX_COUNT)]
PositiveCount: TypeAlias = Annotated[int, Field(gt=0, le=MAX_COUNT)]
Float32: TypeAlias = Annotated[float, Field(ge=-LARGEST_FLOAT32, le=LARGEST_FLOAT32)]
"""Finite in the precision in which it is used."""
Guidance: TypeAlias = Annotated[float, Field(ge=0, le=MAX_GUIDANCE)]
PositiveFloat32: TypeAlias = Annotated[float, Field(gt=0, le=LARGEST_FLOAT32)]
