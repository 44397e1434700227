"""Fits towards a run of more steps: its latents at the plan's places, the least squares, nearer on unseen seeds."""

import dataclasses
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from tc_deploy.calibrate import fitting
from tc_deploy.calibrate.converged import CONVERGED, converged_runs, converged_sampling, latents_at
from tc_deploy.calibrate.fitting import SOLVER_RIDGE, FittedRun, Fitter, OwnRuns, own_runs
from tc_deploy.errors import NotFiniteError, UsageError
from tc_deploy.models.family import DiffusionTransformer
from tc_deploy.models.solver import read_solver
from tc_deploy.plan import CacheRecord
from tc_deploy.planned.prompts import draw_batch
from tc_deploy.schedule import Schedule, tprr
from tc_deploy.tables import StepTables
from tc_deploy.tokencache.sampler import Sampling, TokenCachedSteps, denoise
from tc_deploy.types import Attention, FloatArray, Reuse, Skip

STEPS, SAMPLES = 6, 8
ROBIN = tprr(steps=STEPS, phase_start=STEPS, cache_interval_early=2, cache_interval_late=1)
CACHE = CacheRecord(
    reuse=Reuse.BRANCH, attention=Attention.ALL, forecast_order=2, keep_counts=((0,) * 3, (0,) * 3), skip=Skip.MODEL
)
SCHEDULERS: dict[str, Callable[[], Any]] = {
    "ddim": lambda: diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing"),
    "ddim, leading": lambda: diffusers.DDIMScheduler(clip_sample=False),
    "euler": diffusers.EulerDiscreteScheduler,
    "dpm": lambda: diffusers.DPMSolverMultistepScheduler(timestep_spacing="trailing"),
}


def make_sampling(scheduler: str = "ddim", guidance_scale: float | None = None, **arguments: Any) -> Sampling:
    return Sampling(
        scheduler=SCHEDULERS[scheduler](), steps=STEPS, guidance_scale=guidance_scale, set_timesteps_kwargs=arguments
    )


def fitted(model: DiffusionTransformer, sampling: Sampling, schedule: Schedule = ROBIN) -> tuple[OwnRuns, FittedRun]:
    """Towards the converged run."""
    solver, more = read_solver(sampling.scheduler, STEPS), converged_sampling(model, sampling)
    own = converged_runs(model, sampling, solver, more, range(SAMPLES))
    return own, Fitter(model, sampling, solver, 2, own, fits_solver=True)(schedule)


def full_run(model: DiffusionTransformer, sampling: Sampling, noise: Tensor, conditions: dict[str, Tensor]) -> Tensor:
    return denoise(model, sampling, noise, conditions, lambda _, inputs: model.forward(inputs))


# ---------------------------------------------------------------------------------------------------- where it passes
def test_where_the_run_of_more_steps_has_the_plan_s_timesteps_its_latents_are_taken_as_they_are(
    tiny_dit: DiffusionTransformer,
) -> None:
    sampling = make_sampling()
    more = dataclasses.replace(sampling, steps=CONVERGED * STEPS)
    every = own_runs(tiny_dit, more, range(3)).latents
    found = converged_runs(tiny_dit, sampling, read_solver(sampling.scheduler, STEPS), more, range(3)).latents
    # Trailing timesteps: every fourth is the plan's.
    torch.testing.assert_close(found[1:], every[CONVERGED::CONVERGED])
    torch.testing.assert_close(found[0], every[0])


def test_between_two_timesteps_latents_lie_on_the_line() -> None:
    latents = torch.tensor([[8.0], [4.0], [2.0], [1.0]])
    timesteps, wanted = np.array([900, 500, 100], np.float32), np.array([950, 900, 700, 100, 50], np.float32)
    found = latents_at(latents, timesteps, wanted)
    assert found.flatten().tolist() == [8.0, 8.0, 6.0, 2.0, 2.0, 1.0]


def test_a_plan_s_run_starts_from_its_own_noise(tiny_dit: DiffusionTransformer) -> None:
    sampling = make_sampling("euler")
    own, _ = fitted(tiny_dit, sampling)
    noise, _ = draw_batch(tiny_dit, sampling, range(SAMPLES))
    torch.testing.assert_close(own.latents[0], noise * sampling.fresh_scheduler().init_noise_sigma)


# ---------------------------------------------------------------------------------------------------------- the fit
def test_the_first_step_s_fit_is_least_squares_on_noise_and_output(tiny_dit: DiffusionTransformer) -> None:
    sampling = make_sampling()
    own, run = fitted(tiny_dit, sampling)
    noise, conditions = draw_batch(tiny_dit, sampling, range(SAMPLES))
    outputs: list[Tensor] = []

    def forward(_: int, inputs: Any) -> Tensor:
        outputs.append(tiny_dit.forward(inputs))
        return outputs[-1]

    denoise(tiny_dit, sampling, noise, conditions, forward)
    usual = read_solver(sampling.scheduler, STEPS).coefficients[0].astype(np.float64)
    columns = np.stack([noise.double().numpy().ravel(), outputs[0][:, :4].double().numpy().ravel()], axis=1)
    ridge = np.sqrt(SOLVER_RIDGE * np.square(columns).sum() / 2) * np.eye(2)
    wanted = np.concatenate([own.latents[1].double().numpy().ravel(), ridge @ usual])
    expected = np.linalg.lstsq(np.concatenate([columns, ridge]), wanted, rcond=None)[0]
    # Of the latents: these, those before; of the outputs likewise.
    np.testing.assert_allclose(run.coefficients[0], [expected[0], 0, expected[1], 0], rtol=1e-3, atol=1e-4)
    assert np.abs(expected - usual).max() > 1e-3, "the fit that is tested must be one"


