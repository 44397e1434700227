"""What users try first, as plans: run on the same engines, from the same noise, in the same search.

Fewer steps; a better solver at fewer steps; whole steps skipped at one interval for the whole run, their output reused
(the idea of FORA, arXiv 2407.01425) or forecast, or every branch forecast (what TaylorSeer does, arXiv 2503.06923). For
a placed point: its steps with polynomials and with reuse, and a solver that is fitted at as many calls of the model.
For a point that keeps tokens: the same budget on random tokens, and the same budget spread evenly over the blocks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from tc_deploy.calibrate.calibration import assemble_plan
from tc_deploy.calibrate.converged import CONVERGED
from tc_deploy.calibrate.fits import Fits
from tc_deploy.calibrate.measure import own_arguments, with_steps
from tc_deploy.errors import ExportError, ModelError, counted
from tc_deploy.models.family import DiffusionTransformer
from tc_deploy.models.loading import scheduler_from_config
from tc_deploy.plan import CacheRecord, OriginRecord, Plan
from tc_deploy.schedule import FULL, Schedule, full_schedule, tprr
from tc_deploy.search.built_points import PlannedPoint
from tc_deploy.search.record import Kind
from tc_deploy.tables import StepTables
from tc_deploy.tokencache.sampler import Sampling
from tc_deploy.tokencache.selection import spread_importance, token_index_from_importance
from tc_deploy.types import Attention, FloatArray, Reuse, Skip

FEWER_STEPS = (0.7, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1)
"""Shares of the steps."""
BETTER_SOLVERS = {"DPM-Solver++": "DPMSolverMultistepScheduler", "UniPC": "UniPCMultistepScheduler"}
BETTER_SOLVER_STEPS = (0.5, 0.4, 0.3, 0.25, 0.2, 0.1)
INTERVALS = (2, 3, 4, 5, 6, 8)
TAYLOR_ORDERS = (1, 2)


class Baselines:
    """Makes the baselines of one model and sampler.

    Args:
        model: the model.
        sampling: the sampler with all its steps.
        seed: of random tokens.
    """

    def __init__(self, model: DiffusionTransformer, sampling: Sampling, seed: int) -> None:
        self.model, self.sampling, self.seed = model, sampling, seed

    def full(self) -> PlannedPoint:
        """The model's own run."""
        return self._full_steps(self.sampling, "full", Kind.FULL)

    def converged(self) -> PlannedPoint | None:
        """The model's own run with four times the steps; None where the sampler cannot have so many."""
        if own_arguments(self.model, self.sampling):
            return None
        try:
            sampling = with_steps(self.model, self.sampling, CONVERGED * self.sampling.steps)
            return self._full_steps(sampling, "converged", Kind.FULL)
        except ExportError:
            return None

    def all(self) -> Iterator[PlannedPoint]:
        """Every baseline that needs no point of ours."""
        steps = self.sampling.steps
        for count in _step_counts(FEWER_STEPS, steps):
            sampling = with_steps(self.model, self.sampling, count)
            yield self._full_steps(sampling, f"{count} steps", Kind.FEWER_STEPS)
        for name, sampling in self.better_solvers(BETTER_SOLVER_STEPS):
            yield self._full_steps(sampling, name, Kind.BETTER_SOLVER)
        nothing = (0,) * len(self.model.blocks)
        for interval in (interval for interval in INTERVALS if interval < steps):
            schedule = tprr(steps=steps, phase_start=steps, cache_interval_early=interval, cache_interval_late=1)
            cache = CacheRecord(
                reuse=Reuse.BRANCH,
                attention=Attention.ALL,
                forecast_order=0,
                keep_counts=(nothing, nothing),
                skip=Skip.MODEL,
            )
            yield self.cached(schedule, cache, f"output reused, interval {interval}", Kind.SKIP_REUSE)
            for order in TAYLOR_ORDERS:
                skips = ((Skip.MODEL, "output"), (Skip.BLOCKS, "branches"))
                for skip, what in skips if self.model.family.blocks else skips[:1]:
                    forecast = cache.model_copy(update={"forecast_order": order, "skip": skip})
                    name = f"{what} forecast, order {order}, interval {interval}"
                    yield self.cached(schedule, forecast, name, Kind.SKIP_FORECAST)

    def better_solvers(self, shares: tuple[float, ...]) -> Iterator[tuple[str, Sampling]]:
        """Other solvers at these shares of the steps, by name; none where diffusers cannot make them."""
        for name, scheduler_class in BETTER_SOLVERS.items():
            better = self._better_solver(scheduler_class)
            for count in _step_counts(shares, self.sampling.steps) if better else ():
                yield f"{name}, {count} steps", dataclasses.replace(self.sampling, scheduler=better, steps=count)

    def placed_twins(self, point: PlannedPoint) -> Iterator[PlannedPoint]:
        """At a placed point's own full steps: its output forecast by a polynomial, and reused (as MeanCache does)."""
        schedule = point.plan.run_schedule()
        order = point.plan.cache.forecast_order
        name = f"at the same {schedule.full_steps} placed steps"
        yield self.cached(schedule, point.plan.cache, f"output forecast, order {order}, {name}", Kind.SKIP_FORECAST)
        reuse = point.plan.cache.model_copy(update={"forecast_order": 0})
        yield self.cached(schedule, reuse, f"output reused {name}", Kind.SKIP_REUSE)

    def fitted_solver(self, point: PlannedPoint, fits: Fits) -> PlannedPoint:
        """A solver fitted to the full run, at as many calls of the model as a placed point, evenly spaced.

        NeuralSolver's idea (arXiv 2505.21114). Between two calls every update is a sum of latents and of the last
        outputs, so all of them together are one update of a multistep solver, whose numbers are fitted.
        """
        steps, cache = self.sampling.steps, point.plan.cache
        number = point.plan.run_schedule().full_steps
        full = {round(call * steps / number) for call in range(number)}
        schedule = Schedule(variants=tuple(FULL if step in full else 1 for step in range(steps)))
        tables = fits.tables(schedule, cache)
        name = f"fitted solver, {number} calls"
        return self._point(self.sampling, schedule, cache, name, Kind.BETTER_SOLVER, None, tables, fits.seeds)

    def twins(self, point: PlannedPoint, importance: FloatArray) -> Iterator[PlannedPoint]:
        """The same budget as a point's spent otherwise; nothing where it keeps no token.

        Args:
            point: keeps tokens, chosen by ``importance``.
            importance: (T, L, N) scores.
        """
        schedule, cache, tokens = point.plan.run_schedule(), point.plan.cache, self.model.geometry.tokens
        if not cache.token_phases(schedule):
            return
        random = np.random.default_rng(self.seed).random(importance.shape, dtype=np.float32)
        yield self.cached(schedule, cache, f"{point.name}, random tokens", Kind.RANDOM_TOKENS, random)
        blocks = len(self.model.blocks)
        even = tuple(evenly(sum(counts), blocks, tokens) for counts in cache.keep_counts)
        uniform = cache.model_copy(update={"keep_counts": even})
        if uniform != cache:
            yield self.cached(schedule, uniform, f"{point.name}, uniform blocks", Kind.UNIFORM_BLOCKS, importance)

    def _better_solver(self, scheduler_class: str) -> Any:
        """A solver with the model's noise schedule; None where diffusers cannot make it of this scheduler.

        Nor of one without betas (flow matching): it would take its own defaults, and lose to them.
        """
        config = {key: value for key, value in self.sampling.scheduler.config.items() if not key.startswith("_")}
        if (
            type(self.sampling.scheduler).__name__ == scheduler_class
            or self.sampling.set_timesteps_kwargs
            or "beta_schedule" not in config
        ):
            return None
        try:
            return scheduler_from_config(scheduler_class, config, self.model.source)
        except ModelError:
            return None

    def _full_steps(self, sampling: Sampling, name: str, kind: Kind) -> PlannedPoint:
        all_tokens = (self.model.geometry.tokens,) * len(self.model.blocks)
        cache = CacheRecord(
            reuse=Reuse.BRANCH, attention=Attention.ALL, forecast_order=0, keep_counts=(all_tokens, all_tokens)
        )
        return self._point(sampling, full_schedule(sampling.steps), cache, name, kind, None)

    def cached(
        self, schedule: Schedule, cache: CacheRecord, name: str, kind: Kind, importance: FloatArray | None = None
    ) -> PlannedPoint:
        """A plan of the model's own sampler; tokens spread evenly where nothing scores them."""
        return self._point(self.sampling, schedule, cache, name, kind, importance)

    def _point(
        self,
        sampling: Sampling,
        schedule: Schedule,
        cache: CacheRecord,
        name: str,
        kind: Kind,
        importance: FloatArray | None,
        steps: StepTables | None = None,
        fit_seeds: range = range(0),
    ) -> PlannedPoint:
        blocks, tokens = len(self.model.blocks), self.model.geometry.tokens
        if importance is None:
            importance = np.stack([spread_importance(blocks, tokens, step) for step in range(schedule.steps)])
        index = token_index_from_importance(importance, cache.keep_counts, schedule)
        origin = OriginRecord(method="baseline", seed=self.seed, settings={"kind": kind.value, "name": name})
        plan, tables = assemble_plan(
            self.model,
            sampling,
            schedule,
            cache,
            steps or StepTables.polynomial(schedule, cache.forecast_order, index),
            importance=None,
            origin=origin,
            fit_seeds=fit_seeds,
        )
        return PlannedPoint(name=name, kind=kind, plan=plan, tables=tables)


