"""Forecast weights fitted by least squares on the model's own sampling runs, in the place of a polynomial's.

In: a model, a sampler, a plan's cache settings, schedule and tables. Out: the plan's forecast weights, (T, r + 1).
Two runs start from the same noise: the model's own, and the plan's. Before each cached step that skips the model, the
weights are chosen with which the plan's next latents lie nearest to the model's own. The plan's run goes on with them,
so later steps mend what earlier ones left. The idea of weights that are fitted, step by step, on a few trajectories is
L2P's (arXiv 2604.26365); that they are fitted on the plan's own states, towards the next latents, is this project's.

A step that computes tokens forecasts many tensors, not one output: it keeps the polynomial. Never: sees a seed that a
plan is judged on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tc_deploy.calibrate.recipe import LEAST_FIT_SAMPLES
from tc_deploy.errors import UsageError
from tc_deploy.models.family import DiffusionTransformer
from tc_deploy.models.solver import SolverTable
from tc_deploy.plan import CacheRecord
from tc_deploy.planned.prompts import draw_batch
from tc_deploy.schedule import PHASES, Schedule
from tc_deploy.tables import StepTables
from tc_deploy.tokencache.forward import OUTPUT, cached_tensors
from tc_deploy.tokencache.sampler import (
    OWN_REMEDY,
    PLAN_REMEDY,
    Sampling,
    StepFunction,
    TokenCachedSteps,
    denoise,
    finite_steps,
    guided_output,
)
from tc_deploy.types import FloatArray

HELD_OUT = 4
"""Every fourth sample is not fitted on: it judges how many full steps a forecast combines, and whether to fit any."""
RIDGE = 1e-6
"""Of the normal equations' mean diagonal: neighbouring outputs are alike, and the equations nearly singular."""
BATCH = 16
"""Samples that run together."""
DoubleArray: TypeAlias = NDArray[np.float64]


def fitted_phases(cache: CacheRecord, schedule: Schedule) -> tuple[int, ...]:
    """The phases whose cached steps have weights that can be fitted: those that skip the model, and extrapolate."""
    phases = (phase for phase in PHASES if cache.skips_model(phase) and schedule.cached_steps(phase))
    return tuple(phases) if cache.forecast_order else ()


