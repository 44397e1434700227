"""Calibrate: a checkpoint and a recipe to a plan ``calibration/NAME``.

The same recipe, checkpoint and seed give the same plan, byte for byte, on one machine. A run that was killed goes on
where it stood: its state lies in ``calibration/.NAME.tc-deploy`` until the plan is written.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from tc_deploy.bundle import Claim, canonical_json, claimed, clear_state, sha256_of_bytes, state_folder, write_state
from tc_deploy.calibrate.asked import (
    CPU,
    Report,
    check_device,
    model_from_recipe,
    sampling_from_recipe,
    schedule_from_recipe,
)
from tc_deploy.calibrate.fits import Fits
from tc_deploy.calibrate.measure import measure
from tc_deploy.calibrate.recipe import Recipe
from tc_deploy.calibrate.training import record_trajectories, train_predictor
from tc_deploy.calibrate.whole import recipe_for
from tc_deploy.errors import ExportError, PlanError, UsageError
from tc_deploy.models.family import DiffusionTransformer
from tc_deploy.models.hub import local_folder
from tc_deploy.models.loading import model_folder, pipeline_of
from tc_deploy.models.scheduler_config import plain_config
from tc_deploy.models.solver import read_solver
from tc_deploy.plan import (
    FORMAT_VERSION,
    PLAN,
    PLAN_FOLDER,
    RANDOM,
    CacheRecord,
    ForecastRecord,
    OriginRecord,
    Plan,
    SamplingRecord,
    check_keep_counts,
    check_plan,
    content_sha256,
    fitted_for_sha256,
    schedule_record,
    write_plan_files,
)
from tc_deploy.planned.prompts import takes_prompts
from tc_deploy.schedule import PHASES, Schedule
from tc_deploy.tables import (
    FORECAST_WEIGHTS,
    SOLVER_COEFFICIENTS,
    StepTables,
    importance_name,
    tables_record,
    token_index_name,
)
from tc_deploy.tokencache.cost import count_flops
from tc_deploy.tokencache.sampler import Sampling
from tc_deploy.tokencache.selection import phase_keep_counts, spread_importance, token_index_from_importance
from tc_deploy.types import FloatArray, IntArray

log = logging.getLogger(__name__)


def calibrate(
    recipe: Recipe,
    destination: Path,
    report: Report = lambda what, done, total: None,
    *,
    device: str = CPU,
) -> Plan:
    """Make a plan.

    Args:
        recipe: what to make.
        destination: ``calibration/NAME``; a plan that exists is replaced.
        report: told how far each part is.
        device: where PyTorch runs the model, ``cpu`` or ``cuda``.

    Raises:
        UsageError: there is no such device, the model needs prompts and the recipe names none that fit, the recipe does
            not fit the model (keep counts, or any where its blocks are unknown) or itself (phase start), or forecasts
            are to be fitted and there is nothing to fit, too few samples, or no run of so many steps to fit towards.
        ModelError: the checkpoint or its scheduler cannot be loaded.
        StorageError: the destination cannot be written, is not ours to replace, or another process is writing it.
        KeyboardInterrupt: it was interrupted; says where its state is.
        ExportError: the scheduler's steps are not a deterministic linear update.
        UsageError: there are more steps than the scheduler takes.
        NotFiniteError: the model's own run, a fit or training comes to values that are not finite.
    """
    # What can be refused at once comes first: loading takes long.
    check_device(device)
    with claimed(destination, PLAN_FOLDER, reads=[Path(recipe.model)]) as claim:
        if (destination / PLAN).is_file():
            report(f"{destination} holds a plan, which will be replaced", 0, 1)
        state = _State(claim)
        try:
            plan, tables = _calibrated(recipe, state, report, device)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"interrupted; {state.words()}") from None
        check_plan(plan, tables, str(destination))
        with claim.new_folder() as folder:
            write_plan_files(plan, tables, folder, claim.destination)
        if state.folder is not None:
            clear_state(state.folder)
    return plan


class _State:
    """Where a calibration keeps what it has done; made when there is something to keep."""

    def __init__(self, claim: Claim) -> None:
        self.claim = claim
        self.folder: Path | None = None

    def open(self, key: str) -> Path:
        """The folder for work that depends on what ``key`` stands for."""
        self.folder = state_folder(self.claim, "calibrate", key)
        return self.folder

    def words(self) -> str:
        """What is left of it."""
        if self.folder is None:
            return "nothing is left"
        return f"its state is in {self.folder}: start it again to go on, or remove that folder"


def _calibrated(
    recipe: Recipe, state: _State, report: Report, device: str
) -> tuple[Plan, dict[str, FloatArray | IntArray]]:
    """The plan, measured, and its tables; see :func:`calibrate`."""
    schedule, steps = schedule_from_recipe(recipe), recipe.sampling.num_inference_steps
    folder = model_folder(local_folder(Path(recipe.model), recipe.variant))
    report("loading the checkpoint", 0, 1)
    model = model_from_recipe(recipe, device)
    recipe = recipe_for(model, recipe)
    sampling = sampling_from_recipe(recipe, model, report)
    # Refused here rather than at export, after the work: a sampler whose steps are not a table.
    try:
        solver = read_solver(sampling.scheduler, sampling.steps, sampling.set_timesteps_kwargs)
    except ExportError:
        # Some samplers take more steps than the model was trained with; those that do not say so in other words.
        most = sampling.scheduler.config.get("num_train_timesteps", steps)
        if steps <= most:
            raise
        raise UsageError(
            f"{type(sampling.scheduler).__name__} takes at most {most} steps, as many as the model was trained with,"
            f" found {steps}; take fewer"
        ) from None
    model.family.convention.check_noise(pipeline_of(folder).entries, sampling.scheduler, unit=solver.unit_noise)
    folder_of = partial(state.open, state_key(recipe, model, sampling))
    fits = Fits(model, sampling, recipe.fit_seeds, folder_of, report, recipe.forecast.target)
    if schedule is None:
        schedule = fits.place(recipe.schedule, recipe.cache.forecast_order).schedule
    importance, manual = importance_of(recipe, model, sampling, schedule, folder_of, report)
    keep_counts = _keep_counts(recipe, model, schedule, importance)
    cache = _cache_record(recipe, keep_counts)
    step_tables = StepTables.polynomial(
        schedule, cache.forecast_order, token_index_from_importance(importance, keep_counts, schedule)
    )
    if recipe.fit_seeds:
        step_tables = dataclasses.replace(fits.tables(schedule, cache), token_index=step_tables.token_index)
    origin = OriginRecord(
        method="manual" if manual else "predictor", seed=recipe.seed, settings=_settings(recipe, manual=manual)
    )
    plan, tables = assemble_plan(
        model,
        sampling,
        schedule,
        cache,
        step_tables,
        importance=None if manual else importance,
        origin=origin,
        fit_seeds=recipe.fit_seeds,
        converged=fits.converged,
    )
    if recipe.measure.samples:
        report(f"measuring against the {recipe.forecast.target} run", 0, 1)
        measured = measure(
            model,
            sampling,
            cache,
            schedule,
            step_tables,
            plan.cost_in_full_steps(),
            recipe.measure.samples,
            content_sha256(plan),
            fits.converged,
        )
        plan = plan.model_copy(update={"measured": measured})
    return plan, tables


def assemble_plan(
    model: DiffusionTransformer,
    sampling: Sampling,
    schedule: Schedule,
    cache: CacheRecord,
    step_tables: StepTables,
    *,
    importance: FloatArray | None,
    origin: OriginRecord,
    fit_seeds: range = range(0),
    converged: Sampling | None = None,
) -> tuple[Plan, dict[str, FloatArray | IntArray]]:
    """Put a plan together; it is not measured.

    Args:
        model: the model.
        sampling: the sampler.
        schedule: which steps are full.
        cache: keep counts, reuse, attention, forecast order.
        step_tables: the tokens and the weights of its cached steps.
        importance: (T, L, N) scores that chose them, whose means the plan keeps; None where nothing scored them.
        origin: how the plan came to be, but for what the samples were conditioned on.
        fit_seeds: of the samples that the weights were fitted on; none: the weights are the polynomials'.
        converged: the sampler of the converged run that they were fitted towards; None: towards the full run.

    Returns:
        The plan and its tables.

    Raises:
        ExportError: the scheduler's steps are not a deterministic linear update, or it refuses the step count.
    """
    tables: dict[str, FloatArray | IntArray] = {
        token_index_name(phase): table for phase, table in step_tables.token_index.items()
    }
    if fit_seeds:
        tables[FORECAST_WEIGHTS] = step_tables.forecast_weights
    if step_tables.solver_coefficients is not None:
        tables[SOLVER_COEFFICIENTS] = step_tables.solver_coefficients
    if importance is not None:
        for phase in step_tables.token_index:
            tables[importance_name(phase)] = importance[list(schedule.cached_steps(phase))].mean(0)
    solver = read_solver(sampling.scheduler, sampling.steps, sampling.set_timesteps_kwargs)
    drawn = RANDOM if takes_prompts(model) else None
    conditions = drawn if sampling.prompts is None else sampling.prompts.record
    sampling_record = SamplingRecord(
        scheduler_class=type(sampling.scheduler).__name__,
        scheduler_config=plain_config(sampling.scheduler),
        set_timesteps_kwargs=dict(sampling.set_timesteps_kwargs),
        timesteps=tuple(solver.timesteps.tolist()),
        guidance_scale=sampling.guidance_scale,
        embedded_guidance=sampling.embedded_guidance,
        guidance_rule=model.family.convention.guidance,
        true_cfg=model.family.convention.true_cfg,
    )
    stored = schedule_record(schedule)
    forecast = None
    if fit_seeds:
        forecast = ForecastRecord(
            fitted_for=fitted_for_sha256(model.record(), sampling_record, stored, cache),
            first_seed=fit_seeds.start,
            samples=len(fit_seeds),
            converged_steps=None if converged is None else converged.steps,
            solver_fitted=SOLVER_COEFFICIENTS in tables,
        )
    plan = Plan(
        kind="plan",
        format_version=FORMAT_VERSION,
        model=model.record(),
        sampling=sampling_record,
        schedule=stored,
        cache=cache,
        cost=count_flops(model, cache),
        origin=origin.model_copy(update={"conditions": conditions}),
        measured=None,
        tables=tables_record(tables),
        forecast=forecast,
    )
    return plan, tables


def _settings(recipe: Recipe, *, manual: bool) -> dict[str, Any]:
    """What the plan was decided and measured by, beside the seed."""
    if manual:
        return recipe.model_dump(mode="json", include={"measure"})
    chosen = {"keep_ratio": list(recipe.cache.keep_ratio), "multiple": recipe.cache.multiple}
    return chosen | recipe.model_dump(mode="json", include={"predictor", "measure"})


def importance_of(
    recipe: Recipe,
    model: DiffusionTransformer,
    sampling: Sampling,
    schedule: Schedule,
    folder_of: Callable[[], Path],
    report: Report,
) -> tuple[FloatArray, bool]:
    """Scores (T, L, N) of every step, and whether they were set by hand (no predictor trained).

    Training continues from the folder that ``folder_of`` gives, and leaves its state there.
    """
    blocks, tokens = len(model.blocks), model.geometry.tokens
    trivial = all(ratio in (0.0, 1.0) for ratio in recipe.cache.keep_ratio)
    if recipe.cache.keep_counts is not None or trivial:
        return np.stack([spread_importance(blocks, tokens, step) for step in range(schedule.steps)]), True
    folder = folder_of()
    trajectories = _trajectories(recipe, model, sampling, folder / "trajectories.safetensors", report)
    scores = train_predictor(
        model,
        _cache_record(recipe, ((0,) * blocks, (0,) * blocks)),
        schedule,
        recipe.cache.keep_ratio,
        trajectories,
        recipe.predictor,
        recipe.seed,
        folder / "predictor.safetensors",
        lambda done, loss: report("training the Cache Predictor", done, recipe.predictor.iterations),
    )
    return scores.numpy(), False


def state_key(recipe: Recipe, model: DiffusionTransformer, sampling: Sampling) -> str:
    """What training, fits and placements depend on, as one word."""
    identity = canonical_json(
        {
            "recipe": recipe.model_dump(mode="json", exclude={"measure", "search", "quality"}),
            "model": model.record().model_dump(mode="json"),
            "scheduler": [type(sampling.scheduler).__name__, plain_config(sampling.scheduler)],
            "prompts": None if sampling.prompts is None else sampling.prompts.record.sha256,
        }
    )
    return sha256_of_bytes(identity.encode())[:16]


def _trajectories(
    recipe: Recipe, model: DiffusionTransformer, sampling: Sampling, path: Path, report: Report
) -> dict[str, Tensor]:
    try:
        return dict(load_file(path))
    except (OSError, SafetensorError):
        pass
    seeds = range(recipe.seed, recipe.seed + recipe.predictor.trajectories)
    trajectories = record_trajectories(
        model, sampling, seeds, lambda step: report("sampling trajectories", step + 1, sampling.steps)
    )
    write_state(path, save({name: tensor.contiguous() for name, tensor in trajectories.items()}))
    return trajectories


def _keep_counts(
    recipe: Recipe, model: DiffusionTransformer, schedule: Schedule, importance: FloatArray
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    given = recipe.cache.keep_counts
    if given is None:
        return phase_keep_counts(importance, recipe.cache.keep_ratio, recipe.cache.multiple, schedule)
    first, second = (counts * len(model.blocks) if len(counts) == 1 else counts for counts in given)
    for phase, counts in zip(PHASES, (first, second), strict=True):
        try:
            check_keep_counts(counts, len(model.blocks), model.geometry.tokens, f"phase {phase}")
        except PlanError as error:
            raise UsageError(f"cache.keep_counts (--keep-counts): {error}") from None
    return first, second


def _cache_record(recipe: Recipe, keep_counts: tuple[tuple[int, ...], tuple[int, ...]]) -> CacheRecord:
    return CacheRecord(
        reuse=recipe.cache.reuse,
        attention=recipe.cache.attention,
        forecast_order=recipe.cache.forecast_order,
        keep_counts=keep_counts,
        skip=recipe.cache.skip,
    )
