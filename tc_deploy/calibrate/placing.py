"""Where the full steps of a run stand: where a fitted run, tried as a whole, ends nearest to the model's own.

In: a fitter, and a number of full steps. Out: a schedule. What an error does to the final latents is not the sum of
what it does at each step, as later fits mend it: additive models place badly. So they only give starts, which are tried
on a few samples, and the best of them on all; then full steps of the best are moved one at a time, as long as the
samples that the fits did not see say that the run ends nearer. Never: decides how many.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass

import numpy as np

from tc_deploy.calibrate.fitting import FittedRun, Fitter, OwnRuns
from tc_deploy.errors import NotFiniteError, UsageError
from tc_deploy.models.solver import SolverTable
from tc_deploy.quality.metrics import image_psnr_db
from tc_deploy.schedule import FULL, Schedule, tprr
from tc_deploy.types import FloatArray

TILTS = (-1.0, 0.0, 1.0, 2.0, 3.0)
"""The additive model weighs what a gap leaves behind by exp(tilt * its place in the run): how much later steps mend of
it nobody knows beforehand."""
FINALISTS = 3
"""Starts that are tried on all samples."""
MOVES = (-1, 1, -2, 2)
"""Steps by which a full step is moved."""
LONGEST = 3
"""Gaps of the additive model's schedules are at most so many times the mean one."""
LOST_DB = -1000.0
"""Of a run that comes to values that are not finite."""
CACHED = 1
"""The variant of the cached steps."""

Scores = MutableMapping[tuple[int, ...], float]
"""By full steps, mean PSNR in dB to the model's own run of the samples that judge."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Placed:
    """A schedule that was found."""

    schedule: Schedule
    psnr_db: float
    """Mean over the samples that judged, so a little too good."""
    tried: int
    """Schedules."""
    finished: bool
    """Whether no move was left, or the time was over."""


def placed_schedule(steps: int, full: Sequence[int]) -> Schedule:
    """A list with full steps at these places, and cached steps between."""
    places = set(full)
    return Schedule(variants=tuple(FULL if step in places else CACHED for step in range(steps)))


def check_number(full_steps: int, steps: int) -> None:
    """Check a number of full steps.

    Raises:
        UsageError: it leaves no choice: a run has one at least, and one cached step at least.
    """
    if not 0 < full_steps < steps:
        raise UsageError(
            f"schedule.full_steps (--full-steps): must lie in 1..{steps - 1}, below the {steps} steps of the run, found"
            f" {full_steps}"
        )


class Placement:
    """Places full steps, of one fitter's model and samples.

    Args:
        fitter: of all samples, with some that judge.
        few: of the first samples alone.
        pixels: whether latents are pictures.
        scores: what was found before, and is not tried again; filled.
        few_scores: likewise, on the first samples.
        deadline: of :func:`time.monotonic`, after which nothing more is tried; None: none.
        on_try: told how many schedules were tried, and of how many that are in sight.
    """

    def __init__(
        self,
        fitter: Fitter,
        few: Fitter,
        *,
        pixels: bool,
        scores: Scores,
        few_scores: Scores,
        deadline: float | None = None,
        on_try: Callable[[int, int], None] = lambda tried, expected: None,
    ) -> None:
        self.fitter, self.few, self.pixels, self.deadline, self.on_try = fitter, few, pixels, deadline, on_try
        self.scores, self.few_scores = scores, few_scores
        self.tried, self._expected = 0, 0

    def __call__(self, full_steps: int) -> Placed:
        """Place so many full steps.

        Raises:
            UsageError: there is nothing to choose.
        """
        steps = self.fitter.solver.steps
        check_number(full_steps, steps)
        starts = list(dict.fromkeys(starts_of(full_steps, self.fitter.solver, self.fitter.order, self.few.own)))
        self._expected += len(starts) + FINALISTS
        ranked = sorted(starts, key=lambda full: -self._tried(self.few, self.few_scores, full)[0])
        finalists = ranked[: 1 if self._is_over() else FINALISTS]
        best = max(finalists, key=lambda full: self._tried(self.fitter, self.scores, full)[0])
        moved = True
        while moved and not self._is_over():
            best, moved = self._one_round(best)
        if moved:  # the time was over: an earlier run may have come further than this one did
            best = max((full for full in self.scores if len(full) == full_steps), key=self.scores.__getitem__)
        return Placed(
            schedule=placed_schedule(steps, best),
            psnr_db=self.scores[best],
            tried=self.tried,
            finished=not moved,
        )

    def _one_round(self, best: tuple[int, ...]) -> tuple[tuple[int, ...], bool]:
        """Try to move every full step, the last ones first: a run that changes late is a short one."""
        moved, run = False, None
        self._expected = self.tried + len(MOVES) * (len(best) - 1)
        for place in reversed(range(1, len(best))):
            for move in MOVES:
                other = (*best[:place], best[place] + move, *best[place + 1 :])
                if not _is_schedule(other, self.fitter.solver.steps) or self._is_over():
                    continue
                if other not in self.scores and run is None:
                    run = self.fitter(placed_schedule(self.fitter.solver.steps, best))
                score, tried = self._tried(self.fitter, self.scores, other, run)
                if score > self.scores[best]:
                    best, moved, run = other, True, tried
        return best, moved

    def _tried(
        self, fitter: Fitter, scores: Scores, full: tuple[int, ...], like: FittedRun | None = None
    ) -> tuple[float, FittedRun | None]:
        """Mean PSNR of the samples that judge, and the run; None where it was tried before."""
        run = None
        if full not in scores:
            try:
                run = fitter(placed_schedule(fitter.solver.steps, full), like)
                found, own = run.latents[fitter.judge], fitter.own.latents[-1][fitter.judge]
                scores[full] = round(image_psnr_db(found, own, pixels=self.pixels), 3)
            except NotFiniteError:
                scores[full] = LOST_DB
        self.tried += 1
        self.on_try(self.tried, max(self.tried, self._expected))
        return scores[full], run

    def _is_over(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline


def starts_of(full_steps: int, solver: SolverTable, order: int, own: OwnRuns) -> Iterator[tuple[int, ...]]:
    """Schedules to start from: an additive model's best at several tilts, and those round-robins with so many."""
    yield from _additive_starts(full_steps, solver, order, own)
    yield from _round_robins(full_steps, solver.steps)