def settings_name(plan: Plan) -> str:
    """What a point of the search's space is called."""
    cache, schedule = plan.cache, plan.run_schedule()
    rule = schedule.rule
    kept = [sum(counts) / max(plan.model.blocks * plan.model.tokens, 1) for counts in cache.keep_counts]
    with_tokens = cache.token_phases(schedule)
    steps = (
        counted(schedule.full_steps, "full step")
        if rule is None
        else f"K=({rule.cache_interval_early}, {rule.cache_interval_late}), phase start {rule.phase_start}"
    )
    parts = [f"{steps}, order {cache.forecast_order}"]
    if with_tokens:
        parts.append(f"keep {kept[0]:.3g}/{kept[1]:.3g}, attention {cache.attention}")
    if not all(cache.skips_model(phase) for phase in plan.phases_used()):
        parts.append(f"reuse {cache.reuse}")
    if plan.forecast is not None:
        parts.append("fitted")
    if cache.skip is Skip.BLOCKS and with_tokens != plan.phases_used():
        parts.append("blocks skipped")
    return ", ".join(parts)


def _step_counts(shares: tuple[float, ...], steps: int) -> tuple[int, ...]:
    return tuple(dict.fromkeys(count for share in shares if 0 < (count := round(share * steps)) < steps))


def evenly(total: int, blocks: int, tokens: int) -> tuple[int, ...]:
    """Keep counts that differ by one at most and add up to ``total``."""
    base, left = divmod(min(total, blocks * tokens), blocks)
    return tuple(base + (block < left) for block in range(blocks))
