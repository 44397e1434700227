"""Plans to points: built as engines, run on seeds that the search did not see, timed in turn with the full run.

Everything that was made for a point is kept in the work folder, so that a search that was killed goes on where it
stood.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from tc_deploy.backends.build import build_target
from tc_deploy.bench.spread import ratio_of
from tc_deploy.bundle import canonical_json, new_folder, remove_folder, remove_folders, sha256_of_bytes, write_state
from tc_deploy.conditions import Conditions, labelled_conditions
from tc_deploy.errors import BundleError
from tc_deploy.export.bundle_export import export_bundle
from tc_deploy.export.options import ExportOptions
from tc_deploy.manifest import BUNDLE_FOLDER, TARGET_FOLDER, read_target
from tc_deploy.models.family import DiffusionTransformer
from tc_deploy.plan import PLAN_FOLDER, Plan, plan_sha256, save_plan
from tc_deploy.planned.prompts import conditions_of, takes_prompts
from tc_deploy.runtime.batches import Step
from tc_deploy.runtime.pipeline import Pipeline
from tc_deploy.search.record import Kind
from tc_deploy.search.turns import times_in_turn
from tc_deploy.tokencache.sampler import Sampling
from tc_deploy.types import FloatArray, IntArray

IMAGE_BATCH = 8
"""Pictures that engines make at a time, as many as TensorRT's are built for unasked; none depends on it."""

DISTURBED = 0.1
"""A latency whose rounds are spread by more than this share is measured again."""


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


class PointMaker:
    """Builds and runs points.

    Every bundle holds the model's weights, so only the full run's stays on disk; any other is deleted when the next is
    made. What was made with it stays.

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

    def graphs_key(self, point: PlannedPoint) -> str:
        """What a point's graphs depend on: two of the same key share all but the solver, and are best made in a row."""
        plan = point.plan
        facts = {
            "model": plan.model.weights_sha256,
            "cache": plan.cache.model_dump(mode="json"),
            "phases": plan.phases_used(),
            "guided": plan.sampling.guidance_scale is not None,
        }
        return sha256_of_bytes(canonical_json(facts).encode())[:16]

    def bundle(self, point: PlannedPoint) -> Path:
        """Export and build a point's plan; graphs and engines that the last bundle or the full run's has are taken.

        Args:
            point: what to build.

        Returns:
            The bundle; it is there until the next one is made.
        """
        graphs = self.work / "bundles" / self.graphs_key(point)
        bundle = graphs / _plan_key(point)
        if _is_built(bundle, self.backend):
            return bundle
        siblings = sorted(path for path in graphs.glob("*") if _is_built(path, self.backend))[:1]
        self._discard(siblings)
        folder = self.work / "plans" / bundle.name
        save_plan(point.plan, point.tables, folder)
        export_bundle(
            folder,
            bundle,
            ExportOptions(model_path=self.model_path, graphs_from=siblings[0] if siblings else None, samples=False),
        )
        if siblings:
            # A build takes from the target that it replaces what is of the same graphs.
            with new_folder(bundle / self.backend, TARGET_FOLDER) as copy:
                shutil.copytree(siblings[0] / self.backend, copy, dirs_exist_ok=True)
        build_target(bundle, self.backend, self.build_options())
        self._discard([bundle])
        return bundle

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
        # A point that comes to nothing is left out of the search's result, which says so.
        size = min(IMAGE_BATCH, count)
        with Pipeline(self.bundle(point), self.backend, batch_size=size, check_finite=False) as pipeline:
            total = -(-count // pipeline.batch_size) * pipeline.plan.schedule.steps

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

    def latency(self, point: PlannedPoint, rounds: int) -> Latency:
        """Time a point's run in turn with the full run.

        Args:
            point: what to time.
            rounds: how often each runs.
        """
        path = self.work / "latency" / f"{_plan_key(point)}-{rounds}.json"
        try:
            return Latency(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            pass
        reference, bundle = self.bundle(self.full), self.bundle(point)
        latency = self._timed(reference, bundle, rounds)
        if latency.iqr > DISTURBED * latency.ratio:  # something else ran: the calmer of two counts
            latency = min(latency, self._timed(reference, bundle, rounds), key=lambda found: found.iqr)
        write_state(path, canonical_json(vars(latency)).encode())
        return latency

    def _timed(self, reference: Path, bundle: Path, rounds: int) -> Latency:
        full_ms, times_ms = times_in_turn(reference, bundle, self.backend, self.batch_size, rounds)
        found = ratio_of(times_ms, full_ms)
        return Latency(ratio=found["median"], iqr=found["iqr"], full_ms=float(np.median(full_ms)))

    def _discard(self, needed: Sequence[Path]) -> None:
        """Delete all bundles but the full run's and those that are needed."""
        kept = {*needed, self.work / "bundles" / self.graphs_key(self.full) / _plan_key(self.full)}
        for path in self.work.glob("bundles/*/*"):
            if path not in kept:
                remove_folder(path, BUNDLE_FOLDER)

    def discard_all(self) -> None:
        """Delete all bundles and plans."""
        for graphs in self.work.glob("bundles/*"):
            remove_folders(graphs, BUNDLE_FOLDER)
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
