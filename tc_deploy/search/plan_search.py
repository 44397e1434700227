"""Search: a checkpoint and a recipe to a plan that earned its place, with every point and baseline beside it.

1. Cost: graphs on a grid of keep counts are built and timed (``grid``, ``cost``), or FLOPs are taken where that was
   asked for.
2. Screening: candidates sample in PyTorch (``space``, ``screen``).
3. Fits: the forecasts of the front's candidates, where the recipe asks for it (``fits``); screening takes polynomials.
4. Confirmation: the front's candidates and all baselines become engines, which make the pictures of seeds that nobody
   saw before and are timed in turn with the full run (``confirm``, ``points``, ``baselines``).

In: a recipe. Out: a plan folder that also holds ``search.json``, samples, and the plan of every point. A search that
was stopped goes on where it stood, from its state beside the plan (``bundle/state.py``).
"""

from __future__ import annotations

import dataclasses
import datetime as dt
from collections.abc import Mapping
from pathlib import Path

import safetensors.numpy
import torch

from tc_deploy import __version__
from tc_deploy.backends import registry
from tc_deploy.bundle import (
    Claim,
    FileRecord,
    canonical_json,
    claimed,
    clear_state,
    sha256_of_bytes,
    state_folder,
)
from tc_deploy.calibrate.calibration import (
    CPU,
    Report,
    assemble_plan,
    check_device,
    importance_of,
    model_from_recipe,
    sampling_from_recipe,
)
from tc_deploy.calibrate.fits import Fits
from tc_deploy.calibrate.fitting import can_be_fitted
from tc_deploy.calibrate.recipe import Recipe
from tc_deploy.calibrate.whole import recipe_for
from tc_deploy.errors import PlanError
from tc_deploy.hardware import hardware_line
from tc_deploy.models.family import DiffusionTransformer
from tc_deploy.plan import PLAN_FOLDER, OriginRecord, plan_sha256
from tc_deploy.quality.classifier import Classifier
from tc_deploy.schedule import tprr
from tc_deploy.search.baselines import Baselines, settings_name
from tc_deploy.search.built_points import PlannedPoint, PointMaker
from tc_deploy.search.choose import Wish, check_wish, uniquely_named, write_search
from tc_deploy.search.confirm import Confirmation
from tc_deploy.search.cost import CostModel, cost_model
from tc_deploy.search.grid import timed_graphs
from tc_deploy.search.peer import why_no_peer
from tc_deploy.search.record import (
    FORMAT_VERSION,
    Kind,
    LatencySource,
    ScreenedRecord,
    SearchRecord,
    VariantCost,
)
from tc_deploy.search.remarks import remarks_of
from tc_deploy.search.screen import Screen
from tc_deploy.search.space import Judged, candidates, chosen_for_engines, judge_candidates, settings_of
from tc_deploy.tokencache.sampler import Sampling, device_of
from tc_deploy.types import FloatArray

MIN_STEPS = 4
"""A full and a cached step in each phase, which is what graphs are timed in."""
REFERENCE_INTERVAL = 4
"""Interval of the schedule that the Cache Predictor is trained for, when many schedules will use its scores."""


