"""Fitted forecasts: the least squares that they claim to be, better on unseen seeds, the same bytes every time."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from tc_deploy.calibrate import fitting
from tc_deploy.calibrate.fitting import RIDGE, Fitter, fit_forecast, own_runs
from tc_deploy.calibrate.recipe import LEAST_FIT_SAMPLES
from tc_deploy.errors import NotFiniteError, UsageError
from tc_deploy.models.family import DiffusionTransformer
from tc_deploy.models.loading import load_model
from tc_deploy.models.solver import read_solver
from tc_deploy.plan import CacheRecord
from tc_deploy.planned.prompts import draw_batch
from tc_deploy.schedule import FULL, Schedule, tprr
from tc_deploy.tables import StepTables
from tc_deploy.tokencache.sampler import Sampling, StepFunction, TokenCachedSteps, denoise
from tc_deploy.types import Attention, FloatArray, Reuse, Skip

BLOCKS, TOKENS, SAMPLES = 3, 16, 12
NOTHING = (0,) * BLOCKS
ROUND_ROBIN = tprr(steps=12, phase_start=6, cache_interval_early=3, cache_interval_late=2)
SCHEDULERS: dict[str, Callable[[], Any]] = {
    "ddim": lambda: diffusers.DDIMScheduler(clip_sample=False),
    "euler": diffusers.EulerDiscreteScheduler,
    "dpm": lambda: diffusers.DPMSolverMultistepScheduler(timestep_spacing="trailing"),
}


def make_cache(order: int = 2, **changes: Any) -> CacheRecord:
    fields = {"keep_counts": (NOTHING, NOTHING), "skip": Skip.MODEL} | changes
    return CacheRecord(reuse=Reuse.BRANCH, attention=Attention.ALL, forecast_order=order, **fields)


def make_sampling(schedule: Schedule, scheduler: str = "ddim", guidance_scale: float | None = None) -> Sampling:
    return Sampling(
        scheduler=SCHEDULERS[scheduler](), steps=schedule.steps, guidance_scale=guidance_scale, set_timesteps_kwargs={}
    )


def fit(
    model: DiffusionTransformer,
    sampling: Sampling,
    schedule: Schedule,
    cache: CacheRecord,
    seeds: range = range(SAMPLES),
) -> FloatArray:
    return fit_forecast(model, sampling, cache, schedule, read_solver(sampling.scheduler, sampling.steps), seeds)


def is_cached(schedule: Schedule) -> NDArray[np.bool_]:
    return np.array(schedule.variants) != FULL


# ---------------------------------------------------------------------------------------------------------- what it is
@pytest.mark.parametrize("guidance_scale", [None, 3.0])
@pytest.mark.parametrize(("first", "order"), [(1, 2), (2, 1), (3, 1), (3, 2)])
def test_the_first_fit_is_least_squares_on_the_model_s_own_run(
    tiny_dit: DiffusionTransformer, first: int, order: int, guidance_scale: float | None
) -> None:
    """Until then all steps are full, so that what is wanted of the forecast is the model's own output."""
    schedule = tprr(steps=first + 1, phase_start=first - 1, cache_interval_early=1, cache_interval_late=2)
    assert schedule.variants == (*(0,) * first, 2)
    sampling = make_sampling(schedule, guidance_scale=guidance_scale)
    seen: list[NDArray[np.float64]] = []

    def forward(_: int, inputs: Mapping[str, Tensor]) -> Tensor:
        output = tiny_dit.forward(inputs)
        half = output[:, :4].double()
        if guidance_scale is not None:
            half = half[SAMPLES:] + guidance_scale * (half[:SAMPLES] - half[SAMPLES:])
        seen.insert(0, half.numpy().reshape(SAMPLES, -1))
        return output

    denoise(tiny_dit, sampling, *draw_batch(tiny_dit, sampling, range(SAMPLES)), forward)
    wanted, *before = seen
    terms = min(first, order + 1)
    columns = np.stack([output.ravel() for output in before[:terms]], axis=1)
    usual = schedule.polynomial_weights(order)[first].astype(np.float64)
    ridge = np.sqrt(RIDGE * np.square(columns).sum() / terms) * np.eye(terms)
    target = np.concatenate([wanted.ravel(), ridge @ usual[:terms]])
    expected = np.linalg.lstsq(np.concatenate([columns, ridge]), target, rcond=None)[0]
    found = fit(tiny_dit, sampling, schedule, make_cache(order))
    np.testing.assert_allclose(found[first, :terms], expected, rtol=1e-3, atol=2e-4)  # rounding of latents
    assert not found[first, terms:].any()
    assert np.abs(expected - usual[:terms]).max() > 1e-3, "the fit that is tested must be one"
    np.testing.assert_array_equal(found[:first], schedule.polynomial_weights(order)[:first])


