"""Forecast weights fitted by least squares on the model's own sampling runs, in the place of a polynomial's.

In: a model, a sampler, seeds, schedules whose cached steps all skip the model. Out: of each schedule the weights
(T, r + 1), and where its run ends. The model's own run of the seeds is made once. A plan's run starts from the same
noise, and before each cached step the weights are chosen with which its next latents lie nearest to the model's own:
the run goes on with them, so later steps mend what earlier ones left. A schedule that begins as another one did goes
on from there, so that of many alike (:mod:`tc_deploy.calibrate.placing`) none costs a whole run.

Towards a converged run (:mod:`tc_deploy.calibrate.converged`) the solver is fitted too, at full steps as well: what it
takes of the latents, of this step's output and of the last one's.

The idea of weights that are fitted, step by step, on a few trajectories is L2P's (arXiv 2604.26365); that they are
fitted on the plan's own states, towards the next latents, is this project's. Never: sees a seed that a plan is judged
on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tc_deploy.calibrate.recipe import LEAST_FIT_SAMPLES
from tc_deploy.errors import UsageError
from tc_deploy.models.family import DiffusionTransformer
from tc_deploy.models.solver import DoubleArray, SolverTable
from tc_deploy.plan import CacheRecord
from tc_deploy.planned.prompts import draw_batch
from tc_deploy.schedule import FULL, PHASES, Schedule
from tc_deploy.tokencache.sampler import (
    OWN_REMEDY,
    PLAN_REMEDY,
    Sampling,
    denoise,
    device_of,
    finite_steps,
    model_batch,
)
from tc_deploy.types import FitTarget, FloatArray

RIDGE = 1e-5
"""Towards the polynomial, of the normal equations' mean diagonal: neighbouring outputs are alike, and the equations
nearly singular."""
SOLVER_RIDGE = 1e-4
"""The same where the solver is fitted too: the converged run cannot be come so near to that more freedom would help."""
FITTED_HISTORY = 1
"""A fitted solver looks back so far, at least: on the digits the last output is worth 1.8 dB, those before nothing."""
BATCH = 16
"""Samples that run together."""


def can_be_fitted(cache: CacheRecord, schedule: Schedule) -> bool:
    """Whether every cached step skips the model, and extrapolates: other steps forecast many tensors, not one."""
    phases = [phase for phase in PHASES if schedule.cached_steps(phase)]
    return bool(phases) and cache.forecast_order > 0 and all(map(cache.skips_model, phases))


def check_fit(cache: CacheRecord, schedule: Schedule, samples: int, target: FitTarget = FitTarget.FULL) -> None:
    """Check that weights can be fitted.

    Raises:
        UsageError: no, or on too few samples.
    """
    if not can_be_fitted(cache, schedule):
        raise UsageError(
            "forecast.fit_samples: nothing can be fitted, as not every cached step of this plan skips the model and"
            " extrapolates; keep no tokens, with skip = model and forecast_order 1 or 2, or leave it out"
        )
    if samples < LEAST_FIT_SAMPLES:
        weights = cache.forecast_order + 1 + (target is FitTarget.CONVERGED)
        raise UsageError(
            f"to fit forecasts: expected at least {LEAST_FIT_SAMPLES} samples to fit {weights} weights a step, found"
            f" {samples}; 32 are usual"
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class OwnRuns:
    """The model's own runs of some samples, which plans are fitted to.

    Args:
        conditions: by name, (B, ...).
        latents: (T + 1, B, ...), from the noise on that the solver starts from; of a run of more steps those at the
            plan's.
    """

    conditions: Mapping[str, Tensor]
    latents: Tensor

    def first(self, samples: int) -> OwnRuns:
        """Those of the first samples."""
        conditions = {name: values[:samples] for name, values in self.conditions.items()}
        return OwnRuns(conditions=conditions, latents=self.latents[:, :samples])


def own_runs(
    model: DiffusionTransformer,
    sampling: Sampling,
    seeds: Sequence[int],
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> OwnRuns:
    """Run the model itself.

    Args:
        model: the model.
        sampling: the sampler with all its steps.
        seeds: one sample each.
        on_step: told how many steps of how many are done, of all batches.

    Raises:
        NotFiniteError: a run comes to values that are not finite; names the step.
    """
    noise, conditions = draw_batch(model, sampling, seeds)
    parts, batches = [], [slice(start, start + BATCH) for start in range(0, len(seeds), BATCH)]
    check = finite_steps(f"{model.source}: the model's own run", sampling.steps, OWN_REMEDY)
    for done, batch in enumerate(batches):
        latents = [noise[batch] * float(getattr(sampling.fresh_scheduler(), "init_noise_sigma", 1.0))]

        def keep(step: int, inputs: Mapping[str, Tensor], following: Tensor) -> None:
            check(step, inputs, following)
            latents.append(following.cpu())  # noqa: B023 - called in this turn only
            on_step(done * sampling.steps + step + 1, len(batches) * sampling.steps)  # noqa: B023

        own = {name: values[batch] for name, values in conditions.items()}
        denoise(model, sampling, noise[batch], own, lambda _, inputs: model.forward(inputs), keep)
        parts.append(torch.stack(latents))
    return OwnRuns(conditions=conditions, latents=torch.cat(parts, dim=1))


@dataclass(frozen=True, kw_only=True)
class _State:
    """Where a run stands; of each tuple the latest comes first."""

    latents: tuple[Tensor, ...]
    """x_s and the h before it."""
    outputs: tuple[Tensor, ...]
    """m_{s-1} and those before, that the solver is given."""
    cached: tuple[Tensor, ...]
    """The guided outputs of the last full steps: to forecast these is to forecast both halves of guidance."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FittedRun:
    """A schedule's run with weights of its own."""

    schedule: Schedule
    weights: FloatArray
    """(T, r + 1)"""
    coefficients: FloatArray
    """(T, 2(h + 1)), of the solver."""
    latents: Tensor
    """Where it ends, (B, ...)."""
    states: Mapping[int, _State]
    """By full step, after it."""

    def common(self, schedule: Schedule) -> int | None:
        """The last full step up to which another schedule is the same; None where that is none."""
        same = np.cumprod(np.equal(self.schedule.variants, schedule.variants))
        steps = [step for step in self.states if same[step]]
        return max(steps, default=None)


