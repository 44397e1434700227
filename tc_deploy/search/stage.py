"""Search: a checkpoint and a recipe to a plan that earned its place, with every point and baseline beside it.

1. Cost: graphs on a grid of keep counts are built and timed (``cost``), or FLOPs are taken where that was asked for.
2. Screening: candidates sample in PyTorch (``space``, ``screen``).
3. Confirmation: the front's candidates and all baselines become engines, which make the pictures of seeds that nobody
   saw before and are timed in turn with the full run (``points``, ``baselines``).

In: a recipe. Out: a plan folder that also holds ``search.json``, samples, and the plan of every point. A search that
was killed goes on where it stood, from ``.NAME.work``.
"""

from __future__ import annotations

import datetime as dt
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch

from tc_deploy import __version__
from tc_deploy.backends import registry
from tc_deploy.bundle import (
    FileRecord,
    canonical_json,
    check_replaceable,
    sha256_of_bytes,
    write_bytes,
)
from tc_deploy.calibrate.prompts import tensors_of
from tc_deploy.calibrate.recipe import Recipe
from tc_deploy.calibrate.stage import (
    CPU,
    assemble_plan,
    check_device,
    importance_of,
    model_from_recipe,
    sampling_from_recipe,
)
from tc_deploy.conditions import Conditions
from tc_deploy.errors import BackendError, PlanError
from tc_deploy.hardware import hardware_line
from tc_deploy.models.family import DiffusionTransformer
from tc_deploy.plan import PLAN, CacheRecord, OriginRecord, plan_sha256
from tc_deploy.quality.classifier import Classifier
from tc_deploy.quality.compare import compare
from tc_deploy.quality.metrics import drift, picture_psnr_db
from tc_deploy.runtime.pipeline import noise_of
from tc_deploy.schedule import Schedule
from tc_deploy.search.baselines import Baselines, settings_name
from tc_deploy.search.choose import Wish, check_wish, uniquely_named, write_search
from tc_deploy.search.cost import CostModel, Setting, cost_model, time_graphs, variant_cost
from tc_deploy.search.peer import PeerRun, cache_dit_runs, why_no_peer
from tc_deploy.search.points import Latency, Pictures, PlannedPoint, PointMaker, asked_conditions
from tc_deploy.search.record import (
    FORMAT_VERSION,
    FULL_POINT,
    Kind,
    PointRecord,
    ScreenedRecord,
    SearchRecord,
    SettingsRecord,
    VariantCost,
    read_search,
)
from tc_deploy.search.remarks import front_names, remarks_of
from tc_deploy.search.screen import Screen
from tc_deploy.search.space import Judged, candidates, chosen_for_engines, judge_candidates, settings_of
from tc_deploy.tokencache.sampler import Sampling, device_of
from tc_deploy.types import FloatArray, Skip

Report = Callable[[str, int, int], None]
"""(what is being done, done, of how many)."""