def search_plan(
    recipe: Recipe,
    destination: Path,
    wish: Wish,
    *,
    backend: str = registry.DEFAULT,
    batch_size: int = 1,
    from_flops: bool = False,
    device: str = CPU,
    report: Report = lambda what, done, total: None,
) -> SearchRecord:
    """Search, and write the plan that fits the wish best.

    Args:
        recipe: model, sampling, space, classifier.
        destination: ``calibration/NAME``; a plan that exists is replaced.
        wish: what the plan must fulfil.
        backend: on whose engines latency is measured.
        batch_size: pictures per run when latency is measured.
        from_flops: predict and quote latencies by FLOPs, without timing anything; the record says so.
        device: where PyTorch runs the model, ``cpu`` or ``cuda``; engines run where their backend does.
        report: told how far each part is.

    Raises:
        ModelError: the checkpoint, its scheduler or the classifier cannot be loaded.
        PlanError: there are too few steps, or no candidate has a cached step.
        ExportError: the scheduler's steps are not a deterministic linear update, or a graph cannot be exported.
        BackendError: the engine is not installed, refuses a graph, or makes pictures that are not finite.
        UsageError: no point fulfils the wish; names the fastest. What was built and timed stays in the work folder, so
            that the same search with another wish is quick.
        StorageError: the destination cannot be written, is not ours to replace, or another process is writing it.
    """
    check_wish(wish, "flops" if from_flops else "measured")
    check_device(device)
    registry.backend(backend).version()
    judge = None if recipe.quality.classifier is None else Classifier(Path(recipe.quality.classifier))
    if recipe.sampling.num_inference_steps < MIN_STEPS:
        raise PlanError(
            f"search: expected {MIN_STEPS} steps or more, two phases of a full and a cached one, found"
            f" {recipe.sampling.num_inference_steps}; raise --steps"
        )
    with claimed(destination, PLAN_FOLDER, reads=[Path(recipe.model)]) as claim:
        report("loading the checkpoint", 0, 1)
        model = model_from_recipe(recipe, device)
        recipe = recipe_for(model, recipe)
        if judge is not None:
            judge.check_fits(model.geometry.latent_shape)
        search = _Search(recipe, model, judge, claim, backend, batch_size, from_flops=from_flops, report=report)
        record, plans, samples = search.run()
        write_search(record, plans, samples, claim, wish)
        search.maker.discard_all()
        clear_state(search.folder)
    return record


