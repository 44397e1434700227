"""Baselines are what they are called: a better solver of the model's own noise schedule, or none."""

from typing import Any

import diffusers
import pytest

from tc_deploy.models.family import DiffusionTransformer
from tc_deploy.plan import CacheRecord
from tc_deploy.schedule import Schedule
from tc_deploy.search.baselines import Baselines
from tc_deploy.search.record import Kind
from tc_deploy.tokencache.sampler import Sampling
from tc_deploy.types import Attention, Reuse, Skip


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        (diffusers.DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False), True),
        (diffusers.FlowMatchEulerDiscreteScheduler(), False),
    ],
    ids=["ddim", "no-betas"],
)
def test_the_better_solver_has_the_models_own_betas(
    tiny_dit: DiffusionTransformer, scheduler: Any, *, expected: bool
) -> None:
    sampling = Sampling(scheduler=scheduler, steps=6, guidance_scale=None, set_timesteps_kwargs={})
    better = [point for point in Baselines(tiny_dit, sampling, 0).all() if point.kind is Kind.BETTER_SOLVER]
    assert {point.name.partition(",")[0] for point in better} == ({"DPM-Solver++", "UniPC"} if expected else set())
    for point in better:
        assert point.plan.sampling.scheduler_config["beta_schedule"] == "scaled_linear"


def test_the_model_s_own_solver_is_not_a_better_one(tiny_dit: DiffusionTransformer) -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler()
    sampling = Sampling(scheduler=scheduler, steps=6, guidance_scale=None, set_timesteps_kwargs={})
    names = {name.partition(",")[0] for name, _ in Baselines(tiny_dit, sampling, 0).better_solvers((0.5,))}
    assert names == {"UniPC"}


def test_a_placed_plan_s_own_steps_are_tried_with_a_polynomial_and_with_reuse(tiny_dit: DiffusionTransformer) -> None:
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    sampling = Sampling(scheduler=scheduler, steps=6, guidance_scale=None, set_timesteps_kwargs={})
    baselines, nothing = Baselines(tiny_dit, sampling, 0), (0,) * 3
    cache = CacheRecord(
        reuse=Reuse.BRANCH,
        attention=Attention.ALL,
        forecast_order=2,
        keep_counts=(nothing, nothing),
        skip=Skip.MODEL,
    )
    ours = baselines.cached(Schedule(variants=(0, 1, 0, 0, 1, 1)), cache, "ours", Kind.TOKEN_CACHE)
    forecast, reused = baselines.placed_twins(ours)
    assert [point.plan.run_schedule() for point in (forecast, reused)] == [ours.plan.run_schedule()] * 2
    assert [point.plan.cache.forecast_order for point in (forecast, reused)] == [2, 0]
    assert [point.plan.forecast for point in (forecast, reused)] == [None, None]