def fit_forecast(
    model: DiffusionTransformer,
    sampling: Sampling,
    cache: CacheRecord,
    schedule: Schedule,
    tables: StepTables,
    solver: SolverTable,
    seeds: Sequence[int],
    on_step: Callable[[int], None] = lambda step: None,
) -> FloatArray:
    """Fit the weights of every cached step that skips the model.

    Args:
        model: the model.
        sampling: the sampler with all its steps.
        cache: keep counts, reuse, attention, forecast order r.
        schedule: which steps are full.
        tables: the tokens of cached steps that compute some, and the weights that those keep which are not fitted.
        solver: the sampler as a table.
        seeds: one sample each, none of which the plan is judged on.
        on_step: told how many steps are done of 2 T: of the model's own run, then of the plan's.

    Returns:
        (T, r + 1) weights; the same arguments give the same bytes on one machine.

    Raises:
        UsageError: no step can be fitted, or there are fewer than eight samples.
        NotFiniteError: a run comes to values that are not finite; names whose, and the step.
    """
    phases = fitted_phases(cache, schedule)
    if not phases:
        raise UsageError(
            "forecast.fit_samples: nothing can be fitted, as no cached step of this plan skips the model and"
            " extrapolates; keep nothing in a phase, with skip = model and forecast_order 1 or 2, or leave it out"
        )
    if len(seeds) < LEAST_FIT_SAMPLES:
        raise UsageError(
            f"to fit forecasts: expected at least {LEAST_FIT_SAMPLES} samples to fit {cache.forecast_order + 1} weights"
            f" a step, {HELD_OUT - 1} of {HELD_OUT} to fit and the others to judge by, found {len(seeds)}; 32 are usual"
        )
    noise, conditions = draw_batch(model, sampling, seeds)
    own: dict[int, Tensor] = {}
    check = finite_steps(f"{model.source}: the model's own run", sampling.steps, OWN_REMEDY)

    def keep(step: int, inputs: Mapping[str, Tensor], latents: Tensor) -> None:
        check(step, inputs, latents)
        if schedule.variants[step] in phases:
            own[step] = latents
        on_step(step + 1)

    batches = -(-len(seeds) // BATCH)
    model_alone = _in_batches([lambda _, inputs: model.forward(inputs)] * batches, len(seeds))
    denoise(model, sampling, noise, conditions, model_alone, keep)
    plan = _PlanRun(
        [TokenCachedSteps(model, cache, schedule, tables) for _ in range(batches)],
        tables.forecast_weights.copy(),
        solver,
        sampling.guidance_scale,
        noise * solver.init_noise_sigma,
        own,
    )
    check = finite_steps(f"{model.source}: the plan's run", sampling.steps, PLAN_REMEDY)

    def go_on(step: int, inputs: Mapping[str, Tensor], latents: Tensor) -> None:
        check(step, inputs, latents)
        plan.latents.insert(0, latents)
        on_step(sampling.steps + step + 1)

    denoise(model, sampling, noise, conditions, plan.step, go_on)
    return plan.weights


class _PlanRun:
    """The plan's run of all samples, whose weights are fitted on the way.

    Args:
        runs: the plan's steps, of one batch each.
        weights: (T, r + 1), written as they are fitted.
        solver: the sampler as a table.
        guidance_scale: None without guidance.
        latents: (B, ...) before the first step.
        own: by step that is fitted, the latents (B, ...) after it in the model's own run.
    """

    def __init__(
        self,
        runs: Sequence[TokenCachedSteps],
        weights: FloatArray,
        solver: SolverTable,
        guidance_scale: float | None,
        latents: Tensor,
        own: Mapping[int, Tensor],
    ) -> None:
        self.runs, self.weights, self.solver, self.guidance_scale, self.own = runs, weights, solver, guidance_scale, own
        self.latents, self.outputs = [latents], list[Tensor]()
        """Of the steps before, latest first; of outputs, those that the solver is given."""
        self._run_all = _in_batches(runs, len(latents))
        first = runs[0]
        phases = [phase for phase in PHASES if first.schedule.cached_steps(phase)]
        self._read = set(cached_tensors(first.model, first.cache, phases))

    def step(self, step: int, inputs: Mapping[str, Tensor]) -> Tensor:
        """Run a step; one that is to be fitted is fitted before."""
        if step in self.own:
            row = self._fitted(step)
            self.weights[step] = row
            for run in self.runs:
                run.weights[step] = torch.from_numpy(row)
        output = self._run_all(step, inputs)
        for run in self.runs:
            # Of a large model the whole cache of all samples would not fit into memory.
            run.history[0] = {name: tensor for name, tensor in run.history[0].items() if name in self._read}
        history = self.solver.history
        self.latents, self.outputs = self.latents[: history + 1], [self._guided(output), *self.outputs][: history + 1]
        return output

    def _guided(self, output: Tensor) -> Tensor:
        return guided_output(output[:, : self.latents[0].shape[1]], self.guidance_scale)

    def _fitted(self, step: int) -> FloatArray:
        """The best of the fits to 1, 2, ... full steps and of the polynomial, by the samples that are held out."""
        usual = self.weights[step].astype(np.float64)
        of_latents, of_outputs = np.split(self.solver.coefficients[step].astype(np.float64), 2)
        past = zip(of_latents, self.latents, strict=False), zip(of_outputs[1:], self.outputs, strict=False)
        known = sum(coefficient * _array(values) for pairs in past for coefficient, values in pairs)
        missing = _array(self.own[step]) - known
        ages = range(len(self.runs[0].history))
        outputs = [_joined([run.history[age][OUTPUT] for run in self.runs], len(missing)) for age in ages]
        # What one unit of each weight adds to the next latents.
        columns = np.stack([of_outputs[0] * _array(self._guided(output)) for output in outputs], axis=-1)
        judge = np.arange(len(missing)) % HELD_OUT == HELD_OUT - 1
        candidates = [usual]
        for terms in range(1, len(outputs) + 1):
            weights = least_squares(columns[~judge][..., :terms].reshape(-1, terms), missing[~judge].ravel())
            candidates.append(np.pad(weights, (0, len(usual) - terms)))
        errors = [np.square(columns[judge] @ weights[: len(outputs)] - missing[judge]).sum() for weights in candidates]
        best: FloatArray = candidates[int(np.argmin(errors))].astype(np.float32)
        return best


def least_squares(columns: DoubleArray, wanted: DoubleArray) -> DoubleArray:
    """The weights (terms,) of columns (n, terms) whose sum lies nearest to what is wanted (n,), with a slight ridge."""
    gram = columns.T @ columns
    ridge = RIDGE * gram.diagonal().mean() * np.eye(len(gram))
    # Not solve: where all outputs are zero, so are the equations.
    return np.asarray(np.linalg.lstsq(gram + ridge, columns.T @ wanted, rcond=None)[0], np.float64)


def _in_batches(runs: Sequence[StepFunction], samples: int) -> StepFunction:
    """A step of all samples as one step of each batch, whose rows hold both halves of guidance."""

    def step(step: int, inputs: Mapping[str, Tensor]) -> Tensor:
        parts = {name: _batches(values, samples) for name, values in inputs.items()}
        outputs = [run(step, {name: part[batch] for name, part in parts.items()}) for batch, run in enumerate(runs)]
        return _joined(outputs, samples)

    return step


def _batches(rows: Tensor, samples: int) -> list[Tensor]:
    """(B or 2B, ...) of all samples to that of each batch."""
    halves = [torch.split(half, BATCH) for half in torch.split(rows, samples)]
    return [torch.cat(parts) for parts in zip(*halves, strict=True)]


def _joined(batches: Sequence[Tensor], samples: int) -> Tensor:
    """The reverse."""
    halves = sum(map(len, batches)) // samples
    return torch.cat([torch.cat(parts) for parts in zip(*(rows.chunk(halves) for rows in batches), strict=True)])


def _array(values: Tensor) -> DoubleArray:
    return np.asarray(values.cpu().double().numpy())