class Fitter:
    """Fits schedules of one model and sampler on the same samples.

    Args:
        model: the model.
        sampling: the sampler with all its steps.
        solver: the sampler as a table.
        order: r, the forecast order.
        own: the model's own runs.
        judges: every so many-th sample is not fitted on, so that others may be judged by it; 0: all are.
        fits_solver: fit the solver too.
    """

    def __init__(
        self,
        model: DiffusionTransformer,
        sampling: Sampling,
        solver: SolverTable,
        order: int,
        own: OwnRuns,
        judges: int = 0,
        *,
        fits_solver: bool = False,
    ) -> None:
        self.model, self.sampling, self.order, self.own, self.fits_solver = model, sampling, order, own, fits_solver
        self.solver = solver.with_history(max(solver.history, FITTED_HISTORY)) if fits_solver else solver
        samples = np.arange(own.latents.shape[1])
        judged = samples % judges == judges - 1 if judges else np.zeros(len(samples), bool)
        self.learn, self.judge = (torch.from_numpy(np.flatnonzero(chosen)) for chosen in (~judged, judged))
        self.calls = 0
        """Steps of the model so far, each of all samples."""

    @torch.no_grad()
    def __call__(
        self, schedule: Schedule, like: FittedRun | None = None, on_step: Callable[[int], None] = lambda step: None
    ) -> FittedRun:
        """Run a schedule, and fit it.

        Args:
            schedule: whose cached steps all skip the model.
            like: a run to go on from where the two part.
            on_step: told the step that is done.

        Raises:
            NotFiniteError: it comes to values that are not finite; names the step.
        """
        weights, coefficients = schedule.polynomial_weights(self.order), self.solver.coefficients.copy()
        states: dict[int, _State] = {}
        last = None if like is None else like.common(schedule)
        if like is None or last is None:
            first, state = 0, _State(latents=(self.own.latents[0],), outputs=(), cached=())
        else:
            first, state = last + 1, like.states[last]
            weights[:first], coefficients[:first] = like.weights[:first], like.coefficients[:first]
            states = {step: kept for step, kept in like.states.items() if step <= last}
        check = finite_steps(f"{self.model.source}: the plan's run", self.solver.steps, PLAN_REMEDY)
        for step in range(first, schedule.steps):
            is_full, cached = schedule.variants[step] == FULL, state.cached
            if is_full:
                output = self._output(step, state.latents[0])
                check(step, {}, output)
                cached = (output, *cached)[: self.order + 1]
                if self.fits_solver:
                    self._fit_solver(step, state, output, coefficients[step])
            else:
                self._fit_forecast(step, state, weights[step], coefficients[step])
                output = _sum(weights[step], cached)
            following = self._following(state, output, coefficients[step])
            check(step, {}, following)
            history = self.solver.history
            state = _State(
                latents=(following, *state.latents)[: history + 1],
                outputs=(output, *state.outputs)[: history + 1],
                cached=cached,
            )
            if is_full:
                states[step] = state
            on_step(step)
        return FittedRun(
            schedule=schedule, weights=weights, coefficients=coefficients, latents=state.latents[0], states=states
        )

    def _output(self, step: int, latents: Tensor) -> Tensor:
        """The model's guided output at a step, (B, ...)."""
        self.calls += 1
        device, scale = device_of(self.model), float(self.solver.input_scale[step])
        guided, parts = self.sampling.guidance_scale is not None, []
        for start in range(0, len(latents), BATCH):
            rows = latents[start : start + BATCH].to(device) * scale
            conditions = {name: values[start : start + BATCH] for name, values in self.own.conditions.items()}
            hidden_states = torch.cat([rows, rows]) if guided else rows
            timestep = torch.full((len(hidden_states),), float(self.solver.timesteps[step]), device=device)
            given = model_batch(self.model, conditions, guided=guided)
            output = self.model.forward({"hidden_states": hidden_states, "timestep": timestep, **given})
            parts.append(self.sampling.guided(output[:, : rows.shape[1]]).cpu())
        return torch.cat(parts)

    def _following(self, state: _State, output: Tensor, coefficients: FloatArray) -> Tensor:
        """The latents after a step, by its row of the solver's table."""
        of_latents, of_outputs = np.split(coefficients, 2)
        return _sum(of_latents, state.latents) + _sum(of_outputs, (output, *state.outputs))

    def _fit_forecast(self, step: int, state: _State, weights: FloatArray, coefficients: FloatArray) -> None:
        """Change a cached step's weights, and what a fitted solver takes of the latents."""
        following = self._following(state, _sum(weights, state.cached), coefficients)
        of_output = coefficients[self.solver.history + 1]
        of_latents = coefficients[:1] if self.fits_solver else coefficients[:0]
        change = self._change(step, following, of_output, [*state.latents[: len(of_latents)], *state.cached])
        of_latents += of_output * change[: len(of_latents)]
        weights[: len(state.cached)] += change[len(of_latents) :]

    def _fit_solver(self, step: int, state: _State, output: Tensor, coefficients: FloatArray) -> None:
        """Change what the solver takes of the latents and of the outputs at a full step."""
        following = self._following(state, output, coefficients)
        of_outputs = coefficients[self.solver.history + 1 :]
        outputs, of_output = (output, *state.outputs)[: len(of_outputs)], float(of_outputs[0])
        change = of_output * self._change(step, following, of_output, [state.latents[0], *outputs])
        coefficients[0] += change[0]
        of_outputs[: len(outputs)] += change[1:]

    def _change(self, step: int, following: Tensor, of_output: float, values: Sequence[Tensor]) -> DoubleArray:
        """How much more of each value, times what the solver takes of an output, lies nearest to what is wanted."""
        missing = _rows(self.own.latents[step + 1] - following, self.learn)
        columns = np.stack([of_output * _rows(value, self.learn) for value in values], axis=1)
        gram = columns.T @ columns
        ridge = (SOLVER_RIDGE if self.fits_solver else RIDGE) * gram.diagonal().mean() * np.eye(len(gram))
        # Not solve: where all values are zero, so are the equations.
        change: DoubleArray = np.linalg.lstsq(gram + ridge, columns.T @ missing, rcond=None)[0]
        return change