class _Search:
    """One search's parts, in the order in which they run."""

    def __init__(
        self,
        recipe: Recipe,
        model: DiffusionTransformer,
        judge: Classifier | None,
        claim: Claim,
        backend: str,
        batch_size: int,
        *,
        from_flops: bool,
        report: Report,
    ) -> None:
        self.recipe, self.model, self.report = recipe, model, report
        self.backend, self.batch_size, self.from_flops = backend, batch_size, from_flops
        self.sampling: Sampling = sampling_from_recipe(recipe, model, report)
        self.space = candidates(recipe.search, self.sampling.steps)
        self.baselines = Baselines(model, self.sampling, recipe.seed)
        self.full = self.baselines.full()
        # All that a kept result depends on: one of another sampler, machine or version is not to be quoted here.
        identity = {
            "full": plan_sha256(self.full.plan),
            "recipe": recipe.model_dump(mode="json"),
            "backend": [backend, registry.backend(backend).version(), batch_size, from_flops],
            "made_by": [__version__, torch.__version__, hardware_line(), device_of(model).type],
        }
        self.folder = state_folder(claim, "plan", sha256_of_bytes(canonical_json(identity).encode())[:16])
        self.maker = PointMaker(self.folder, Path(recipe.model), backend, batch_size, self.full)
        self.confirmation = Confirmation(
            recipe.search, model, self.sampling, self.maker, judge, timed=not from_flops, report=report
        )

    def run(self) -> tuple[SearchRecord, dict[str, PlannedPoint], Mapping[str, FloatArray]]:
        baselines = tuple(self.baselines.all())
        importance = self._importance()
        variants: tuple[VariantCost, ...] = ()
        costs = None
        if not self.from_flops:
            variants = timed_graphs(self.recipe.search, self.space.values(), self.baselines, self.maker, self.report)
            costs = cost_model(self.model.geometry.tokens, variants)
        judged, ours = self._screened(importance, costs)
        ours = uniquely_named(ours)
        planned = [self.full, *ours, *baselines]
        for point in ours:
            planned += self.baselines.twins(point, importance)
        found = self.confirmation(planned, self.baselines.converged())
        latency_source: LatencySource = "flops" if self.from_flops else "measured"
        remarks = list(remarks_of(found.points, latency_source))
        reason = why_no_peer(self.model)
        if reason is not None:
            remarks.append(f"cache-dit was not compared: {reason}.")
        remarks += [f"{name} was left out: its pictures are not finite." for name in found.lost]
        stored = safetensors.numpy.save(dict(found.samples))
        record = SearchRecord(
            kind="search",
            format_version=FORMAT_VERSION,
            made_by=f"tc-deploy {__version__}",
            date=dt.datetime.now(dt.UTC).date().isoformat(),
            model=self.model.record(),
            hardware=hardware_line(),
            latency_source=latency_source,
            backend=self.backend,
            backend_version=registry.backend(self.backend).version(),
            batch_size=self.batch_size,
            seed=self.recipe.seed,
            screening_seeds=self.recipe.search.screening_samples,
            confirmation_seeds=self.recipe.search.confirmation_samples,
            settings=self.recipe.search.model_dump(mode="json"),
            variants=variants,
            screened=tuple(ScreenedRecord.model_validate(settings_of(item)) for item in judged),
            points=found.points,
            remarks=tuple(remarks),
            samples=FileRecord(size_bytes=len(stored), sha256=sha256_of_bytes(stored)),
        )
        return record, {point.name: point for point in planned}, found.samples

    def _importance(self) -> FloatArray:
        """(T, L, N) scores; one Cache Predictor serves the whole search."""
        steps = self.sampling.steps
        ratio = max(self.recipe.search.keep_ratio) / 2
        settings = self.recipe.model_copy(
            update={"cache": self.recipe.cache.model_copy(update={"keep_counts": None, "keep_ratio": (ratio, ratio)})}
        )
        schedule = tprr(
            steps=steps, phase_start=steps, cache_interval_early=min(REFERENCE_INTERVAL, steps), cache_interval_late=1
        )
        importance, _ = importance_of(
            settings, self.model, self.sampling, schedule, lambda: self.folder / "predictor", self.report
        )
        return importance

    def _screened(
        self, importance: FloatArray, costs: CostModel | None
    ) -> tuple[tuple[Judged, ...], list[PlannedPoint]]:
        settings, steps = self.recipe.search, self.sampling.steps
        total = min(settings.trials, len(self.space))
        self.report("sampling with candidates", 0, total)
        screen = Screen(
            self.model,
            self.sampling,
            importance,
            self.recipe.cache.multiple,
            settings.screening_samples,
            costs,
            self.folder / "screening",
            lambda done: self.report("sampling with candidates", done, total),
        )
        judged = judge_candidates(settings, steps, self.recipe.seed, screen)
        fits = Fits(self.model, self.sampling, self.recipe.fit_seeds, lambda: self.folder / "fits", self.report)
        ours = []
        for item in chosen_for_engines(judged, settings.points):
            schedule, cache = item.candidate.schedule(steps), screen.cache(item.candidate)
            step_tables, fit_seeds = screen.tables(item.candidate), range(0)
            if self.recipe.fit_seeds and can_be_fitted(cache, schedule):
                fit_seeds = self.recipe.fit_seeds
                step_tables = dataclasses.replace(step_tables, forecast_weights=fits.weights(schedule, cache))
            plan, tables = assemble_plan(
                self.model,
                self.sampling,
                schedule,
                cache,
                step_tables,
                fit_seeds=fit_seeds,
                importance=importance if item.candidate.keeps_tokens else None,
                origin=OriginRecord(
                    method="search",
                    seed=self.recipe.seed,
                    settings={
                        "latency": "flops" if self.from_flops else "measured",
                        "search": settings.model_dump(mode="json"),
                    },
                ),
            )
            ours.append(
                PlannedPoint(
                    name=settings_name(plan),
                    kind=Kind.TOKEN_CACHE,
                    plan=plan,
                    tables=tables,
                    predicted_latency_ratio=item.latency_ratio,
                )
            )
        return judged, ours
