"""Plans to points: run on engines, on seeds that the search did not see, and timed in turn with the full run.

Plans that need the same graphs share engines, and differ in the tables that these run by; of two that need some graphs
alike, these are exported once. Everything that was made for a point is kept in the work folder, so that a search that
was killed goes on where it stood.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from tc_deploy.backends.base import Device, Graph
from tc_deploy.backends.build import build_target
from tc_deploy.backends.load import load_target
from tc_deploy.bench.spread import ratio_of
from tc_deploy.bundle import canonical_json, remove_folder, remove_folders, sha256_of_bytes, write_state
from tc_deploy.conditions import Conditions, labelled_conditions
from tc_deploy.consistency import Documents, read_documents, with_another_plan
from tc_deploy.errors import BundleError
from tc_deploy.export.bundle_export import export_bundle, runtime_tables_of
from tc_deploy.export.options import ExportOptions
from tc_deploy.manifest import BUNDLE_FOLDER, read_target
from tc_deploy.models.family import DiffusionTransformer
from tc_deploy.models.solver import SolverTable, read_solver
from tc_deploy.plan import PLAN_FOLDER, Plan, plan_sha256, save_plan
from tc_deploy.planned.model import sampling_from_plan
from tc_deploy.planned.prompts import conditions_of, takes_prompts
from tc_deploy.runtime.batches import Step
from tc_deploy.runtime.pipeline import Pipeline
from tc_deploy.search.record import Kind
from tc_deploy.search.remarks import DISTURBED
from tc_deploy.search.turns import times_in_turn
from tc_deploy.tokencache.sampler import Sampling
from tc_deploy.types import FloatArray, IntArray

IMAGE_BATCH = 8
"""Pictures that engines make at a time, as many as TensorRT's are built for unasked; none depends on it."""

TRIES = 3
"""So often at most a latency is measured that something disturbs; the calmest counts."""
TOGETHER = 6
"""Points that are timed in the same rounds, so that the full run is not timed once for each."""


@dataclass(frozen=True, kw_only=True)
class PlannedPoint:
    """A plan that is to become a point."""

    name: str
    kind: Kind
    plan: Plan
    tables: Mapping[str, FloatArray | IntArray]


@dataclass(frozen=True, kw_only=True)
class Images:
    """What a point's engines made."""

    latents: FloatArray
    """(n, C, H, W)."""
    trajectory: FloatArray
    """(T, b, C, H, W): the first batch's latents after every step."""


@dataclass(frozen=True, kw_only=True)
class Latency:
    """A point's latency over the full run's, in rounds in which both ran."""

    ratio: float
    iqr: float
    full_ms: float
    """The full run's median in these rounds."""

    @property
    def is_disturbed(self) -> bool:
        """Whether something else ran meanwhile."""
        return self.iqr > DISTURBED * self.ratio


@dataclass(frozen=True, kw_only=True, eq=False)
class _Loaded:
    """A bundle whose engines are loaded, for any plan that needs the same graphs."""

    path: Path
    documents: Documents
    engines: tuple[Device, Mapping[str, Graph]]


