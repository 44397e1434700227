"""Baselines are what they are called: a better solver of the model's own noise schedule, or none."""

from typing import Any

import diffusers
import pytest

from tc_deploy.models.family import DiffusionTransformer
from tc_deploy.search.baselines import Baselines
from tc_deploy.search.record import Kind
from tc_deploy.tokencache.sampler import Sampling


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        (diffusers.DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False), True),
        (diffusers.DPMSolverMultistepScheduler(), False),
        (diffusers.FlowMatchEulerDiscreteScheduler(), False),
    ],
    ids=["ddim", "already", "no-betas"],
)
def test_the_better_solver_has_the_models_own_betas(
    tiny_dit: DiffusionTransformer, scheduler: Any, *, expected: bool
) -> None:
    sampling = Sampling(scheduler=scheduler, steps=6, guidance_scale=None, set_timesteps_kwargs={})
    better = [point for point in Baselines(tiny_dit, sampling, 0).all() if point.kind is Kind.BETTER_SOLVER]
    assert bool(better) == expected
    for point in better:
        assert point.plan.sampling.scheduler_config["beta_schedule"] == "scaled_linear"
