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


class Skip(StrEnum):
    """What a cached step does that keeps no token in any block."""

    MODEL = "model"
    """It does not run the model: the output is forecast from those of the last full steps."""
    BLOCKS = "blocks"
    """It runs embeddings, adaLN and head; what the blocks add is forecast, as ``Reuse`` says."""


class Cleaning(StrEnum):
    """What a pipeline does to a prompt before it is cut into tokens."""

    NONE = "none"
    LOWER = "lower"
    """Lower case, and no space at the ends, as PixArt's do."""
    WEB = "web"
    """HTML entities resolved and spaces collapsed, as Wan's does; text that was decoded wrongly is mended where ftfy is
    installed."""


class Precision(StrEnum):
    """What a graph's matrix products, their weights and the caches are in; everything else is fp32."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
