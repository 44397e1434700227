"""Plans to points: built as engines, run on seeds that the search did not see, timed in turn with the full run.

Everything that was made for a point is kept in the work folder, so that a search that was killed goes on where it
stood.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from tc_deploy.backends.build import build_target
from tc_deploy.bench.clock import Clock
from tc_deploy.bench.interleave import interleaved
from tc_deploy.bench.spread import ratio_of
from tc_deploy.bundle import MANIFEST, canonical_json, sha256_of_bytes, write_bytes
from tc_deploy.calibrate.prompts import conditions_of, takes_prompts
from tc_deploy.conditions import Conditions, labelled_conditions
from tc_deploy.export.stage import export_bundle
from tc_deploy.models.family import DiffusionTransformer
from tc_deploy.plan import Plan, plan_sha256, save_plan
from tc_deploy.runtime.pipeline import Pipeline, Step
from tc_deploy.search.record import Kind
from tc_deploy.tokencache.sampler import Sampling
from tc_deploy.types import FloatArray, IntArray

PICTURE_BATCH = 8
"""Pictures that engines make at a time, as many as TensorRT's are built for unasked; none depends on it."""


@dataclass(frozen=True, kw_only=True)
class PlannedPoint:
    """A plan that is to become a point."""

    name: str
    kind: Kind
    plan: Plan
    tables: Mapping[str, FloatArray | IntArray]
    predicted_latency_ratio: float | None = None


@dataclass(frozen=True, kw_only=True)
class Pictures:
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

    Args:
        work: where bundles and results are kept.
        model_path: the checkpoint.
        backend: the engine kind.
        batch_size: pictures per run when latency is measured.
    """

    def __init__(self, work: Path, model_path: Path, backend: str, batch_size: int) -> None:
        self.work, self.model_path, self.backend, self.batch_size = work, model_path, backend, batch_size

    def bundle(self, plan: Plan, tables: Mapping[str, FloatArray | IntArray], *, check: bool = True) -> Path:
        """Export and build a plan, taking the graphs of an earlier bundle where they are the same.

        Args:
            plan: the plan.
            tables: its tables.
            check: compare graphs with PyTorch, or take those of an earlier bundle that were.
        """
        sharing = {
            "model": plan.model.weights_sha256,
            "cache": plan.cache.model_dump(mode="json"),
            "phases": plan.phases_used(),
            "guided": plan.sampling.guidance_scale is not None,
            # A graph that is only timed is not compared; a point may not take it for one that was.
            "checked": check,
        }
        graphs = self.work / "bundles" / sha256_of_bytes(canonical_json(sharing).encode())[:16]
        bundle = graphs / plan_sha256(plan)[:16]
        if (bundle / self.backend / MANIFEST).is_file():
            return bundle
        siblings = sorted(path.parent for path in graphs.glob(f"*/{MANIFEST}") if path.parent != bundle)
        folder = self.work / "plans" / bundle.name
        save_plan(plan, tables, folder)
        export_bundle(
            folder,
            bundle,
            model_path=self.model_path,
            check=check,
            graphs_from=siblings[0] if siblings else None,
            samples=False,
        )
        build_target(bundle, self.backend)
        return bundle

    def pictures(
        self,
        bundle: Path,
        asked: Conditions,
        seed: int,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Pictures:
        """Make pictures.

        Args:
            bundle: engines.
            asked: what the pictures are conditioned on; kept pictures are of the same.
            seed: the first picture's; the next one has the next.
            progress: told how many steps are done, and of how many.
        """
        count = asked.count
        path = self.work / "pictures" / f"{bundle.name}-{count}-{seed}.safetensors"
        try:
            stored = safetensors.numpy.load_file(path)
            return Pictures(latents=stored["latents"], trajectory=stored["trajectory"])
        except (OSError, SafetensorError):
            pass
        trajectory = []
        with Pipeline(bundle, self.backend, batch_size=min(PICTURE_BATCH, count)) as pipeline:
            total = -(-count // pipeline.batch_size) * pipeline.plan.schedule.steps

            def on_step(start: int, step: Step) -> None:
                if start == 0:
                    trajectory.append(step.read_latents())
                progress(start // pipeline.batch_size * step.total + step.index + 1, total)

            other = asked.unconditional if pipeline.manifest.guided else None
            latents = pipeline(conditions=asked.given, unconditional=other, seed=seed, on_step=on_step).latents
        made = {"latents": latents, "trajectory": np.stack(trajectory)}
        write_bytes(path, safetensors.numpy.save(made))
        return Pictures(**made)

    def latency(self, reference: Path, bundle: Path, rounds: int) -> Latency:
        """Time a bundle's run in turn with the full run.

        Args:
            reference: engines of the model's own run, without caches.
            bundle: engines of the point.
            rounds: how often each runs.
        """
        path = self.work / "latency" / f"{bundle.name}-{self.batch_size}-{rounds}.json"
        try:
            return Latency(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            pass
        clock = Clock()
        with (
            Pipeline(reference, self.backend, batch_size=self.batch_size) as full,
            Pipeline(bundle, self.backend, batch_size=self.batch_size) as point,
        ):
            requests = {
                name: functools.partial(
                    clock.timed, functools.partial(pipeline, **pipeline.placeholders(self.batch_size)), graphs=False
                )
                for name, pipeline in (("full", full), ("point", point))
            }
            interleaved(requests, 1)
            runs = interleaved(requests, rounds)
        full_ms = [run.wall_ms for run in runs["full"]]
        found = ratio_of([run.wall_ms for run in runs["point"]], full_ms)
        latency = Latency(ratio=found["median"], iqr=found["iqr"], full_ms=float(np.median(full_ms)))
        write_bytes(path, canonical_json(vars(latency)).encode())
        return latency


def asked_conditions(model: DiffusionTransformer, sampling: Sampling, seeds: Sequence[int]) -> Conditions:
    """What pictures of some seeds are conditioned on: labels, prompts in turn, or random draws."""
    if sampling.prompts is not None or takes_prompts(model):
        return conditions_of(model, sampling.prompts, seeds)
    needed = model.geometry.conditions
    labels = labels_of(len(seeds), seeds[0], needed[0].classes or 1)
    return labelled_conditions(needed, labels.tolist(), guided=sampling.guidance_scale is not None)


def labels_of(count: int, seed: int, classes: int) -> IntArray:
    """(count,) labels, drawn with the seed."""
    return np.random.default_rng(seed).integers(classes, size=count, dtype=np.int32)
