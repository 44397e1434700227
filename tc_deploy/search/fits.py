"""Forecast weights of a search's points, fitted once and kept in the work folder.

In: a point's cache settings, schedule and tables. Out: the tables with fitted weights, and the seeds of the fit. Only a
point that keeps no token is fitted: the baselines that spend the same tokens otherwise have polynomials, and what a fit
gains would be taken for what the tokens gain.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import safetensors.numpy

from tc_deploy.bundle import canonical_json, sha256_of_bytes, write_state
from tc_deploy.calibrate.fitting import fit_forecast, fitted_phases
from tc_deploy.models.family import DiffusionTransformer
from tc_deploy.models.solver import read_solver
from tc_deploy.plan import CacheRecord
from tc_deploy.schedule import PHASES, Schedule
from tc_deploy.tables import FORECAST_WEIGHTS, StepTables
from tc_deploy.tensors import read_tensors, what_is_wrong
from tc_deploy.tokencache.sampler import Sampling


class Fits:
    """Fits points.

    Args:
        model: the model.
        sampling: the sampler with all its steps.
        seeds: of the samples to fit on; none: nothing is fitted.
        folder: where fits are kept.
        on_step: told how many steps of how many are done.
    """

    def __init__(
        self,
        model: DiffusionTransformer,
        sampling: Sampling,
        seeds: range,
        folder: Path,
        on_step: Callable[[int, int], None],
    ) -> None:
        self.model, self.sampling, self.seeds = model, sampling, seeds
        self.folder, self.on_step = folder, on_step

    def __call__(self, schedule: Schedule, cache: CacheRecord, tables: StepTables) -> tuple[StepTables, range]:
        """Fit a point, unless that was done before.

        Returns:
            Its tables, and the seeds that their weights were fitted on; none where they are the polynomials'.

        Raises:
            UsageError: there are too few samples.
            NotFiniteError: a run comes to values that are not finite.
        """
        used = tuple(phase for phase in PHASES if schedule.cached_steps(phase))
        if not (self.seeds and used and fitted_phases(cache, schedule) == used):
            return tables, range(0)
        identity = canonical_json({"variants": schedule.variants, "cache": cache.model_dump(mode="json")})
        path = self.folder / f"{sha256_of_bytes(identity.encode())[:16]}.safetensors"
        try:
            weights = read_tensors(path).get(FORECAST_WEIGHTS)
        except ValueError:
            weights = None
        if weights is None or what_is_wrong(weights, np.float32, tables.forecast_weights.shape) is not None:
            solver = read_solver(self.sampling.scheduler, schedule.steps, self.sampling.set_timesteps_kwargs)
            weights = fit_forecast(
                self.model,
                self.sampling,
                cache,
                schedule,
                tables,
                solver,
                self.seeds,
                lambda done: self.on_step(done, 2 * schedule.steps),
            )
            write_state(path, safetensors.numpy.save({FORECAST_WEIGHTS: weights}))
        return dataclasses.replace(tables, forecast_weights=weights), self.seeds