def fit_forecast(
    model: DiffusionTransformer,
    sampling: Sampling,
    cache: CacheRecord,
    schedule: Schedule,
    solver: SolverTable,
    seeds: Sequence[int],
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> FloatArray:
    """Fit the weights of one schedule.

    Args:
        model: the model.
        sampling: the sampler with all its steps.
        cache: skips the model at cached steps; gives the forecast order r.
        schedule: which steps are full.
        solver: the sampler as a table.
        seeds: one sample each, none of which the plan is judged on.
        on_step: told how many steps of how many are done.

    Returns:
        (T, r + 1) weights; the same arguments give the same bytes on one machine.

    Raises:
        UsageError: there is nothing to fit, or there are too few samples.
        NotFiniteError: a run comes to values that are not finite; names whose, and the step.
    """
    check_fit(cache, schedule, len(seeds))
    own = own_runs(model, sampling, seeds, on_step)
    return Fitter(model, sampling, solver, cache.forecast_order, own)(schedule).weights


def _sum(weights: FloatArray, values: Sequence[Tensor]) -> Tensor:
    """Of as many as there are."""
    terms = [weight * value for weight, value in zip(weights.tolist(), values, strict=False)]
    return torch.stack(terms).sum(0) if terms else torch.zeros(())


def _rows(values: Tensor, samples: Tensor) -> DoubleArray:
    array: DoubleArray = values[samples].double().numpy().ravel()
    return array
