"""What fitting and placing are worth, beside fewer steps and better solvers, at the same number of full steps.

    python examples/compare_forecasts.py MODEL --full-steps 6 12 22 --guidance-scale 2 --work WORK
    python examples/compare_forecasts.py MODEL --full-steps 24 12 6 --guidance-scale 2 --work WORK --target converged

Cached steps skip the model. PSNR in dB to the model's own full run, and to the converged run of four times the steps,
on seeds that no fit saw. With --target converged the fits are towards that, and the solver's table is fitted too. What
was done is kept in WORK: an interrupted run goes on.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from tc_deploy.calibrate.asked import sampling_from_recipe
from tc_deploy.calibrate.fits import Fits
from tc_deploy.calibrate.fitting import OwnRuns
from tc_deploy.calibrate.measure import with_steps
from tc_deploy.calibrate.recipe import Recipe, ScheduleRecipe
from tc_deploy.models.family import DiffusionTransformer
from tc_deploy.models.loading import load_model
from tc_deploy.plan import CacheRecord
from tc_deploy.quality.metrics import image_psnr_db, ssim
from tc_deploy.schedule import Schedule, tprr
from tc_deploy.search.baselines import Baselines
from tc_deploy.tables import StepTables
from tc_deploy.tokencache.sampler import Sampling, TokenCachedSteps, denoise
from tc_deploy.types import Attention, FitTarget, Reuse, Skip

JUDGED_FROM = 3_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--full-steps", type=int, nargs="+", required=True)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance-scale", type=float)
    parser.add_argument("--target", choices=list(FitTarget), default=FitTarget.FULL, help="of the fits")
    parser.add_argument("--fit-samples", type=int, default=32)
    parser.add_argument("--samples", type=int, default=32, help="to judge by")
    parser.add_argument("--budget", type=float, metavar="MINUTES", help="for each placement")
    parser.add_argument("--work", type=Path, required=True)
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    recipe = Recipe.model_validate(
        {
            "model": str(asked.model),
            "sampling": {"num_inference_steps": asked.steps, "guidance_scale": asked.guidance_scale},
        }
    )
    model = load_model(asked.model)
    sampling = sampling_from_recipe(recipe, model)
    nothing = (0,) * len(model.blocks)
    cache = CacheRecord(
        reuse=Reuse.BRANCH,
        attention=Attention.ALL,
        forecast_order=2,
        keep_counts=(nothing, nothing),
        skip=Skip.MODEL,
    )
    seeds, judged = range(JUDGED_FROM, JUDGED_FROM + asked.samples), asked.work / "judged"
    judged.mkdir(exist_ok=True)
    own, exact = (Fits(model, sampling, seeds, lambda: judged, say_nothing, target).own for target in FitTarget)
    full, noise, converged = own.latents[-1], own.latents[0], exact.latents[-1]
    pixels, target = model.geometry.pixels, FitTarget(asked.target)

    def show(name: str, count: int, latents: Tensor) -> None:
        figures = [image_psnr_db(latents, other, pixels=pixels) for other in (full, converged)]
        alike = ssim(latents, full, pixels=pixels)
        print(f"| {count} | {name} | {figures[0]:.1f} | {figures[1]:.1f} | {alike or float('nan'):.4f} |", flush=True)

    def run(cache: CacheRecord, schedule: Schedule, tables: StepTables) -> Tensor:
        steps = TokenCachedSteps(model, cache, schedule, tables)
        return denoise(model, sampling.under(tables), noise, own.conditions, steps)

    print("| full steps | what | to the full run | to the converged run | SSIM |\n|---|---|---|---|---|")
    show("full run", asked.steps, full)
    fits = Fits(model, sampling, range(asked.fit_samples), lambda: asked.work, say_nothing, target)
    for count in asked.full_steps:
        show("fewer steps", count, own_run(model, with_steps(model, sampling, count), own))
        for name, solver in Baselines(model, sampling, 0).better_solvers((count / asked.steps,)):
            show(name, count, own_run(model, solver, own))
        robin = round_robin(asked.steps, count)
        placed = fits.place(ScheduleRecipe(full_steps=count, budget_minutes=asked.budget), 2).schedule
        if target is FitTarget.FULL:
            reuse = cache.model_copy(update={"forecast_order": 0})
            show("round-robin, polynomial", count, run(cache, robin, StepTables.polynomial(robin, 2)))
            show("placed, reused", count, run(reuse, placed, StepTables.polynomial(placed, 0)))
            show("placed, polynomial", count, run(cache, placed, StepTables.polynomial(placed, 2)))
        show("round-robin, fitted", count, run(cache, robin, fits.tables(robin, cache)))
        show("placed, fitted", count, run(cache, placed, fits.tables(placed, cache)))
        print(f"placed: {placed.line()}", flush=True)


def say_nothing(what: str, done: int, total: int) -> None:
    """Of the progress of a part."""


def own_run(model: DiffusionTransformer, sampling: Sampling, own: OwnRuns) -> Tensor:
    """The model's own run under another sampler, from the same noise."""
    return denoise(model, sampling, own.latents[0], own.conditions, lambda _, inputs: model.forward(inputs))


def round_robin(steps: int, count: int) -> Schedule:
    """The round-robin of two neighbouring intervals that has so many full steps, as nearly as there is one."""
    choices = [
        tprr(steps=steps, phase_start=start, cache_interval_early=late + 1, cache_interval_late=late)
        for late in range(1, steps)
        for start in (steps // 2, *range(steps + 1))
    ]
    return min(choices, key=lambda schedule: abs(schedule.full_steps - count))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
