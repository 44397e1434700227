"""Plans to points: pictures of seeds that the search did not see, latencies in turn with the full run, and peers.

In: plans, the full run first. Out: points, and samples of their pictures. Never: chooses one.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from tc_deploy.calibrate.asked import Report
from tc_deploy.calibrate.recipe import SearchRecipe
from tc_deploy.errors import NotFiniteError
from tc_deploy.models.family import DiffusionTransformer
from tc_deploy.plan import content_sha256
from tc_deploy.planned.prompts import tensors_of
from tc_deploy.quality.classifier import Classifier
from tc_deploy.quality.compare import compare
from tc_deploy.quality.metrics import drift, image_psnr_db
from tc_deploy.runtime.request import noise_of
from tc_deploy.search.built_points import Images, Latency, PlannedPoint, PointMaker, asked_conditions
from tc_deploy.search.in_pytorch import PeerRun
from tc_deploy.search.peer import cache_dit_runs
from tc_deploy.search.record import FULL_POINT, Kind, PointRecord, SettingsRecord
from tc_deploy.search.remarks import front_names
from tc_deploy.search.spectrum import spectrum_runs
from tc_deploy.tokencache.sampler import Sampling
from tc_deploy.types import FloatArray

FIRST_SEED = 3_000_000
SAMPLE_IMAGES = 8
OURS = (Kind.FULL, Kind.TOKEN_CACHE)
"""What is built however little time there is."""


@dataclass(frozen=True, kw_only=True)
class Confirmed:
    """What was found."""

    points: tuple[PointRecord, ...]
    """The full run first, then by latency."""
    lost: tuple[str, ...]
    """Names of those whose pictures are not finite."""
    late: tuple[str, ...]
    """Names of baselines that there was no time for."""
    samples: Mapping[str, FloatArray]
    """Latents of the first pictures by the point's name, ``(n, *latent shape)``."""