def _round_robins(full_steps: int, steps: int) -> Iterator[tuple[int, ...]]:
    """Of intervals near the mean one: with the first and the last start of phase 2 that gives so many full steps."""
    mean = steps / full_steps
    for early in range(max(1, math.floor(mean)), math.ceil(mean) + 2):
        for late in range(max(1, early - 1), early + 1):
            found = []
            for start in range(steps + 1):
                variants = tprr(
                    steps=steps, phase_start=start, cache_interval_early=early, cache_interval_late=late
                ).variants
                if variants.count(FULL) == full_steps:
                    found.append(tuple(step for step, variant in enumerate(variants) if variant == FULL))
            yield from (found[0], found[-1]) if found else ()


def _additive_starts(full_steps: int, solver: SolverTable, order: int, own: OwnRuns) -> Iterator[tuple[int, ...]]:
    """By dynamic programming: least sum of what each gap leaves behind at its end, on the model's own run."""
    steps = solver.steps
    leaves = _Leftovers(solver, own)
    longest = min(steps, math.ceil(LONGEST * steps / full_steps))
    for tilt in TILTS:
        weights = np.exp(tilt * np.arange(steps + 1) / steps)
        # By the last two full steps: cost, and the path to there.
        layer: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {(-1, 0): (0.0, (0,))}
        for placed in range(1, full_steps + 1):
            following: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {}
            for (_, last), (cost, path) in layer.items():
                costs = leaves.behind(path[: -order - 2 : -1])
                # The rest must fit in, and not be too far.
                left = full_steps - placed
                ends = range(last + 1, min(last + longest, steps - left) + 1) if left else (steps,)
                for end in ends:
                    total = cost + weights[end] * costs[end]
                    if (last, end) not in following or total < following[last, end][0]:
                        following[last, end] = (total, (*path, end))
            layer = following
        yield min(layer.values())[1][:-1]


class _Leftovers:
    """What a gap leaves behind at its end if the model's own latents and outputs stood before it, by least squares."""

    def __init__(self, solver: SolverTable, own: OwnRuns) -> None:
        of_latents, of_outputs = np.split(solver.coefficients.astype(np.float64), 2, axis=1)
        # A longer history is taken for its sum: neighbours are alike.
        self.of_latents, self.of_outputs, self.steps = of_latents.sum(1), of_outputs.sum(1), solver.steps
        latents = own.latents.flatten(1).double().numpy()
        outputs = (latents[1:] - self.of_latents[:, None] * latents[:-1]) / self.of_outputs[:, None]
        self.gram = outputs @ outputs.T
        self._known: dict[tuple[int, ...], FloatArray] = {}

    def behind(self, full: tuple[int, ...]) -> FloatArray:
        """(T + 1,) by the step at which the gap ends that begins after the first of these full steps, latest first."""
        if full not in self._known:
            first, nodes = full[0], list(full)
            adds = np.zeros((self.steps + 1, self.steps))
            for end in range(first + 2, self.steps + 1):
                adds[end] = self.of_latents[end - 1] * adds[end - 1]
                adds[end, end - 1] = self.of_outputs[end - 1]
            seen = adds @ self.gram
            own = self.gram[np.ix_(nodes, nodes)]
            ridge = 1e-8 * own.diagonal().mean() * np.eye(len(nodes))
            best = np.linalg.lstsq(own + ridge, seen[:, nodes].T, rcond=None)[0]
            squares = (seen * adds).sum(1) - 2 * (best.T * seen[:, nodes]).sum(1) + (best * (own @ best)).sum(0)
            self._known[full] = np.sqrt(squares.clip(0))
        return self._known[full]


def _is_schedule(full: Sequence[int], steps: int) -> bool:
    return full[-1] < steps and all(one < other for one, other in itertools.pairwise(full))