def test_but_for_the_ridge_no_number_of_a_step_can_be_changed_to_come_nearer(
    tiny_dit: DiffusionTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the converged run's latents after that step, in the run that diffusers' outputs and the tables make."""
    monkeypatch.setattr(fitting, "SOLVER_RIDGE", 1e-7)
    sampling = make_sampling()
    own, run = fitted(tiny_dit, sampling)
    noise, conditions = draw_batch(tiny_dit, sampling, range(SAMPLES))

    def error_after(step: int, weights: FloatArray, coefficients: FloatArray) -> float:
        tables, found = StepTables(forecast_weights=weights, solver_coefficients=coefficients), list[Tensor]()
        steps = TokenCachedSteps(tiny_dit, CACHE, ROBIN, tables)
        denoise(tiny_dit, sampling.under(tables), noise, conditions, steps, lambda _, __, after: found.append(after))
        return float((found[step] - own.latents[step + 1]).double().square().sum())

    tried = 0
    for step, name, column in ((2, "c", 0), (2, "c", 2), (2, "c", 3), (3, "c", 0), (3, "w", 0), (3, "w", 1)):
        least = error_after(step, run.weights, run.coefficients)
        for change in (0.97, 1.03):
            weights, coefficients = run.weights.copy(), run.coefficients.copy()
            table = weights if name == "w" else coefficients
            assert table[step, column]
            table[step, column] *= change
            assert error_after(step, weights, coefficients) > least, (step, name, column)
            tried += 1
    assert tried == 12


@pytest.mark.parametrize(("scheduler", "guidance_scale"), [*((name, None) for name in SCHEDULERS), ("ddim", 3.0)])
def test_on_unseen_seeds_it_ends_nearer_to_the_converged_run_than_a_fit_towards_the_full_one(
    tiny_dit: DiffusionTransformer, scheduler: str, guidance_scale: float | None
) -> None:
    sampling = make_sampling(scheduler, guidance_scale)
    _, run = fitted(tiny_dit, sampling)
    usual = Fitter(
        tiny_dit, sampling, read_solver(sampling.scheduler, STEPS), 2, own_runs(tiny_dit, sampling, range(SAMPLES))
    )(ROBIN)
    noise, conditions = draw_batch(tiny_dit, sampling, range(1_000_000, 1_000_008))
    more = dataclasses.replace(sampling, steps=CONVERGED * STEPS)
    exact = full_run(tiny_dit, more, noise, conditions)
    ours = StepTables(forecast_weights=run.weights, solver_coefficients=run.coefficients)
    theirs = StepTables(forecast_weights=usual.weights)
    better, worse = (
        float((denoise(tiny_dit, sampling.under(each), noise, conditions, steps) - exact).double().square().mean())
        for each in (ours, theirs)
        for steps in [TokenCachedSteps(tiny_dit, CACHE, ROBIN, each)]
    )
    assert better < 0.8 * worse


def test_a_fit_goes_on_from_another_one_with_its_solver(tiny_dit: DiffusionTransformer) -> None:
    sampling = make_sampling()
    own, first = fitted(tiny_dit, sampling)
    other = Schedule(variants=(*ROBIN.variants[:-1], 0))
    fitter = Fitter(tiny_dit, sampling, read_solver(sampling.scheduler, STEPS), 2, own, fits_solver=True)
    short, whole = fitter(other, first), fitter(other)
    np.testing.assert_array_equal(short.coefficients, whole.coefficients)
    np.testing.assert_array_equal(short.weights, whole.weights)


# ------------------------------------------------------------------------------------------------------------ mistakes
def test_more_steps_than_the_scheduler_takes_are_refused_with_how_many_it_may_be(
    tiny_dit: DiffusionTransformer,
) -> None:
    sampling = dataclasses.replace(make_sampling(), steps=300)
    with pytest.raises(UsageError, match=r"converged run has 1200 steps, 4 times .* DDIMScheduler .*at most 250 steps"):
        converged_sampling(tiny_dit, sampling)


def test_steps_that_are_listed_one_by_one_are_refused(tiny_dit: DiffusionTransformer) -> None:
    listed = make_sampling("euler", timesteps=[900, 700, 500, 400, 300, 100])
    with pytest.raises(UsageError, match="timesteps lists only the plan's; leave timesteps out, or --target full"):
        converged_sampling(tiny_dit, listed)


def test_an_output_that_is_not_finite_ends_the_fit_at_its_step(
    tiny_dit: DiffusionTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = make_sampling()
    own, _ = fitted(tiny_dit, sampling)
    fitter = Fitter(tiny_dit, sampling, read_solver(sampling.scheduler, STEPS), 2, own, fits_solver=True)
    usual = fitter._output
    monkeypatch.setattr(fitter, "_output", lambda step, latents: usual(step, latents) * (torch.nan if step == 4 else 1))
    with pytest.raises(NotFiniteError, match="the plan's run is not finite from step 4 on"):
        fitter(ROBIN)