CONFIRMATION_SEED = 3_000_000
SAMPLE_PICTURES = 8
GRID_ROUNDS = 5
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
        StorageError: the destination cannot be written.
    """
    check_wish(wish, "flops" if from_flops else "measured")
    check_device(device)
    check_replaceable(destination, marker=PLAN)
    registry.backend(backend).version()
    judge = None if recipe.quality.classifier is None else Classifier(Path(recipe.quality.classifier))
    if recipe.sampling.steps < MIN_STEPS:
        raise PlanError(
            f"search: expected {MIN_STEPS} steps or more, two phases of a full and a cached one, found"
            f" {recipe.sampling.steps}; raise --steps"
        )
    report("loading the checkpoint", 0, 1)
    model = model_from_recipe(recipe, device)
    if judge is not None:
        judge.check_fits(model.geometry.latent_shape)
    search = _Search(recipe, model, destination, backend, batch_size, from_flops=from_flops, report=report)
    record, plans, samples = search.run(judge)
    write_search(record, plans, samples, destination, wish)
    shutil.rmtree(search.work, ignore_errors=True)
    return read_search(destination)


class _Search:
    """One search's parts, in the order in which they run."""

    def __init__(
        self,
        recipe: Recipe,
        model: DiffusionTransformer,
        destination: Path,
        backend: str,
        batch_size: int,
        *,
        from_flops: bool,
        report: Report,
    ) -> None:
        self.recipe, self.model, self.report = recipe, model, report
        self.backend, self.batch_size, self.from_flops = backend, batch_size, from_flops
        self.sampling: Sampling = sampling_from_recipe(recipe, model)
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
        self.work = destination.parent / f".{destination.name}.work"
        self.folder = self.work / sha256_of_bytes(canonical_json(identity).encode())[:16]
        self.maker = PointMaker(self.folder, Path(recipe.model), backend, batch_size)

    def run(self, judge: Classifier | None) -> tuple[SearchRecord, dict[str, PlannedPoint], dict[str, FloatArray]]:
        baselines = tuple(self.baselines.all())
        importance = self._importance()
        variants: tuple[VariantCost, ...] = ()
        costs = None
        if not self.from_flops:
            variants = self._timed_graphs(self.maker.bundle(self.full.plan, self.full.tables))
            costs = cost_model(self.model.geometry.tokens, variants)
        judged, ours = self._screened(importance, costs)
        ours = uniquely_named(ours)
        planned = [self.full, *ours, *baselines]
        for point in ours:
            planned += self.baselines.twins(point, importance)
        points, lost, samples = self._confirmed(planned, judge)
        remarks = list(remarks_of(points, "flops" if self.from_flops else "measured"))
        reason = why_no_peer()
        if reason is not None:
            remarks.append(f"cache-dit was not compared: {reason}.")
        remarks += [f"{name} was left out: its pictures are not finite." for name in lost]
        stored = safetensors.numpy.save(samples)
        record = SearchRecord(
            kind="search",
            format_version=FORMAT_VERSION,
            made_by=f"tc-deploy {__version__}",
            date=dt.datetime.now(dt.UTC).date().isoformat(),
            model=self.model.record(),
            hardware=hardware_line(),
            latency_source="flops" if self.from_flops else "measured",
            backend=self.backend,
            backend_version=registry.backend(self.backend).version(),
            batch_size=self.batch_size,
            seed=self.recipe.seed,
            screening_seeds=self.recipe.search.screening_samples,
            confirmation_seeds=self.recipe.search.confirmation_samples,
            settings=self.recipe.search.model_dump(mode="json"),
            variants=variants,
            screened=tuple(ScreenedRecord.model_validate(settings_of(item)) for item in judged),
            points=points,
            remarks=tuple(remarks),
            samples=FileRecord(size_bytes=len(stored), sha256=sha256_of_bytes(stored)),
        )
        return record, {point.name: point for point in planned}, samples

    def _importance(self) -> FloatArray:
        """(T, L, N) scores; one Cache Predictor serves the whole search."""
        steps = self.sampling.steps
        ratio = max(self.recipe.search.keep_ratio) / 2
        settings = self.recipe.model_copy(
            update={"cache": self.recipe.cache.model_copy(update={"keep_counts": None, "keep_ratio": (ratio, ratio)})}
        )
        schedule = Schedule(steps=steps, boundary=steps, k1=min(REFERENCE_INTERVAL, steps), k2=1)
        importance, _ = importance_of(settings, self.model, self.sampling, schedule, self.folder, self.report)
        return importance

    def _timed_graphs(self, reference: Path) -> tuple[VariantCost, ...]:
        """Every setting of the space that runs blocks, on its grid of keep ratios; and skipping, and the solver.

        Kept as soon as they are known: timed again they would be others, and with them the candidates that are tried.
        """
        path = self.folder / "variants.json"
        try:
            return tuple(VariantCost.model_validate(cost) for cost in json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            pass
        wanted: dict[Setting, None] = {
            (item.reuse, item.attention, item.forecast_order): None for item in self.space.values() if item.runs_blocks
        }
        tokens = self.model.geometry.tokens
        counts = {round(ratio * tokens) for ratio in (0.0, *self.recipe.search.keep_ratio)}
        ratios = sorted(count / tokens for count in counts - {tokens})
        grids: list[tuple[Setting | None, tuple[float, float], CacheRecord]] = []
        highest = max(self.recipe.search.forecast_order)
        first = (self.recipe.search.reuse[0], self.recipe.search.attention[0], highest)
        grids.append((None, (0.0, 0.0), self._grid_record(first, (0.0, 0.0), Skip.MODEL)))
        pairs = list(zip(ratios[::2], [*ratios[1::2], ratios[-1]], strict=False))
        grids += [
            (setting, pair, self._grid_record(setting, pair, Skip.BLOCKS)) for setting in wanted for pair in pairs
        ]
        bundles = []
        for done, (_, _, cache) in enumerate(grids):
            self.report("building graphs to time", done, len(grids))
            bundles.append(self._grid_bundle(cache))
        found = time_graphs(
            reference,
            bundles,
            self.backend,
            self.batch_size,
            GRID_ROUNDS,
            lambda done, total: self.report("timing graphs in turn", done, total),
        )
        costs: list[VariantCost] = []
        for (setting, pair, _), figures in zip(grids, found, strict=True):
            costs.append(variant_cost("solver", figures["solver"], setting))
            if setting is None:
                costs.append(variant_cost("skip", figures["cached-1"]))
                continue
            costs.append(variant_cost("full", figures["full"], setting))
            for graph, ratio in zip(("cached-1", "cached-2"), pair, strict=True):
                if not any(
                    cost.graph == "keep"
                    and cost.keep_ratio == ratio
                    and (cost.reuse, cost.attention, cost.forecast_order) == setting
                    for cost in costs
                ):
                    costs.append(variant_cost("keep", figures[graph], setting, ratio))
        write_bytes(path, canonical_json([cost.model_dump(mode="json") for cost in costs]).encode())
        return tuple(costs)

    def _grid_record(self, setting: Setting, ratios: tuple[float, float], skip: Skip) -> CacheRecord:
        blocks, tokens = len(self.model.blocks), self.model.geometry.tokens
        counts = [(round(ratio * tokens),) * blocks for ratio in ratios]
        reuse, attention, order = setting
        return CacheRecord(
            reuse=reuse, attention=attention, forecast_order=order, keep_counts=(counts[0], counts[1]), skip=skip
        )

    def _grid_bundle(self, cache: CacheRecord) -> Path:
        steps = self.sampling.steps
        interval = min(REFERENCE_INTERVAL, max(2, steps // 2))
        schedule = Schedule(steps=steps, boundary=steps // 2, k1=interval, k2=interval)
        point = self.baselines.cached(schedule, cache, "grid", Kind.TOKEN_CACHE)
        return self.maker.bundle(point.plan, point.tables, check=False)

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
        ours = []
        for item in chosen_for_engines(judged, settings.points):
            plan, tables = assemble_plan(
                self.model,
                self.sampling,
                item.candidate.schedule(steps),
                screen.cache(item.candidate),
                screen.token_index(item.candidate),
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

    def _confirmed(
        self, planned: Sequence[PlannedPoint], judge: Classifier | None
    ) -> tuple[tuple[PointRecord, ...], list[str], dict[str, FloatArray]]:
        """Build, run and time every point.

        Returns:
            Points, the full run first; the names of those whose pictures are not finite; samples by name.
        """
        count = self.recipe.search.confirmation_samples
        asked = self._asked(count)
        bundles = []
        for done, point in enumerate(planned):
            self.report("building points and baselines", done, len(planned))
            bundles.append(self.maker.bundle(point.plan, point.tables))
        converged = self.baselines.converged()
        exact = None
        if converged is not None:
            self.report("making the converged run's pictures", 0, 1)
            exact = self.maker.pictures(
                self.maker.bundle(converged.plan, converged.tables),
                asked,
                CONFIRMATION_SEED,
                lambda done, total: self.report("making the converged run's pictures", done, total),
            )
        pictures: list[Pictures] = []
        for done, bundle in enumerate(bundles):
            self.report("making pictures", done, len(planned))
            pictures.append(self.maker.pictures(bundle, asked, CONFIRMATION_SEED))
        if not np.isfinite(pictures[0].latents).all():
            raise BackendError(f"{bundles[0]}: the full run's pictures are not finite on {self.backend}; use another")
        if exact is not None and not np.isfinite(exact.latents).all():
            exact = None
        latencies: list[Latency | None] = []
        for done, bundle in enumerate(bundles):
            self.report("timing points in turn with the full run", done, len(planned))
            timed = not self.from_flops
            rounds = self.recipe.search.latency_rounds
            latencies.append(self.maker.latency(bundles[0], bundle, rounds) if timed else None)
        times_ms = [latency.full_ms for latency in latencies if latency is not None]
        full_ms = float(np.median(times_ms)) if times_ms else None
        timesteps = planned[0].plan.sampling.timesteps
        found = [
            self._point(
                point,
                made,
                pictures[0],
                exact,
                latency,
                full_ms,
                judge,
                same_steps=point.plan.sampling.timesteps == timesteps,
            )
            for point, made, latency in zip(planned, pictures, latencies, strict=True)
            if np.isfinite(made.latents).all()
        ]
        peers = self._peers(count)
        found += [self._peer_point(run, pictures[0], exact, judge) for run in peers if run.latents.isfinite().all()]
        on_front = front_names(found)
        points = [point.model_copy(update={"on_front": point.name in on_front}) for point in found]
        ordered = [points[0], *sorted(points[1:], key=lambda point: point.latency_ratio)]
        samples = {
            point.name: np.ascontiguousarray(made.latents[:SAMPLE_PICTURES])
            for point, made in zip(planned, pictures, strict=True)
        } | {run.name: run.latents[:SAMPLE_PICTURES].contiguous().numpy() for run in peers}
        names = {point.name for point in points}
        lost = [name for name in samples if name not in names]
        return tuple(ordered), lost, {name: latents for name, latents in samples.items() if name in names}

    def _asked(self, count: int) -> Conditions:
        """What the confirmation's pictures are conditioned on."""
        seeds = range(CONFIRMATION_SEED, CONFIRMATION_SEED + count)
        return asked_conditions(self.model, self.sampling, seeds)

    def _peers(self, count: int) -> tuple[PeerRun, ...]:
        """cache-dit in PyTorch on the same noise and labels; nothing where it is not installed."""
        asked = self._asked(count)
        noise = torch.from_numpy(noise_of(self.model.geometry.latent_shape, CONFIRMATION_SEED, count))
        return cache_dit_runs(
            self.model,
            self.sampling,
            noise,
            tensors_of(asked),
            batch_size=self.batch_size,
            rounds=0 if self.from_flops else self.recipe.search.latency_rounds,
            kept=self.folder / "peers",
            progress=lambda done, total: self.report("sampling under cache-dit", done, total),
        )

    def _peer_point(
        self, run: PeerRun, full: Pictures, exact: Pictures | None, judge: Classifier | None
    ) -> PointRecord:
        ratio = run.cost_in_full_steps / self.sampling.steps if run.latency_ratio is None else run.latency_ratio
        return PointRecord(
            name=run.name,
            kind=Kind.CACHE_DIT,
            runtime="pytorch",
            settings=None,
            steps_full=run.steps_full,
            steps_cached=run.steps_cached,
            cost_in_full_steps=round(run.cost_in_full_steps, 3),
            latency_ms=None,
            latency_ratio=round(ratio, 4),
            latency_iqr=run.latency_iqr or 0.0,
            drift=None,
            on_front=False,
            predicted_latency_ratio=None,
            **self._figures(run.latents, full, exact, judge),
        )

    def _point(
        self,
        point: PlannedPoint,
        made: Pictures,
        full: Pictures,
        exact: Pictures | None,
        latency: Latency | None,
        full_ms: float | None,
        judge: Classifier | None,
        *,
        same_steps: bool,
    ) -> PointRecord:
        schedule = point.plan.tprr()
        cost = point.plan.cost_in_full_steps()
        ratio = cost / self.sampling.steps if latency is None else latency.ratio
        if point.name == FULL_POINT:
            ratio = 1.0  # timed against itself, it shows how noisy the machine is
        return PointRecord(
            name=point.name,
            kind=point.kind,
            runtime="engines",
            settings=SettingsRecord(
                scheduler_class=point.plan.sampling.scheduler_class,
                schedule=point.plan.schedule,
                cache=point.plan.cache,
            ),
            steps_full=schedule.full_steps,
            steps_cached=schedule.steps - schedule.full_steps,
            cost_in_full_steps=round(cost, 3),
            latency_ms=None if full_ms is None else round(ratio * full_ms, 3),
            latency_ratio=round(ratio, 4),
            latency_iqr=0.0 if latency is None else latency.iqr,
            drift=drift(torch.from_numpy(made.trajectory), torch.from_numpy(full.trajectory)) if same_steps else None,
            on_front=False,
            predicted_latency_ratio=point.predicted_latency_ratio,
            **self._figures(torch.from_numpy(made.latents), full, exact, judge),
        )

    def _figures(
        self, latents: torch.Tensor, full: Pictures, exact: Pictures | None, judge: Classifier | None
    ) -> dict[str, Any]:
        """A point's quality, to the full run and to the converged one."""
        geometry = self.model.geometry
        given = self._asked(len(latents)).given
        labels = next((torch.from_numpy(given[item.name]) for item in geometry.conditions if item.classes), None)
        quality = compare(latents, torch.from_numpy(full.latents), labels, pixels=geometry.pixels, judge=judge)
        converged = None
        if exact is not None:
            converged = round(picture_psnr_db(latents, torch.from_numpy(exact.latents), pixels=geometry.pixels), 2)
        return {"quality": quality, "converged_psnr_db": converged}
