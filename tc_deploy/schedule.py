"""Two-Phase Round-Robin (TPRR): which denoising steps run in full, as a pure function of four integers.

In: the number of steps T, the boundary, the intervals K_1 and K_2. Out: the variant of every step and the polynomial
with which a cached step extrapolates from the last full steps. Never: looks at a tensor, a model or a clock.
Source: TokenCache (arXiv 2409.18523) for the two phases with an interval each; the rest is defined here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tc_deploy.errors import PlanError
from tc_deploy.types import FloatArray

FULL = 0
"""Variant of a full step; variants 1 and 2 are the cached steps of phases 1 and 2."""
PHASES = (1, 2)
MAX_FORECAST_ORDER = 2


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The variant of every step of one sampling run.

    Args:
        steps: T, denoising steps of the run, at least 1.
        boundary: first step of phase 2, 0 <= boundary <= T. 0 leaves phase 1 empty, T leaves phase 2 empty.
        k1: interval of phase 1, at least 1: one full step, then ``k1 - 1`` cached ones. 1 means no caching.
        k2: interval of phase 2, likewise.

    Raises:
        PlanError: a number is outside its range; the message names it.
    """

    steps: int
    boundary: int
    k1: int
    k2: int

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise PlanError(f"schedule: steps must be at least 1, found {self.steps}")
        if not 0 <= self.boundary <= self.steps:
            raise PlanError(f"schedule: boundary must lie in 0..{self.steps} (the step count), found {self.boundary}")
        for name, interval in (("k1", self.k1), ("k2", self.k2)):
            if interval < 1:
                raise PlanError(f"schedule: {name} must be at least 1 (1 means every step is full), found {interval}")

    @cached_property
    def variants(self) -> tuple[int, ...]:
        """Variant of each step: 0 full, 1 or 2 a cached step of that phase."""
        first = tuple(FULL if step % self.k1 == 0 else 1 for step in range(self.boundary))
        second = tuple(FULL if step % self.k2 == 0 else 2 for step in range(self.steps - self.boundary))
        return first + second

    @property
    def full_steps(self) -> int:
        """How many steps run in full."""
        return self.variants.count(FULL)

    def cached_steps(self, phase: int) -> tuple[int, ...]:
        """The steps that run the cached variant of ``phase``, ascending."""
        return tuple(step for step, variant in enumerate(self.variants) if variant == phase)

    def line(self) -> str:
        """The schedule as people draw it: ``F c1 F c1 | F c2 c2 F c2 c2``; the bar is the boundary."""
        marks = ["F" if variant == FULL else f"c{variant}" for variant in self.variants]
        bar = ["|"] if 0 < self.boundary < self.steps else []
        return " ".join(marks[: self.boundary] + bar + marks[self.boundary :])

    def polynomial_weights(self, order: int) -> FloatArray:
        """How a cached step combines what the last full steps cached, unless its weights were fitted.

        The polynomial of degree ``order`` through the last ``order + 1`` full steps, evaluated at the present step
        (Lagrange's form; the same value as Newton's finite differences, which TaylorSeer, arXiv 2503.06923, writes
        as a Taylor series). While fewer full steps have run, the degree is what they allow.

        Args:
            order: 0 reuses, 1 extrapolates linearly, 2 quadratically.

        Returns:
            ``(T, order + 1)`` float32; column 0 belongs to the latest full step. Rows sum to 1. The row of a full
            step is ``1, 0, 0``: nothing reads it.

        Raises:
            PlanError: ``order`` is outside 0..2.
        """
        if not 0 <= order <= MAX_FORECAST_ORDER:
            raise PlanError(f"forecast order must lie in 0..{MAX_FORECAST_ORDER}, found {order}")
        weights = np.zeros((self.steps, order + 1), dtype=np.float32)
        history: list[int] = []
        for step, variant in enumerate(self.variants):
            if variant == FULL:
                history = [step, *history][: order + 1]
                weights[step, 0] = 1.0
                continue
            for column, node in enumerate(history):
                others = [other for other in history if other != node]
                weights[step, column] = np.prod([(step - other) / (node - other) for other in others])
        return weights


def full_schedule(steps: int) -> Schedule:
    """A schedule in which every step is full: the model's own sampling run.

    Raises:
        PlanError: ``steps`` is below 1.
    """
    return Schedule(steps=steps, boundary=steps, k1=1, k2=1)
