"""Search: a checkpoint and a recipe to a plan that earned its place, with every point and baseline beside it.

1. Candidates: full steps placed and forecasts fitted at several numbers of full steps; tokens kept, where asked for
   (``candidates``).
2. Confirmation: candidates and baselines become engines, which make the pictures of seeds that nobody saw before and
   are timed in turn with the full run (``confirm``, ``built_points``, ``baselines``).

In: a recipe. Out: a plan folder that also holds ``search.json``, samples, and the plan of every point. A search that
was stopped goes on where it stood, from its state beside the plan (``bundle/state.py``).
"""

from __future__ import annotations

import datetime as dt
import time
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
from tc_deploy.calibrate.asked import CPU, Report, check_device, model_from_recipe, sampling_from_recipe
from tc_deploy.calibrate.fits import Fits
from tc_deploy.calibrate.recipe import USUAL_FIT_SAMPLES, Recipe
from tc_deploy.calibrate.whole import recipe_for
from tc_deploy.errors import PlanError, UsageError
from tc_deploy.hardware import hardware_line
from tc_deploy.models.family import DiffusionTransformer
from tc_deploy.plan import PLAN_FOLDER, plan_sha256
from tc_deploy.quality.classifier import Classifier
from tc_deploy.search.baselines import Baselines
from tc_deploy.search.built_points import PlannedPoint, PointMaker
from tc_deploy.search.candidates import Candidates, token_importance
from tc_deploy.search.choose import Wish, check_wish, uniquely_named, write_search
from tc_deploy.search.confirm import Confirmation
from tc_deploy.search.peer import why_no_peer
from tc_deploy.search.record import (
    FORMAT_VERSION,
    LatencySource,
    SearchRecord,
)
from tc_deploy.search.remarks import remarks_of
from tc_deploy.tokencache.sampler import Sampling, device_of
from tc_deploy.types import FitTarget, FloatArray

MIN_STEPS = 2
"""A full and a cached one."""
HOW_LONG = {"budget_minutes", "baselines"}
"""Settings that say when a search ends, and not what it finds until then: it may go on with others."""


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
        PlanError: there are too few steps.
        ExportError: the scheduler's steps are not a deterministic linear update, or a graph cannot be exported.
        BackendError: the engine is not installed, refuses a graph, or makes pictures that are not finite.
        UsageError: the recipe fits towards another run than the full one; or no point fulfils the wish: names the
            fastest. What was built and timed stays in the work folder, so that the same search with another wish is
            quick.
        StorageError: the destination cannot be written, is not ours to replace, or another process is writing it.
    """
    check_wish(wish, "flops" if from_flops else "measured")
    check_device(device)
    if recipe.forecast.target is not FitTarget.FULL:
        raise UsageError(
            f"forecast.target = {recipe.forecast.target.value}: a search compares with the full run, and fits towards"
            " that; leave it out, or make one plan with tc-deploy calibrate"
        )
    registry.backend(backend).version()
    judge = None if recipe.quality.classifier is None else Classifier(Path(recipe.quality.classifier))
    if recipe.sampling.num_inference_steps < MIN_STEPS:
        raise PlanError(
            f"search: expected {MIN_STEPS} steps or more, a full and a cached one, found"
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
        self.baselines = Baselines(model, self.sampling, recipe.seed)
        self.full = self.baselines.full()
        # All that a kept result depends on: one of another sampler, machine or version is not to be quoted here.
        identity = {
            "full": plan_sha256(self.full.plan),
            "recipe": recipe.model_dump(mode="json", exclude={"search": HOW_LONG}),
            "backend": [backend, registry.backend(backend).version(), batch_size, from_flops],
            "made_by": [__version__, torch.__version__, hardware_line(), device_of(model).type],
        }
        self.folder = state_folder(claim, "plan", sha256_of_bytes(canonical_json(identity).encode())[:16])
        self.maker = PointMaker(self.folder, Path(recipe.model), backend, batch_size, self.full)
        self.confirmation = Confirmation(
            recipe.search, model, self.sampling, self.maker, judge, timed=not from_flops, report=report
        )

    def run(self) -> tuple[SearchRecord, dict[str, PlannedPoint], Mapping[str, FloatArray]]:
        settings = self.recipe.search
        minutes = settings.budget_minutes
        deadline = None if minutes is None else time.monotonic() + 60 * minutes
        ours, twins = self._candidates(deadline)
        baselines = [] if settings.baselines == "none" else [*twins, *self.baselines.all()]
        exact = None if settings.baselines == "none" else self.baselines.converged()
        found = self.confirmation([self.full, *ours, *baselines], exact, deadline)
        latency_source: LatencySource = "flops" if self.from_flops else "measured"
        remarks = list(remarks_of(found.points, latency_source))
        reason = why_no_peer(self.model)
        if settings.baselines == "all" and reason is not None:
            remarks.append(f"cache-dit was not compared: {reason}.")
        remarks += [f"{name} was left out: its pictures are not finite." for name in found.lost]
        if found.late:
            remarks.append(f"The time was over before {len(found.late)} baselines were built: {', '.join(found.late)}.")
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
            confirmation_seeds=settings.confirmation_samples,
            settings=settings.model_dump(mode="json"),
            points=found.points,
            remarks=tuple(remarks),
            samples=FileRecord(size_bytes=len(stored), sha256=sha256_of_bytes(stored)),
        )
        return record, {point.name: point for point in (self.full, *ours, *baselines)}, found.samples

    def _candidates(self, deadline: float | None) -> tuple[list[PlannedPoint], list[PlannedPoint]]:
        """Ours, and what each is compared with that spends the same otherwise."""
        settings = {
            "latency": "flops" if self.from_flops else "measured",
            "search": self.recipe.search.model_dump(mode="json", exclude=HOW_LONG),
        }
        seeds = self.recipe.fit_seeds or range(self.recipe.seed, self.recipe.seed + USUAL_FIT_SAMPLES)
        fits = Fits(self.model, self.sampling, seeds, lambda: self.folder / "fits", self.report)
        candidates = Candidates(self.recipe, self.model, self.sampling, fits, settings)
        ours = list(candidates.placed(deadline))
        twins = [twin for point in ours for twin in self.baselines.placed_twins(point)]
        if self.recipe.search.baselines != "none":
            twins += [self.baselines.fitted_solver(point, fits) for point in ours]
        if any(self.recipe.search.keep_ratio):
            importance = token_importance(
                self.recipe, self.model, self.sampling, self.folder / "predictor", self.report
            )
            with_tokens = list(candidates.with_tokens(importance))
            ours += with_tokens
            ours = uniquely_named(ours)
            twins += [twin for point in ours for twin in self.baselines.twins(point, importance)]
        return uniquely_named(ours), twins