class PointMaker:
    """Builds and runs points.

    Every bundle holds the model's weights, so on disk stay the full run's and those that are asked to; any other is
    deleted when the next is made. What was made with it stays.

    Args:
        work: where bundles and results are kept.
        model_path: the checkpoint.
        backend: the engine kind.
        batch_size: pictures per run when latency is measured.
        full: the model's own run.
    """

    def __init__(self, work: Path, model_path: Path, backend: str, batch_size: int, full: PlannedPoint) -> None:
        self.work, self.model_path, self.backend, self.batch_size = work, model_path, backend, batch_size
        self.full = full
        self.staying: Collection[str] = ()
        """Keys of the graphs whose bundles stay, because later ones have some of them too."""
        self._loaded: dict[str, _Loaded] = {}
        self._solvers: dict[str, SolverTable] = {}

    def graphs_key(self, point: PlannedPoint) -> str:
        """What a point's graphs depend on: points of the same key share engines, and are best made in a row."""
        plan = point.plan
        facts = {
            "model": plan.model.weights_sha256,
            "cache": plan.cache.model_dump(mode="json"),
            "phases": plan.phases_used(),
            "guided": plan.sampling.guidance_scale is not None,
            "history": self._solver(plan).history,
        }
        return sha256_of_bytes(canonical_json(facts).encode())[:16]

    def _solver(self, plan: Plan) -> SolverTable:
        """A plan's sampler as a table."""
        key = canonical_json(plan.sampling.model_dump(mode="json"))
        if key not in self._solvers:
            sampling = sampling_from_plan(plan)
            self._solvers[key] = read_solver(sampling.scheduler, sampling.steps, sampling.set_timesteps_kwargs)
        return self._solvers[key]

    def engines(self, point: PlannedPoint, progress: Callable[[str], None] = lambda message: None) -> _Loaded:
        """Load a point's engines, which are exported and built where no point before it had the same.

        Args:
            point: whose.
            progress: told what is being done, where something is.
        """
        key, full = self.graphs_key(point), self.graphs_key(self.full)
        if key not in self._loaded:
            self._loaded = {other: loaded for other, loaded in self._loaded.items() if other == full}
            bundle = self._bundle(point, key, progress)
            documents = read_documents(bundle, graphs=False)
            engines = load_target(bundle, documents.manifest, self.backend)
            self._loaded[key] = _Loaded(path=bundle, documents=documents, engines=engines)
        return self._loaded[key]

    def _bundle(self, point: PlannedPoint, key: str, progress: Callable[[str], None]) -> Path:
        """A bundle with a point's graphs; those that another bundle holds are taken."""
        bundles = self.work / "bundles"
        bundle = bundles / key
        if not _is_built(bundle, self.backend):
            built = sorted(path for path in bundles.glob("*") if path != bundle and _is_built(path, self.backend))
            folder = self.work / "plans" / key
            save_plan(point.plan, point.tables, folder)
            options = ExportOptions(model_path=self.model_path, graphs_from=tuple(built), samples=False)
            export_bundle(folder, bundle, options, progress)
            build_target(bundle, self.backend, self.build_options(), lambda what, done, total: progress(what))
        stay = {key, self.graphs_key(self.full), *self.staying}
        for path in bundles.glob("*"):
            if path.name not in stay:
                remove_folder(path, BUNDLE_FOLDER)
        return bundle

    def pipeline(self, point: PlannedPoint, batch_size: int) -> Pipeline:
        """A point on its engines."""
        loaded, plan = self.engines(point), point.plan
        tables = plan.step_tables(point.tables)
        runtime_tables = runtime_tables_of(self._solver(plan))
        return Pipeline(
            loaded.path,
            self.backend,
            batch_size=batch_size,
            engines=loaded.engines,
            documents=with_another_plan(loaded.documents, plan, tables, runtime_tables, loaded.path),
            check_finite=False,
        )

    def images(
        self,
        point: PlannedPoint,
        asked: Conditions,
        seed: int,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Images:
        """Make pictures.

        Args:
            point: on whose engines.
            asked: what the pictures are conditioned on; kept pictures are of the same.
            seed: the first picture's; the next one has the next.
            progress: told how many steps are done, and of how many.
        """
        count = asked.count
        path = self.work / "pictures" / f"{_plan_key(point)}-{count}-{seed}.safetensors"
        try:
            stored = safetensors.numpy.load_file(path)
            return Images(latents=stored["latents"], trajectory=stored["trajectory"])
        except (OSError, SafetensorError):
            pass
        trajectory = []
        size, steps = min(IMAGE_BATCH, count), point.plan.schedule.steps
        total = -(-count // size) * steps
        self.engines(point, lambda _: progress(0, total))
        # A point that comes to nothing is left out of the search's result, which says so.
        with self.pipeline(point, size) as pipeline:

            def on_step(start: int, step: Step) -> None:
                if start == 0:
                    trajectory.append(step.read_latents())
                progress(start // pipeline.batch_size * step.total + step.index + 1, total)

            other = asked.unconditional if pipeline.manifest.guided else None
            images: dict[str, Any] = {"conditions": asked.given} if asked.given else {"count": count}
            latents = pipeline(**images, unconditional=other, seed=seed, on_step=on_step).latents
        made = {"latents": latents, "trajectory": np.stack(trajectory)}
        write_state(path, safetensors.numpy.save(made))
        return Images(**made)

    def latencies(
        self,
        points: Sequence[PlannedPoint],
        rounds: int,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> dict[str, Latency]:
        """Time points' runs in turn with the full run, some points in the same rounds.

        Args:
            points: what to time, of the same graphs.
            rounds: how often each runs.
            progress: told how many runs are done, and of how many.

        Returns:
            By name.
        """
        found: dict[str, Latency] = {}
        paths = {point.name: self.work / "latency" / f"{_plan_key(point)}-{rounds}.json" for point in points}
        for name, path in paths.items():
            with contextlib.suppress(OSError, ValueError):
                found[name] = Latency(**json.loads(path.read_text(encoding="utf-8")))
        missing = [point for point in points if point.name not in found]
        for start in range(0, len(missing), TOGETHER):
            timed = self._timed(missing[start : start + TOGETHER], rounds, progress)
            for name, latency in timed.items():
                write_state(paths[name], canonical_json(vars(latency)).encode())
            found |= timed
        return found

    def _timed(
        self, points: Sequence[PlannedPoint], rounds: int, progress: Callable[[int, int], None]
    ) -> dict[str, Latency]:
        """Time some points in the same rounds, and those again that something else disturbed."""
        best: dict[str, Latency] = {}
        for _ in range(TRIES):
            with contextlib.ExitStack() as stack:
                reference = stack.enter_context(self.pipeline(self.full, self.batch_size))
                others = {p.name: stack.enter_context(self.pipeline(p, self.batch_size)) for p in points}
                full_ms, times_ms = times_in_turn(reference, others, rounds, progress)
            for name, found_ms in times_ms.items():
                ratio = ratio_of(found_ms, full_ms)
                latency = Latency(ratio=ratio["median"], iqr=ratio["iqr"], full_ms=float(np.median(full_ms)))
                best[name] = min(best.get(name, latency), latency, key=lambda found: found.iqr)
            points = [point for point in points if best[point.name].is_disturbed]
            if not points:
                break
        return best

    def discard_all(self) -> None:
        """Delete all bundles and plans."""
        self._loaded = {}
        remove_folders(self.work / "bundles", BUNDLE_FOLDER)
        remove_folders(self.work / "plans", PLAN_FOLDER)

    def build_options(self) -> dict[str, Any]:
        """TensorRT's engines run batches of a range that is fixed when they are built, and best at one of them."""
        if not self.backend.startswith("tensorrt"):
            return {}
        return {"batch_profile": (1, self.batch_size, max(self.batch_size, IMAGE_BATCH))}


def _plan_key(point: PlannedPoint) -> str:
    return plan_sha256(point.plan)[:16]


def _is_built(bundle: Path, backend: str) -> bool:
    """Whether a bundle is whole, and its engines are of it and of no bundle that they were copied from."""
    try:
        read_target(bundle, backend)
    except (BundleError, OSError):
        return False
    return True


def asked_conditions(model: DiffusionTransformer, sampling: Sampling, seeds: Sequence[int]) -> Conditions:
    """What pictures of some seeds are conditioned on: labels, prompts in turn, or random draws."""
    if sampling.prompts is not None or takes_prompts(model):
        return conditions_of(model, sampling.prompts, seeds)
    needed = model.geometry.conditions
    if not needed:
        return Conditions(count=len(seeds), given={}, unconditional={})
    labels = labels_of(len(seeds), seeds[0], needed[0].classes or 1)
    return labelled_conditions(needed, labels.tolist(), guided=sampling.guidance_scale is not None)


def labels_of(count: int, seed: int, classes: int) -> IntArray:
    """(count,) labels, drawn with the seed."""
    return np.random.default_rng(seed).integers(classes, size=count, dtype=np.int32)
