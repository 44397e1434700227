"""Fits and placements of one model and sampler, kept in a folder: what was done before is not done again.

In: seeds, and schedules or numbers of full steps. Out: forecast weights, where it is fitted the solver's table, and
placed schedules. The model's own runs, which all of them are made from, are sampled once. An interrupted one goes on
where it stood. Never: judges a plan.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch

from tc_deploy.bundle import canonical_json, sha256_of_bytes, write_state
from tc_deploy.calibrate.converged import converged_runs, converged_sampling
from tc_deploy.calibrate.fitting import Fitter, OwnRuns, check_fit, own_runs
from tc_deploy.calibrate.placing import Placed, Placement
from tc_deploy.calibrate.recipe import ScheduleRecipe
from tc_deploy.models.family import DiffusionTransformer
from tc_deploy.models.solver import read_solver
from tc_deploy.plan import CacheRecord
from tc_deploy.planned.prompts import draw_batch
from tc_deploy.schedule import Schedule
from tc_deploy.tables import FORECAST_WEIGHTS, SOLVER_COEFFICIENTS, StepTables
from tc_deploy.tensors import read_tensors, what_is_wrong
from tc_deploy.tokencache.sampler import Sampling
from tc_deploy.types import FitTarget, FloatArray

JUDGES = 2
"""While full steps are placed, every second sample is not fitted on, and judges."""
LATENTS = "latents"


class Fits:
    """Fits and places.

    Args:
        model: the model.
        sampling: the sampler with all its steps.
        seeds: of the samples to fit on.
        folder: gives the folder where what is done is kept.
        report: told what is being done, how far it is, and of how much.
        target: what plans are fitted towards; the solver too, where that is the converged run.

    Raises:
        UsageError: the sampler cannot have the converged run's steps.
    """

    def __init__(
        self,
        model: DiffusionTransformer,
        sampling: Sampling,
        seeds: range,
        folder: Callable[[], Path],
        report: Callable[[str, int, int], None],
        target: FitTarget = FitTarget.FULL,
    ) -> None:
        self.model, self.sampling, self.seeds, self.report = model, sampling, seeds, report
        self.target, self._folder = target, folder
        self.converged = converged_sampling(model, sampling) if target is FitTarget.CONVERGED else None
        """The sampler of the converged run, where that is the target."""
        self.solver = read_solver(sampling.scheduler, sampling.steps, sampling.set_timesteps_kwargs)

    @cached_property
    def folder(self) -> Path:
        """Where it is kept."""
        return self._folder()

    @cached_property
    def own(self) -> OwnRuns:
        """The model's own runs, of the target."""
        path, steps = self._path("own"), self.sampling.steps
        shape = (steps + 1, len(self.seeds), *self.model.geometry.latent_shape)
        latents = _kept(path, LATENTS, shape)
        if latents is not None:
            _, conditions = draw_batch(self.model, self.sampling, self.seeds)
            return OwnRuns(conditions=conditions, latents=torch.from_numpy(latents))
        if self.converged is None:
            what = "sampling the model's own runs"
            own = own_runs(self.model, self.sampling, self.seeds, lambda done, total: self.report(what, done, total))
        else:
            what = f"sampling the model's own runs of {self.converged.steps} steps"
            own = converged_runs(
                self.model,
                self.sampling,
                self.solver,
                self.converged,
                self.seeds,
                lambda done, total: self.report(what, done, total),
            )
        write_state(path, safetensors.numpy.save({LATENTS: np.ascontiguousarray(own.latents.numpy())}))
        return own

    def tables(self, schedule: Schedule, cache: CacheRecord) -> StepTables:
        """The tables of a schedule, whose cached steps compute no token.

        Raises:
            UsageError: there is nothing to fit, or there are too few samples.
            NotFiniteError: a run comes to values that are not finite.
        """
        check_fit(cache, schedule, len(self.seeds), self.target)
        order = cache.forecast_order
        path = self._path("fit", variants=schedule.variants, order=order)
        fitter = self._fitter(self.own, order)
        weights = _kept(path, FORECAST_WEIGHTS, (schedule.steps, order + 1))
        coefficients = _kept(path, SOLVER_COEFFICIENTS, fitter.solver.coefficients.shape)
        if weights is None or coefficients is None:
            what = "fitting the forecasts"
            run = fitter(schedule, on_step=lambda step: self.report(what, step + 1, schedule.steps))
            weights, coefficients = run.weights, run.coefficients
            write_state(path, safetensors.numpy.save({FORECAST_WEIGHTS: weights, SOLVER_COEFFICIENTS: coefficients}))
        return StepTables(forecast_weights=weights, solver_coefficients=coefficients if fitter.fits_solver else None)

    def place(self, asked: ScheduleRecipe, order: int) -> Placed:
        """Place full steps, of a run whose other steps skip the model.

        Args:
            asked: how many, and how long it may take.
            order: r, the forecast order.

        Raises:
            UsageError: there is nothing to place.
            NotFiniteError: a run comes to values that are not finite.
        """
        full_steps, minutes = asked.full_steps or 0, asked.budget_minutes
        deadline = None if minutes is None else time.monotonic() + 60 * minutes
        own = self.own
        few = own.first(max(2 * JUDGES, len(self.seeds) // 2))
        fitters = [self._fitter(runs, order, JUDGES) for runs in (own, few)]
        what = f"placing {full_steps} full steps"
        placement = Placement(
            *fitters,
            pixels=self.model.geometry.pixels,
            scores=_KeptScores(self._path("tried", order=order)),
            few_scores=_KeptScores(self._path("tried-few", order=order)),
            deadline=deadline,
            on_try=lambda tried, expected: self.report(what, tried, expected),
        )
        return placement(full_steps)

    def _fitter(self, own: OwnRuns, order: int, judges: int = 0) -> Fitter:
        fits_solver = self.target is FitTarget.CONVERGED
        return Fitter(self.model, self.sampling, self.solver, order, own, judges, fits_solver=fits_solver)

    def _path(self, kind: str, **of: Any) -> Path:
        """The file of one kind that belongs to what it depends on, beside what the folder does."""
        of |= {"samples": len(self.seeds), "target": self.target}
        key = sha256_of_bytes(canonical_json(of).encode())[:16]
        return self.folder / f"{kind}-{key}"


class _KeptScores(dict[tuple[int, ...], float]):
    """Scores, read from a file and written to it with every new one."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            super().update({tuple(full): float(score) for full, score in stored})
        except (OSError, ValueError, TypeError):
            self.clear()

    def __setitem__(self, full: tuple[int, ...], score: float) -> None:
        super().__setitem__(full, score)
        write_state(self.path, json.dumps([[list(key), found] for key, found in self.items()]).encode())


def _kept(path: Path, name: str, shape: tuple[int, ...]) -> FloatArray | None:
    try:
        found = read_tensors(path).get(name)
    except ValueError:
        return None
    if found is None or what_is_wrong(found, np.float32, shape) is not None:
        return None
    array: FloatArray = found
    return array
