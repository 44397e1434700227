"""``tc-deploy calibrate``: a checkpoint and a recipe to a plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tc_deploy.cli.help import GroupedCommand, option
from tc_deploy.cli.options import (
    MODEL_PATH,
    NEW_PATH,
    Number,
    device_option,
    json_option,
    recipe_options,
    recipe_overrides,
)
from tc_deploy.cli.progress import progress_bar
from tc_deploy.types import FitTarget, Skip


def _counts(context: click.Context, parameter: click.Parameter, value: tuple[str, str] | None) -> Any:  # noqa: ARG001
    if not value:
        return None
    try:
        return [[int(number) for number in phase.split(",")] for phase in value]
    except ValueError:
        raise click.BadParameter(f"expected numbers with commas between them, found {' '.join(value)}") from None


@click.command(cls=GroupedCommand)
@click.argument("source", metavar="RECIPE|MODEL", type=MODEL_PATH)
@option("-o", "--output", required=True, type=NEW_PATH, help="Plan folder, calibration/NAME.")
@recipe_options
@device_option
@option("--phase-start", "schedule__phase_start", type=int, help="First step of phase 2.")
@option(
    "--cache-interval-early", "schedule__cache_interval_early", type=int, help="Phase 1: one step in so many is full."
)
@option("--cache-interval-late", "schedule__cache_interval_late", type=int, help="Phase 2, likewise.")
@option("--full-steps", "schedule__full_steps", type=int, help="Place so many full steps, and fit forecasts.")
@option("--budget", "schedule__budget_minutes", type=Number(0), metavar="MINUTES", help="For placing them.")
@option(
    "--keep-ratio",
    "cache__keep_ratio",
    type=(Number(0), Number(0)),
    metavar="PHASE1 PHASE2",
    help="Share of tokens that a cached step computes; the Cache Predictor chooses which.",
)
@option(
    "--keep-counts",
    "cache__keep_counts",
    advanced=True,
    type=(str, str),
    metavar="PHASE1 PHASE2",
    callback=_counts,
    help="Tokens per block by hand, like 0,0,16,64, or one number for all; nothing is trained.",
)
@option(
    "--skip",
    "cache__skip",
    type=click.Choice([choice.value for choice in Skip]),
    help="What a cached step that keeps nothing leaves out: the whole model, or its blocks.",
)
@option("--forecast-order", "cache__forecast_order", type=int, help="0 reuses, 1 and 2 extrapolate.")
@option(
    "--fit-samples",
    "forecast__fit_samples",
    advanced=True,
    type=int,
    help="Fit forecasts of skipped models on so many samples, 8 or more; 0: polynomials.",
)
@option(
    "--target",
    "forecast__target",
    type=click.Choice([target.value for target in FitTarget]),
    help="Run to fit to; converged: 4 times the steps.",
)
@option("--samples", "measure__samples", type=int, help="Pictures to measure the plan on; 0: not.")
@json_option
def command(source: Path, output: Path, device: str, as_json: bool, **options: Any) -> None:
    """Make a plan: which tokens, in which blocks, at which steps.

    RECIPE is a TOML file (recipes.md in the documentation has all keys), MODEL a diffusers folder; options override
    the recipe. A run that was stopped leaves its state in .NAME.tc-deploy beside the plan, and goes on when it is
    started again.
    """
    from tc_deploy.bundle import canonical_json
    from tc_deploy.calibrate.calibration import calibrate
    from tc_deploy.calibrate.recipe import read_recipe
    from tc_deploy.errors import Cancelled
    from tc_deploy.inspect import inspect_path, measurement_of
    from tc_deploy.remarks import remark_on

    recipe = read_recipe(source, recipe_overrides(options))
    try:
        with progress_bar() as report:
            plan = calibrate(recipe, output, report, device=device)
    except KeyboardInterrupt as interruption:
        raise Cancelled(str(interruption) or "interrupted") from None
    if (remark := remark_on(plan)) is not None:
        click.echo(f"warning: {remark}", err=True)
    if as_json:
        click.echo(canonical_json(inspect_path(output)), nl=False)
        return
    schedule = plan.run_schedule()
    steps = f"{schedule.full_steps} full + {schedule.steps - schedule.full_steps} cached steps"
    click.echo(f"{output}: {steps}, {100 * plan.cost_ratio():.1f} % of the full run's FLOPs")
    if (measured := measurement_of(plan)) is not None:
        click.echo(f"measured: {measured}")
