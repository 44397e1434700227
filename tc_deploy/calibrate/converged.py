"""The converged run: the model's own of many more steps, at the latents' places in a run of the plan's.

In: a model, its sampler, seeds. Out: the sampler with more steps, and the latents that a plan's run is to pass through
and to end at. A step of few begins at a noise level that a run of more steps passes too: by its timestep, between two
that lie near each other. Never: fits anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from tc_deploy.calibrate.fitting import BATCH, OwnRuns, own_runs
from tc_deploy.calibrate.measure import LISTS, own_arguments, with_steps
from tc_deploy.errors import ExportError, UsageError
from tc_deploy.models.family import DiffusionTransformer
from tc_deploy.models.solver import SolverTable
from tc_deploy.planned.prompts import draw_batch
from tc_deploy.tokencache.sampler import Sampling
from tc_deploy.types import FloatArray

CONVERGED = 4
"""The converged run has so many times the steps."""


def converged_sampling(model: DiffusionTransformer, sampling: Sampling) -> Sampling:
    """The same sampler with many more steps.

    Raises:
        UsageError: it cannot have so many.
        ModelError: the model's pipeline could not use the scheduler.
    """
    name, steps = type(sampling.scheduler).__name__, CONVERGED * sampling.steps
    refused = f"forecast.target (--target): the converged run has {steps} steps, {CONVERGED} times the plan's"
    if listed := sorted(LISTS & own_arguments(model, sampling).keys()):
        raise UsageError(f"{refused}, and {listed[0]} lists only the plan's; leave {listed[0]} out, or --target full")
    more = with_steps(model, sampling, steps)
    try:
        timesteps = np.asarray(more.fresh_scheduler().timesteps.tolist())
    except ExportError:
        most = int(sampling.scheduler.config.get("num_train_timesteps", steps)) // CONVERGED
        raise UsageError(f"{refused}, which {name} cannot take; take at most {most} steps, or --target full") from None
    if (np.diff(timesteps) >= 0).any():
        raise UsageError(f"{refused}, whose timesteps {name} does not make fall; take fewer steps, or --target full")
    return more


def converged_runs(
    model: DiffusionTransformer,
    sampling: Sampling,
    solver: SolverTable,
    more: Sampling,
    seeds: Sequence[int],
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> OwnRuns:
    """Run the model itself with many more steps.

    Args:
        model: the model.
        sampling: the sampler with the plan's steps.
        solver: the same as a table.
        more: the sampler of the converged run.
        seeds: one sample each.
        on_step: told how many steps of how many are done, of all batches.

    Returns:
        The latents before each of the plan's steps, and the last ones; the first are the noise that the plan's run
        starts from.

    Raises:
        NotFiniteError: a run comes to values that are not finite; names the step.
    """
    noise, conditions = draw_batch(model, sampling, seeds)
    timesteps = np.asarray(more.fresh_scheduler().timesteps.tolist(), np.float32)
    parts, starts = [], range(0, len(seeds), BATCH)
    for done, start in enumerate(starts):
        so_far, total = done * more.steps, len(starts) * more.steps
        part = own_runs(
            model,
            more,
            seeds[start : start + BATCH],
            lambda step, _: on_step(so_far + step, total),  # noqa: B023 - called in this turn only
        )
        parts.append(latents_at(part.latents, timesteps, solver.timesteps))
    latents = torch.cat(parts, dim=1)
    latents[0] = noise * solver.init_noise_sigma
    return OwnRuns(conditions=conditions, latents=latents)


def latents_at(latents: Tensor, timesteps: FloatArray, wanted: FloatArray) -> Tensor:
    """Latents of a run at other timesteps than its own: on the line between the two nearest.

    Args:
        latents: (S + 1, B, ...) before each step of the run, and after the last.
        timesteps: (S,) falling.
        wanted: (T,)

    Returns:
        (T + 1, B, ...) before each of the wanted timesteps, and after the last step.
    """
    places = np.interp(-wanted, -timesteps, np.arange(len(timesteps)))
    before = np.floor(places).astype(np.int64)
    after = np.minimum(before + 1, len(timesteps) - 1)
    share = torch.from_numpy((places - before).astype(np.float32)).reshape(-1, *[1] * (latents.ndim - 1))
    between = torch.lerp(latents[before], latents[after], share)
    return torch.cat([between, latents[-1:]])
