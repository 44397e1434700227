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


LEAST_NORM = 1e-8
"""What pipelines add to a norm of guided outputs that they divide by."""


class GuidanceRule(StrEnum):
    """How a pipeline combines what the model makes with the condition (c) and without it (u), at scale g."""

    PLAIN = "plain"
    """u + g (c - u), g = 1 is none (arXiv 2207.12598, with g = w + 1)."""
    BEYOND = "beyond"
    """c + g (c - u), g = 0 is none."""
    RESCALED = "rescaled"
    """The plain one, scaled to the norm of c along the last axis."""
    RESCALED_DOWN = "rescaled down"
    """The same, where that makes it no longer."""

    @property
    def none(self) -> float:
        """The scale that is none, as are smaller ones."""
        return 0.0 if self is GuidanceRule.BEYOND else 1.0

    @property
    def rescales(self) -> bool:
        """Whether the result is scaled to the norm of c."""
        return self in (GuidanceRule.RESCALED, GuidanceRule.RESCALED_DOWN)


class Skip(StrEnum):
    """What a cached step does that keeps no token in any block."""

    MODEL = "model"
    """It does not run the model: the output is forecast from those of the last full steps."""
    BLOCKS = "blocks"
    """It runs embeddings, adaLN and head; what the blocks add is forecast, as ``Reuse`` says."""


class FitTarget(StrEnum):
    """What a fitted plan's run is to end at."""

    FULL = "full"
    """The model's own run of the plan's steps."""
    CONVERGED = "converged"
    """The model's own run of many more steps, which that one only comes near to."""


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