def test_after_a_later_step_the_plan_s_latents_are_as_near_to_the_model_s_own_as_they_can_be(
    tiny_dit: DiffusionTransformer,
) -> None:
    sampling, cache = make_sampling(ROUND_ROBIN), make_cache(order=1)
    weights = fit(tiny_dit, sampling, ROUND_ROBIN, cache)
    noise, conditions = draw_batch(tiny_dit, sampling, range(SAMPLES))

    def latents_of(function: StepFunction) -> list[Tensor]:
        found: list[Tensor] = []
        denoise(tiny_dit, sampling, noise, conditions, function, lambda _, __, latents: found.append(latents))
        return found

    own = latents_of(lambda _, inputs: tiny_dit.forward(inputs))

    def error_after(step: int, weights: FloatArray) -> float:
        steps = TokenCachedSteps(tiny_dit, cache, ROUND_ROBIN, StepTables(forecast_weights=weights))
        return float((latents_of(steps)[step] - own[step]).double().square().sum())

    fitted = np.flatnonzero((weights != ROUND_ROBIN.polynomial_weights(1)).any(axis=1))
    assert len(fitted) >= 3
    for step in fitted:
        for change in (0.98, 1.02):
            other = weights.copy()
            other[step, 0] *= change
            assert error_after(step, weights) < error_after(step, other), f"step {step}"


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("guidance_scale", [None, 3.0])
def test_on_unseen_seeds_it_lies_nearer_to_the_full_run_than_the_polynomial(
    tiny_dit: DiffusionTransformer, scheduler: str, guidance_scale: float | None
) -> None:
    sampling, cache = make_sampling(ROUND_ROBIN, scheduler, guidance_scale), make_cache()
    usual = StepTables.polynomial(ROUND_ROBIN, 2)
    fitted = StepTables(forecast_weights=fit(tiny_dit, sampling, ROUND_ROBIN, cache))
    noise, conditions = draw_batch(tiny_dit, sampling, range(1_000_000, 1_000_012))
    full = denoise(tiny_dit, sampling, noise, conditions, lambda _, inputs: tiny_dit.forward(inputs))
    polynomial, better = (
        float((denoise(tiny_dit, sampling, noise, conditions, steps) - full).double().square().mean())
        for steps in (TokenCachedSteps(tiny_dit, cache, ROUND_ROBIN, tables) for tables in (usual, fitted))
    )
    assert better < 0.9 * polynomial


# ---------------------------------------------------------------------------------------------------- what it leaves
def test_full_steps_and_full_steps_that_have_not_run_have_no_weight(tiny_dit: DiffusionTransformer) -> None:
    found = fit(tiny_dit, make_sampling(ROUND_ROBIN), ROUND_ROBIN, make_cache())
    cached = is_cached(ROUND_ROBIN)
    np.testing.assert_array_equal(found[~cached], ROUND_ROBIN.polynomial_weights(2)[~cached])
    assert not found[:3, 1:].any()
    assert not found[:6, 2:].any()
    assert found.dtype == np.float32


# -------------------------------------------------------------------------------------------------- many alike
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_run_that_goes_on_from_another_one_is_the_run_from_the_start_in_fewer_calls(
    tiny_dit: DiffusionTransformer, scheduler: str
) -> None:
    sampling = make_sampling(ROUND_ROBIN, scheduler, guidance_scale=2.0)
    own = own_runs(tiny_dit, sampling, range(4))
    solver = read_solver(sampling.scheduler, sampling.steps)
    fitter, other = (Fitter(tiny_dit, sampling, solver, 2, own, judges=2) for _ in range(2))
    first = fitter(ROUND_ROBIN)
    changed = Schedule(variants=(*ROUND_ROBIN.variants[:-2], 1, 0))
    assert (ROUND_ROBIN.variants[-2:], changed.variants[-2:]) == ((0, 2), (1, 0))
    calls = fitter.calls
    short, whole = fitter(changed, first), other(changed)
    assert fitter.calls - calls == 1
    assert other.calls == changed.full_steps
    np.testing.assert_array_equal(short.weights, whole.weights)
    assert torch.equal(short.latents, whole.latents)


