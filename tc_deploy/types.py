"""Array aliases and the records that several rooms share. Holds no behaviour and imports nothing of the package."""

from __future__ import annotations

from enum import StrEnum
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

FloatArray: TypeAlias = NDArray[np.float32]
IntArray: TypeAlias = NDArray[np.int32]


class Attention(StrEnum):
    """What a kept token attends to in a cached step."""

    KEPT = "kept"
    """The kept tokens only."""
    ALL = "all"
    """All N tokens; the pruned ones' keys and values come from the cache."""


class Reuse(StrEnum):
    """What a pruned token takes from the cache."""

    BRANCH = "branch"
    """Each branch's output before its adaLN gate; the present step's gate is applied."""
    RESIDUAL = "residual"
    """The block's residual f_l(z), added to the token's present value."""
