"""The plans that a search compares with its baselines: full steps placed and forecasts fitted, or tokens kept.

In: a recipe's ``[search]``, the model, its fits. Out: plans by name. A plan whose cached steps skip the model is placed
and fitted. One that keeps tokens goes round-robin, with polynomials, as its twins do: the same budget on random tokens,
and evenly over the blocks. Never: builds or times one.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tc_deploy.calibrate.asked import Report
from tc_deploy.calibrate.calibration import assemble_plan, importance_of
from tc_deploy.calibrate.fits import Fits
from tc_deploy.calibrate.recipe import Recipe, ScheduleRecipe
from tc_deploy.models.family import DiffusionTransformer
from tc_deploy.plan import CacheRecord, OriginRecord
from tc_deploy.schedule import MAX_FORECAST_ORDER, Schedule, tprr
from tc_deploy.search.baselines import settings_name
from tc_deploy.search.built_points import PlannedPoint
from tc_deploy.search.record import Kind
from tc_deploy.tables import StepTables
from tc_deploy.tokencache.sampler import Sampling
from tc_deploy.tokencache.selection import phase_keep_counts, token_index_from_importance
from tc_deploy.types import Attention, FloatArray, Reuse, Skip

PLACING_SHARE = 0.5
"""Of the time that a search may take, for placing full steps; the rest builds and judges."""
TOKEN_SHARE = 0.25
"""Of the steps that are full where tokens are kept."""


class Candidates:
    """Makes them.

    Args:
        recipe: the model's recipe.
        model: the model.
        sampling: the sampler with all its steps.
        fits: fits and places.
        settings: what the origin of a plan says of the search.
    """

    def __init__(
        self, recipe: Recipe, model: DiffusionTransformer, sampling: Sampling, fits: Fits, settings: dict[str, Any]
    ) -> None:
        self.recipe, self.model, self.sampling, self.fits, self.settings = recipe, model, sampling, fits, settings

    def placed(self, deadline: float | None) -> Iterator[PlannedPoint]:
        """One plan for each number of full steps, until the time is over, with a start alone where there is little.

        Args:
            deadline: of :func:`time.monotonic`, for all of a search; None: none.
        """
        numbers = full_step_counts(self.recipe.search.full_steps, self.sampling.steps)
        nothing = (0,) * len(self.model.blocks)
        cache = CacheRecord(
            reuse=Reuse.BRANCH,
            attention=Attention.ALL,
            forecast_order=MAX_FORECAST_ORDER,
            keep_counts=(nothing, nothing),
            skip=Skip.MODEL,
        )
        end = None if deadline is None else time.monotonic() + PLACING_SHARE * (deadline - time.monotonic())
        for done, number in enumerate(numbers):
            minutes = None if end is None else max(0.0, end - time.monotonic()) / (len(numbers) - done) / 60
            asked = ScheduleRecipe(full_steps=number, budget_minutes=minutes)
            schedule = self.fits.place(asked, cache.forecast_order).schedule
            tables = self.fits.tables(schedule, cache)
            yield self._point(schedule, cache, tables, self.fits.seeds, None)

    def with_tokens(self, importance: FloatArray) -> Iterator[PlannedPoint]:
        """One plan for each share of tokens, chosen by the Cache Predictor.

        Args:
            importance: (T, L, N) scores.
        """
        schedule, settings = token_schedule(self.sampling.steps), self.recipe.cache
        for ratio in self.recipe.search.keep_ratio:
            if not ratio:
                continue
            cache = CacheRecord(
                reuse=settings.reuse,
                attention=settings.attention,
                forecast_order=MAX_FORECAST_ORDER,
                keep_counts=phase_keep_counts(importance, (ratio, ratio), settings.multiple, schedule),
                skip=settings.skip,
            )
            index = token_index_from_importance(importance, cache.keep_counts, schedule)
            tables = StepTables.polynomial(schedule, cache.forecast_order, index)
            yield self._point(schedule, cache, tables, range(0), importance)

    def _point(
        self,
        schedule: Schedule,
        cache: CacheRecord,
        step_tables: StepTables,
        fit_seeds: range,
        importance: FloatArray | None,
    ) -> PlannedPoint:
        origin = OriginRecord(method="search", seed=self.recipe.seed, settings=self.settings)
        plan, tables = assemble_plan(
            self.model,
            self.sampling,
            schedule,
            cache,
            step_tables,
            fit_seeds=fit_seeds,
            importance=importance,
            origin=origin,
        )
        return PlannedPoint(name=settings_name(plan), kind=Kind.TOKEN_CACHE, plan=plan, tables=tables)


def full_step_counts(shares: tuple[float, ...], steps: int) -> tuple[int, ...]:
    """The numbers of full steps that shares of a run come to, the fewest first: one at least, and a cached one."""
    return tuple(sorted({min(max(1, round(share * steps)), steps - 1) for share in shares}))


def token_schedule(steps: int) -> Schedule:
    """The round-robin in which tokens are kept: one interval for the whole run."""
    interval = min(round(1 / TOKEN_SHARE), steps)
    return tprr(steps=steps, phase_start=steps, cache_interval_early=interval, cache_interval_late=1)


def token_importance(
    recipe: Recipe, model: DiffusionTransformer, sampling: Sampling, folder: Path, report: Report
) -> FloatArray:
    """(T, L, N) scores of a Cache Predictor, trained for the largest share that is kept; its state in a folder."""
    ratio = max(recipe.search.keep_ratio)
    cache = recipe.cache.model_copy(update={"keep_counts": None, "keep_ratio": (ratio, ratio)})
    settings = recipe.model_copy(update={"cache": cache})
    importance, _ = importance_of(settings, model, sampling, token_schedule(sampling.steps), lambda: folder, report)
    return importance
