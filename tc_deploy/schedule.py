"""A schedule: which denoising steps run in full, and which kind of cached step the others are.

In: a list, or the four integers of Two-Phase Round-Robin (TPRR) that make one. Out: the variant of every step, and the
polynomial with which a cached step extrapolates from the last full steps. Never: looks at a tensor, a model or a clock.
Source: TokenCache (arXiv 2409.18523) for the two phases with an interval each; the rest is defined here.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from tc_deploy.errors import PlanError
from tc_deploy.types import FloatArray

FULL = 0
"""Variant of a full step; variants 1 and 2 are cached steps, in TPRR those of phases 1 and 2."""
PHASES = (1, 2)
MAX_FORECAST_ORDER = 2
_MARKS = {FULL: "F", 1: "c1", 2: "c2"}
_BAR = "|"


@dataclass(frozen=True, kw_only=True)
class RoundRobin:
    """The integers of :func:`tprr` that a schedule was made of."""

    phase_start: int
    cache_interval_early: int
    cache_interval_late: int


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The variant of every step of one sampling run: any list that begins with a full step.

    Args:
        variants: of each step: 0 full, 1 or 2 a cached step of that kind.
        rule: what the list was made of, for people to read; None for a list of its own. It decides nothing.

    Raises:
        PlanError: there is no step, the first is no full one, or a variant is unknown.
    """

    variants: tuple[int, ...]
    rule: RoundRobin | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if not self.variants:
            raise PlanError("schedule: steps must be at least 1, found 0")
        for step, variant in enumerate(self.variants):
            if variant not in _MARKS:
                raise PlanError(f"schedule: step {step}: variants are 0 (full), 1 and 2 (cached), found {variant}")
        if self.variants[0] != FULL:
            raise PlanError(
                "schedule: step 0 must be a full step, as nothing is cached before it, found"
                f" {_MARKS[self.variants[0]]}"
            )

    @property
    def steps(self) -> int:
        """T, denoising steps of the run."""
        return len(self.variants)

    @property
    def full_steps(self) -> int:
        """How many steps run in full."""
        return self.variants.count(FULL)

    def cached_steps(self, phase: int) -> tuple[int, ...]:
        """The steps that run the cached variant of ``phase``, ascending."""
        return tuple(step for step, variant in enumerate(self.variants) if variant == phase)

    def line(self) -> str:
        """The schedule as people draw it: ``F c1 F c1 | F c2 c2 F c2 c2``; the bar is where phase 2 starts."""
        marks = [_MARKS[variant] for variant in self.variants]
        start = self.phase_start
        return " ".join(marks if start is None else [*marks[:start], _BAR, *marks[start:]])

    @property
    def phase_start(self) -> int | None:
        """The first step of phase 2; None where there are no two phases."""
        start = 0 if self.rule is None else self.rule.phase_start
        return start if 0 < start < self.steps else None

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


def tprr(*, steps: int, phase_start: int, cache_interval_early: int, cache_interval_late: int) -> Schedule:
    """Two-Phase Round-Robin: in each phase one full step, then cached ones, over and over.

    Args:
        steps: T, denoising steps of the run, at least 1.
        phase_start: first step of phase 2, 0 <= phase_start <= T. 0 leaves phase 1 empty, T leaves phase 2 empty.
        cache_interval_early: K_1, interval of phase 1, at least 1: one full step, then K_1 - 1 cached ones. 1 means no
            caching.
        cache_interval_late: K_2, interval of phase 2, likewise.

    Raises:
        PlanError: a number is outside its range; the message names it.
    """
    if steps < 1:
        raise PlanError(f"schedule: steps must be at least 1, found {steps}")
    if not 0 <= phase_start <= steps:
        raise PlanError(f"schedule: phase_start must lie in 0..{steps} (the step count), found {phase_start}")
    for name, interval in (
        ("cache_interval_early", cache_interval_early),
        ("cache_interval_late", cache_interval_late),
    ):
        if interval < 1:
            raise PlanError(f"schedule: {name} must be at least 1 (1 means every step is full), found {interval}")
    first = tuple(FULL if step % cache_interval_early == 0 else 1 for step in range(phase_start))
    second = tuple(FULL if step % cache_interval_late == 0 else 2 for step in range(steps - phase_start))
    return Schedule(
        variants=first + second,
        rule=RoundRobin(
            phase_start=phase_start, cache_interval_early=cache_interval_early, cache_interval_late=cache_interval_late
        ),
    )


def schedule_from_line(line: str) -> Schedule:
    """A schedule from its drawing, as :meth:`Schedule.line` makes it; bars may stand anywhere.

    Raises:
        PlanError: a mark is unknown, or they make no schedule; the message names the step.
    """
    variants = {mark: variant for variant, mark in _MARKS.items()}
    marks = [mark for mark in line.split() if mark != _BAR]
    for step, mark in enumerate(marks):
        if mark not in variants:
            raise PlanError(f"schedule: step {step}: expected {', '.join(variants)}, found {mark[:20]!r}")
    return Schedule(variants=tuple(variants[mark] for mark in marks))


def full_schedule(steps: int) -> Schedule:
    """A schedule in which every step is full: the model's own sampling run.

    Raises:
        PlanError: ``steps`` is below 1.
    """
    return tprr(steps=steps, phase_start=steps, cache_interval_early=1, cache_interval_late=1)
