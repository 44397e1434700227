"""What a plan is measured against, and on which seeds."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch

from tc_deploy.calibrate.measure import BATCH, FIRST_SEED, measure
from tc_deploy.errors import NotFiniteError
from tc_deploy.models.family import DiffusionTransformer
from tc_deploy.models.loading import load_model, load_scheduler
from tc_deploy.plan import CacheRecord, MeasuredRecord
from tc_deploy.planned.prompts import draw_batch
from tc_deploy.quality.metrics import LARGEST_PSNR_DB, image_psnr_db
from tc_deploy.schedule import Schedule, full_schedule, tprr
from tc_deploy.tables import StepTables
from tc_deploy.tokencache.sampler import Sampling, denoise
from tc_deploy.types import Attention, Reuse

STEPS, TOKENS, BLOCKS = 6, 16, 3


@pytest.fixture
def sampling(tiny_dit_folder: Path) -> Sampling:
    return Sampling(
        scheduler=load_scheduler(tiny_dit_folder), steps=STEPS, guidance_scale=None, set_timesteps_kwargs={}
    )


def run(
    model: DiffusionTransformer, sampling: Sampling, schedule: Schedule, keep: int, cost: float, samples: int = 2
) -> MeasuredRecord:
    cache = CacheRecord(
        reuse=Reuse.BRANCH, attention=Attention.ALL, forecast_order=1, keep_counts=((keep,) * BLOCKS,) * 2
    )
    return measure(model, sampling, cache, schedule, StepTables.polynomial(schedule, 1), cost, samples, "of no plan")


def test_full_steps_only_are_the_full_run(tiny_dit: DiffusionTransformer, sampling: Sampling) -> None:
    measured = run(tiny_dit, sampling, full_schedule(STEPS), keep=0, cost=float(STEPS))
    assert measured.psnr_db == LARGEST_PSNR_DB
    assert measured.fewer_steps == STEPS
    assert measured.fewer_steps_psnr_db == LARGEST_PSNR_DB


def test_cached_steps_that_keep_every_token_are_the_full_run(
    tiny_dit: DiffusionTransformer, sampling: Sampling
) -> None:
    schedule = tprr(steps=STEPS, phase_start=3, cache_interval_early=3, cache_interval_late=2)
    assert run(tiny_dit, sampling, schedule, keep=TOKENS, cost=float(STEPS)).psnr_db == LARGEST_PSNR_DB


def test_caching_costs_quality_and_the_longer_interval_more(tiny_dit: DiffusionTransformer, sampling: Sampling) -> None:
    short, long = (
        run(
            tiny_dit,
            sampling,
            tprr(steps=STEPS, phase_start=STEPS, cache_interval_early=cache_interval_early, cache_interval_late=1),
            keep=0,
            cost=3.0,
        ).psnr_db
        for cache_interval_early in (2, STEPS)
    )
    assert long < short < LARGEST_PSNR_DB


@pytest.mark.parametrize(("cost", "expected"), [(0.0, 1), (0.2, 1), (2.0, 2), (2.01, 3), (5.9, 6), (6.5, 6)])
def test_fewer_steps_cost_what_the_plan_costs_rounded_up(
    tiny_dit: DiffusionTransformer, sampling: Sampling, cost: float, expected: int
) -> None:
    measured = run(tiny_dit, sampling, full_schedule(STEPS), keep=0, cost=cost, samples=1)
    assert measured.fewer_steps == expected
    assert (measured.fewer_steps_psnr_db == LARGEST_PSNR_DB) == (expected == STEPS)


def test_fewer_steps_are_the_plain_run_with_that_step_count(tiny_dit: DiffusionTransformer, sampling: Sampling) -> None:
    measured = run(tiny_dit, sampling, full_schedule(STEPS), keep=0, cost=2.0, samples=3)
    noise, conditions = draw_batch(tiny_dit, sampling, measured.seeds)

    def denoised(steps: int) -> torch.Tensor:
        plain = dataclasses.replace(sampling, steps=steps)
        return denoise(tiny_dit, plain, noise, conditions, lambda _, inputs: tiny_dit.forward(inputs))

    assert measured.fewer_steps_psnr_db == round(image_psnr_db(denoised(2), denoised(STEPS), pixels=False), 2)


def test_timesteps_that_are_listed_one_by_one_become_fewer_too(tiny_dit: DiffusionTransformer) -> None:
    listed = Sampling(
        scheduler=diffusers.EulerDiscreteScheduler(),
        steps=STEPS,
        guidance_scale=None,
        set_timesteps_kwargs={"timesteps": [900, 700, 500, 300, 100, 50]},
    )
    half = dataclasses.replace(listed, steps=3, set_timesteps_kwargs={"timesteps": [900, 500, 100]})
    measured = run(tiny_dit, listed, full_schedule(STEPS), keep=0, cost=3.0, samples=1)
    noise, conditions = draw_batch(tiny_dit, listed, [FIRST_SEED])
    full, fewer = (
        denoise(tiny_dit, sampling, noise, conditions, lambda _, inputs: tiny_dit.forward(inputs))
        for sampling in (listed, half)
    )
    assert measured.fewer_steps_psnr_db == round(image_psnr_db(fewer, full, pixels=False), 2)
    assert measured.fewer_steps_psnr_db < LARGEST_PSNR_DB


def test_every_sample_has_a_seed_of_its_own_in_batches_or_not(
    tiny_dit: DiffusionTransformer, sampling: Sampling
) -> None:
    schedule = tprr(steps=STEPS, phase_start=STEPS, cache_interval_early=STEPS, cache_interval_late=1)
    samples = BATCH + 1
    assert run(tiny_dit, sampling, schedule, 0, 1.0, samples).seeds == tuple(range(FIRST_SEED, FIRST_SEED + samples))
    both, again = (draw_batch(tiny_dit, sampling, [FIRST_SEED, FIRST_SEED + 1])[0] for _ in range(2))
    assert torch.equal(both, again)
    assert not torch.equal(both[0], both[1])
    assert torch.equal(both[1:], draw_batch(tiny_dit, sampling, [FIRST_SEED + 1])[0])


def test_a_model_that_gives_no_numbers_is_refused(
    save_dit: Callable[..., Path], tmp_path: Path, sampling: Sampling
) -> None:
    model = load_model(save_dit(tmp_path / "dit"))
    model.module.proj_out_2.bias[0] = torch.nan
    with pytest.raises(NotFiniteError, match=r"dit: the model's own run is not finite from step 0 on"):
        run(model, sampling, full_schedule(STEPS), keep=0, cost=6.0)
