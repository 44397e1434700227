"""What a plan costs in quality, against the model's own full run and against running fewer steps at equal cost."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from tc_deploy.models.family import DiffusionTransformer
from tc_deploy.plan import CacheRecord, ConvergedRecord, MeasuredRecord
from tc_deploy.planned.prompts import draw_batch
from tc_deploy.quality.metrics import image_psnr_db
from tc_deploy.schedule import Schedule
from tc_deploy.tables import StepTables
from tc_deploy.tokencache.sampler import OWN_REMEDY, PLAN_REMEDY, Sampling, TokenCachedSteps, denoise, finite_steps

FIRST_SEED = 1_000_000
"""Measurement draws its noise from here on; training draws from the recipe's seed, which lies far below."""
BATCH = 16
LISTS = {"sigmas", "timesteps"}
"""Arguments of ``set_timesteps`` that hold a value for each step."""


def measure(
    model: DiffusionTransformer,
    sampling: Sampling,
    cache: CacheRecord,
    schedule: Schedule,
    tables: StepTables,
    cost_in_full_steps: float,
    samples: int,
    plan_sha256: str,
    converged: Sampling | None = None,
) -> MeasuredRecord:
    """Run the plan, the full run and the full run with fewer steps from the same noise.

    Args:
        model: the model.
        sampling: the sampler with all its steps.
        cache: the plan's cache settings.
        schedule: the plan's schedule.
        tables: the plan's.
        cost_in_full_steps: the plan's cost; fewer steps get it rounded up.
        samples: how many pictures to compare.
        plan_sha256: :func:`tc_deploy.plan.content_sha256` of the plan.
        converged: the sampler with many more steps, whose run is one more reference; None: it is not run.

    Raises:
        NotFiniteError: a run comes to values that are not finite; names whose, and the step.
        ModelError: the model's pipeline could not use the scheduler.
    """
    fewer_steps = min(max(1, math.ceil(cost_in_full_steps)), sampling.steps)
    fewer = with_steps(model, sampling, fewer_steps)
    seeds = tuple(range(FIRST_SEED, FIRST_SEED + samples))
    full, planned, shortened, exact = [], [], [], []
    solved = sampling.under(tables)
    for start in range(0, samples, BATCH):
        noise, conditions = draw_batch(model, sampling, seeds[start : start + BATCH])

        def run(sampling: Sampling, steps: TokenCachedSteps | None) -> torch.Tensor:
            function = steps or (lambda _, inputs: model.forward(inputs))
            whose = "the model's own run" if steps is None else "the plan's run"
            check = finite_steps(
                f"{model.source}: {whose}", sampling.steps, OWN_REMEDY if steps is None else PLAN_REMEDY
            )
            return denoise(model, sampling, noise, conditions, function, check)  # noqa: B023 - called in this turn only

        full.append(run(sampling, None))
        planned.append(run(solved, TokenCachedSteps(model, cache, schedule, tables)))
        shortened.append(run(fewer, None))
        if converged is not None:
            exact.append(run(converged, None))

    def psnr_db(found: list[torch.Tensor], reference: list[torch.Tensor]) -> float:
        return round(image_psnr_db(torch.cat(found), torch.cat(reference), pixels=model.geometry.pixels), 2)

    return MeasuredRecord(
        plan_sha256=plan_sha256,
        seeds=seeds,
        psnr_db=psnr_db(planned, full),
        fewer_steps=fewer_steps,
        fewer_steps_psnr_db=psnr_db(shortened, full),
        converged=None
        if converged is None
        else ConvergedRecord(
            steps=converged.steps,
            psnr_db=psnr_db(planned, exact),
            full_psnr_db=psnr_db(full, exact),
            fewer_steps_psnr_db=psnr_db(shortened, exact),
        ),
    )


def with_steps(model: DiffusionTransformer, sampling: Sampling, steps: int) -> Sampling:
    """The sampler with another number of steps, as the family's pipeline would set it up.

    Of timesteps or sigmas that a user listed one by one, every so many are taken.

    Raises:
        ModelError: the pipeline could not use the scheduler.
    """
    own = own_arguments(model, sampling)
    for name in LISTS & own.keys():
        own[name] = [own[name][step * sampling.steps // steps] for step in range(steps)]
    convention, tokens = model.family.convention, model.geometry.tokens
    arguments = convention.with_own(sampling.scheduler, steps, tokens, own)
    return dataclasses.replace(sampling, steps=steps, set_timesteps_kwargs=arguments)


def own_arguments(model: DiffusionTransformer, sampling: Sampling) -> dict[str, Any]:
    """The arguments of ``set_timesteps`` that are a user's own, and not the pipeline's."""
    usual = model.family.convention.set_timesteps_kwargs(sampling.scheduler, sampling.steps, model.geometry.tokens)
    return {name: value for name, value in sampling.set_timesteps_kwargs.items() if usual.get(name) != value}