def test_what_judges_is_not_fitted_on(tiny_dit: DiffusionTransformer) -> None:
    sampling = make_sampling(ROUND_ROBIN)
    own = own_runs(tiny_dit, sampling, range(6))
    solver = read_solver(sampling.scheduler, sampling.steps)
    fitter = Fitter(tiny_dit, sampling, solver, 1, own, judges=3)
    assert (fitter.learn.tolist(), fitter.judge.tolist()) == ([0, 1, 3, 4], [2, 5])
    expected = fitter(ROUND_ROBIN).weights
    own.latents[:, fitter.judge] = torch.randn_like(own.latents[:, fitter.judge])
    np.testing.assert_array_equal(fitter(ROUND_ROBIN).weights, expected)


# ------------------------------------------------------------------------------------------------------- same bytes
def test_the_same_seeds_give_the_same_bytes_and_others_do_not(tiny_dit: DiffusionTransformer) -> None:
    sampling, cache = make_sampling(ROUND_ROBIN, guidance_scale=2.0), make_cache()
    first, again, other = (
        fit(tiny_dit, sampling, ROUND_ROBIN, cache, seeds)
        for seeds in (range(SAMPLES), range(SAMPLES), range(SAMPLES, 2 * SAMPLES))
    )
    assert first.tobytes() == again.tobytes()
    assert first.tobytes() != other.tobytes()


@pytest.mark.parametrize("guidance_scale", [None, 2.0])
def test_samples_that_run_in_other_batches_fit_the_same(
    tiny_dit: DiffusionTransformer, monkeypatch: pytest.MonkeyPatch, guidance_scale: float | None
) -> None:
    sampling, cache = make_sampling(ROUND_ROBIN, guidance_scale=guidance_scale), make_cache()
    found = fit(tiny_dit, sampling, ROUND_ROBIN, cache)
    monkeypatch.setattr(fitting, "BATCH", 5)
    np.testing.assert_allclose(fit(tiny_dit, sampling, ROUND_ROBIN, cache), found, rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------------------------------------------------------ mistakes
@pytest.mark.parametrize(
    "cache",
    [
        make_cache(order=0),
        make_cache(skip=Skip.BLOCKS),
        make_cache(keep_counts=((0, 0, TOKENS), (TOKENS, 0, 0))),
        make_cache(keep_counts=(NOTHING, (0, 4, TOKENS))),
    ],
    ids=["reuse", "blocks skipped", "tokens kept in both phases", "tokens kept in one"],
)
def test_a_plan_with_nothing_to_fit_is_refused(tiny_dit: DiffusionTransformer, cache: CacheRecord) -> None:
    with pytest.raises(
        UsageError, match="nothing can be fitted, as not every cached step of this plan skips the model"
    ):
        fit(tiny_dit, make_sampling(ROUND_ROBIN), ROUND_ROBIN, cache)


def test_a_schedule_of_full_steps_has_nothing_to_fit(tiny_dit: DiffusionTransformer) -> None:
    schedule = tprr(steps=4, phase_start=2, cache_interval_early=1, cache_interval_late=1)
    with pytest.raises(UsageError, match="nothing can be fitted"):
        fit(tiny_dit, make_sampling(schedule), schedule, make_cache())


def test_too_few_samples_are_refused_with_how_many_are_needed(tiny_dit: DiffusionTransformer) -> None:
    with pytest.raises(
        UsageError, match=rf"at least {LEAST_FIT_SAMPLES} samples .*found {LEAST_FIT_SAMPLES - 1}; 32 are usual"
    ):
        fit(tiny_dit, make_sampling(ROUND_ROBIN), ROUND_ROBIN, make_cache(), range(LEAST_FIT_SAMPLES - 1))
    fit(tiny_dit, make_sampling(ROUND_ROBIN), ROUND_ROBIN, make_cache(), range(LEAST_FIT_SAMPLES))


def test_a_run_that_is_not_finite_ends_the_fit(save_dit: Callable[..., Path], tmp_path: Path) -> None:
    model = load_model(save_dit(tmp_path / "dit"))
    with torch.no_grad():
        model.module.proj_out_2.bias[0] = torch.nan
    with pytest.raises(NotFiniteError, match="the model's own run is not finite from step 0 on"):
        fit(model, make_sampling(ROUND_ROBIN), ROUND_ROBIN, make_cache())


def test_a_model_that_gives_nothing_keeps_the_polynomial(save_dit: Callable[..., Path], tmp_path: Path) -> None:
    def edit(module: Any) -> None:
        module.proj_out_2.weight.zero_()
        module.proj_out_2.bias.zero_()

    model = load_model(save_dit(tmp_path / "dit", edit=edit))
    found = fit(model, make_sampling(ROUND_ROBIN), ROUND_ROBIN, make_cache())
    np.testing.assert_array_equal(found, ROUND_ROBIN.polynomial_weights(2))