class Confirmation:
    """Makes points of plans.

    Args:
        recipe: how many pictures and rounds.
        model: the model.
        sampling: the sampler with all its steps.
        maker: builds, runs and times plans.
        judge: reads classes, where the recipe names one.
        timed: measure latencies, and do not quote FLOPs.
        report: told how far each part is.
    """

    def __init__(
        self,
        recipe: SearchRecipe,
        model: DiffusionTransformer,
        sampling: Sampling,
        maker: PointMaker,
        judge: Classifier | None,
        *,
        timed: bool,
        report: Report,
    ) -> None:
        self.model, self.sampling, self.maker, self.judge, self.report = model, sampling, maker, judge, report
        self.asked = asked_conditions(model, sampling, range(FIRST_SEED, FIRST_SEED + recipe.confirmation_samples))
        self.rounds = recipe.latency_rounds if timed else 0
        self.with_peers = recipe.baselines == "all"
        labels = (self.asked.given[item.name] for item in model.geometry.conditions if item.classes)
        self.labels = next((torch.from_numpy(found) for found in labels), None)

    def __call__(
        self, planned: Sequence[PlannedPoint], converged: PlannedPoint | None, deadline: float | None = None
    ) -> Confirmed:
        """Build, run and time every point.

        Args:
            planned: the full run first.
            converged: the run that a better solver is judged by; None where there is none.
            deadline: of :func:`time.monotonic`, after which no further baseline is built; None: none.

        Raises:
            NotFiniteError: the full run's pictures are not finite.
        """
        keys = {point.name: self.maker.graphs_key(point) for point in planned}
        ours = [point for point in planned if point.kind in OURS]
        self.maker.staying = {keys[point.name] for point in ours}
        full = self._images("the full run", planned[0])
        if not np.isfinite(full.latents).all():
            where = f"{self.model.source} on {self.maker.backend}"
            raise NotFiniteError(f"{where}: the full run's pictures are not finite; use another backend")
        made, latencies = self._made("plans", ours, keys, None)
        exact = None
        if converged is not None and not _is_over(deadline):
            exact = self._images("the converged run", converged)
            exact = exact if np.isfinite(exact.latents).all() else None
        others = [point for point in planned if point.kind not in OURS]
        more, more_latencies = self._made("baselines", others, keys, deadline)
        made, latencies = made | more, latencies | more_latencies
        late = tuple(point.name for point in planned if point.name not in made)
        planned = [point for point in planned if point.name in made]
        times_ms = [latency.full_ms for latency in latencies.values()]
        full_ms = float(np.median(times_ms)) if times_ms else None
        peers = self._peers() if self.with_peers and not _is_over(deadline) else ()
        points = [
            self._point(point, made[point.name], full, exact, latencies.get(point.name), full_ms)
            for point in planned
            if np.isfinite(made[point.name].latents).all()
        ]
        points += [self._peer_point(run, full, exact) for run in peers if run.latents.isfinite().all()]
        on_front = front_names(points)
        points = [point.model_copy(update={"on_front": point.name in on_front}) for point in points]
        latents = {name: images.latents for name, images in made.items()}
        latents |= {run.name: run.latents.numpy() for run in peers}
        found = {point.name for point in points}
        return Confirmed(
            points=(points[0], *sorted(points[1:], key=lambda point: point.latency_ratio)),
            lost=tuple(name for name in latents if name not in found),
            late=late,
            samples={name: np.ascontiguousarray(latents[name][:SAMPLE_IMAGES]) for name in latents if name in found},
        )

    def _images(self, whose: str, point: PlannedPoint) -> Images:
        what = f"making {whose}'s pictures"
        return self.maker.images(point, self.asked, FIRST_SEED, partial(self.report, what))

    def _made(
        self, which: str, planned: Sequence[PlannedPoint], keys: Mapping[str, str], deadline: float | None
    ) -> tuple[dict[str, Images], dict[str, Latency]]:
        """Pictures and, where they are measured, latencies by name, as long as there is time.

        Args:
            which: what messages call the points.
            planned: the points; those that share engines come one after another.
            keys: of their graphs, by name.
            deadline: after which no further one is built; None: none.
        """
        what = f"making pictures with {which}" + (", timing them" if self.rounds else "")
        pictures: dict[str, Images] = {}
        latencies: dict[str, Latency] = {}
        alike: dict[str, list[PlannedPoint]] = {}
        for point in planned:
            alike.setdefault(keys[point.name], []).append(point)
        for points in alike.values():
            made = []
            for point in points:
                if _is_over(deadline):
                    break
                said = partial(self._still_there, what, len(pictures), len(planned))
                said()
                pictures[point.name] = self.maker.images(point, self.asked, FIRST_SEED, said)
                made.append(point)
            if self.rounds:
                said = partial(self._still_there, what, len(pictures), len(planned))
                latencies |= self.maker.latencies(made, self.rounds, said)
        if planned:
            self.report(what, len(planned), len(planned))
        return pictures, latencies

    def _still_there(self, what: str, done: int, total: int, *of_a_point: object) -> None:  # noqa: ARG002
        """Say how far all is; told of every step of a point, so that nothing falls silent."""
        self.report(what, done, total)

    def _peers(self) -> tuple[PeerRun, ...]:
        """Spectrum and, where it is installed, cache-dit, in PyTorch on the same noise and conditions."""
        noise = torch.from_numpy(noise_of(self.model.geometry.latent_shape, FIRST_SEED, self.asked.count))
        found: list[PeerRun] = []
        for name, runs in (("Spectrum", spectrum_runs), ("cache-dit", cache_dit_runs)):
            found += runs(
                self.model,
                self.sampling,
                noise,
                tensors_of(self.asked),
                batch_size=self.maker.batch_size,
                rounds=self.rounds,
                kept=self.maker.work / "peers",
                progress=partial(self.report, f"sampling under {name}"),
            )
        return tuple(found)

    def _peer_point(self, run: PeerRun, full: Images, exact: Images | None) -> PointRecord:
        ratio = run.cost_in_full_steps / self.sampling.steps if run.latency_ratio is None else run.latency_ratio
        return PointRecord(
            name=run.name,
            kind=run.kind,
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
            **self._figures(run.latents, full, exact),
        )

    def _point(
        self,
        point: PlannedPoint,
        made: Images,
        full: Images,
        exact: Images | None,
        latency: Latency | None,
        full_ms: float | None,
    ) -> PointRecord:
        schedule = point.plan.run_schedule()
        cost = point.plan.cost_in_full_steps()
        ratio = cost / self.sampling.steps if latency is None else latency.ratio
        if point.name == FULL_POINT:
            ratio = 1.0  # timed against itself, it shows how noisy the machine is
        same_steps = point.plan.sampling.timesteps == self.maker.full.plan.sampling.timesteps
        return PointRecord(
            name=point.name,
            kind=point.kind,
            runtime="engines",
            settings=SettingsRecord.of(point.plan),
            plan_sha256=content_sha256(point.plan),
            steps_full=schedule.full_steps,
            steps_cached=schedule.steps - schedule.full_steps,
            cost_in_full_steps=round(cost, 3),
            latency_ms=None if full_ms is None else round(ratio * full_ms, 3),
            latency_ratio=round(ratio, 4),
            latency_iqr=0.0 if latency is None else latency.iqr,
            drift=drift(torch.from_numpy(made.trajectory), torch.from_numpy(full.trajectory)) if same_steps else None,
            on_front=False,
            **self._figures(torch.from_numpy(made.latents), full, exact),
        )

    def _figures(self, latents: torch.Tensor, full: Images, exact: Images | None) -> dict[str, Any]:
        """A point's quality, to the full run and to the converged one."""
        pixels = self.model.geometry.pixels
        quality = compare(latents, torch.from_numpy(full.latents), self.labels, pixels=pixels, judge=self.judge)
        converged = None
        if exact is not None:
            converged = round(image_psnr_db(latents, torch.from_numpy(exact.latents), pixels=pixels), 2)
        return {"quality": quality, "converged_psnr_db": converged}


def _is_over(deadline: float | None) -> bool:
    return deadline is not None and time.monotonic() > deadline
