"""Everything that a report is drawn from: the plan, its tables, and what a bundle and a search add.

In: a folder ``calibration/NAME`` or ``engines/NAME``. Out: a checked :class:`Source`. Never: loads a model.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from tc_deploy.bundle import MANIFEST, check_files, reading, real_path, sha256_of_file
from tc_deploy.consistency import read_documents
from tc_deploy.errors import BundleError
from tc_deploy.manifest import BUNDLE_FOLDER, Manifest, TargetManifest, check_is_whole, read_target
from tc_deploy.plan import PLAN, PLAN_FOLDER, SAMPLES, SEARCH, Plan, content_sha256, load_plan_as_written
from tc_deploy.search.record import (
    FULL_POINT,
    Kind,
    PointRecord,
    SearchRecord,
    SettingsRecord,
    read_search,
)
from tc_deploy.tensors import read_tensors
from tc_deploy.types import FloatArray, IntArray
from tc_deploy.validate.record import ValidationRecord, read_validation

OURS = (Kind.FULL, Kind.TOKEN_CACHE)
"""What is no baseline."""
COMPARABLE_LATENCY = 1.05
"""A baseline that takes up to this many times the plan's latency is compared with it: a little more, so that one which
is better and hardly slower is not passed over."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a folder holds."""

    name: str
    """The folder's; where it lies is nobody's business to whom the page is passed on."""
    plan: Plan
    """As its file says it: paths are relative to the folder where they are not absolute."""
    tables: dict[str, FloatArray | IntArray]
    manifest: Manifest | None
    """None where the folder is a plan and no bundle."""
    targets: tuple[TargetManifest, ...]
    """The engines built from this very bundle."""
    search: SearchRecord | None
    validation: ValidationRecord | None
    samples: dict[str, FloatArray]
    """Final latents by the point's name, each (n, *latent shape); empty without a search."""

    @cached_property
    def chosen(self) -> PointRecord | None:
        """The point of the search that is this plan."""
        plan = self.plan
        settings, measured = SettingsRecord.of(plan), content_sha256(plan)
        # Random tokens have the settings of chosen ones; the tables, which differ, are no part of them.
        points = [
            point
            for point in self._points
            if point.settings == settings
            and point.kind is not Kind.RANDOM_TOKENS
            # What was measured on another plan says nothing of this one.
            and point.plan_sha256 in (None, measured)
        ]
        return min(points, key=lambda point: point.kind not in OURS, default=None)

    @cached_property
    def best_baseline(self) -> PointRecord | None:
        """The baseline closest to the full run of those that take no longer than the plan, or hardly."""
        chosen = self.chosen
        if chosen is None:
            return None
        return _closest(self.baselines, chosen)

    @cached_property
    def best_in_pytorch(self) -> PointRecord | None:
        """The same of the points that ran in PyTorch."""
        return None if self.chosen is None else _closest(self.in_pytorch, self.chosen)

    @property
    def baselines(self) -> tuple[PointRecord, ...]:
        """The points on engines that are neither the full run nor tc-deploy's."""
        return tuple(point for point in self._points if point.kind not in OURS and point.runtime == "engines")

    @property
    def in_pytorch(self) -> tuple[PointRecord, ...]:
        """The points that ran in PyTorch; their latency is to another full run."""
        return tuple(point for point in self._points if point.runtime == "pytorch")

    @property
    def _points(self) -> tuple[PointRecord, ...]:
        return () if self.search is None else self.search.points


def _closest(points: tuple[PointRecord, ...], chosen: PointRecord) -> PointRecord | None:
    slowest = chosen.latency_ratio * COMPARABLE_LATENCY
    fits = [point for point in points if point is not chosen and point.latency_ratio <= slowest]
    return max(fits, key=lambda point: point.quality.psnr_db, default=None)


def source_from_folder(path: Path, validation: Path | None = None) -> Source:
    """Read and check a plan folder or a bundle.

    Args:
        path: the folder.
        validation: what a validation of that bundle wrote.

    Raises:
        BundleError: the folder is neither, or a file in it is missing, truncated, altered or of another model.
        PlanError: the plan is inconsistent.
    """
    with reading(path, BUNDLE_FOLDER), reading(path, PLAN_FOLDER):
        return _source(path, validation)


def _source(path: Path, validation: Path | None) -> Source:
    if not (path / PLAN).is_file():
        raise BundleError(f"{path}: no {PLAN} in it; give a folder calibration/NAME or engines/NAME")
    check_is_whole(path)
    manifest = None
    if (path / MANIFEST).is_file():
        manifest = read_documents(path).manifest
    plan, tables = load_plan_as_written(path)
    search = read_search(path) if (path / SEARCH).is_file() else None
    if search is not None and search.model.weights_sha256 != plan.model.weights_sha256:
        raise BundleError(f"{path / SEARCH}: the search is of another model than {PLAN}; make the folder again")
    return Source(
        name=real_path(path).name,
        plan=plan,
        tables=tables,
        manifest=manifest,
        targets=() if manifest is None else _targets(path),
        search=search,
        validation=None if validation is None else _validation(path, validation),
        samples={} if search is None else _samples(path, search),
    )


def _validation(bundle: Path, file: Path) -> ValidationRecord:
    record = read_validation(file)
    manifest = bundle / MANIFEST
    if not manifest.is_file() or record.manifest_sha256 != sha256_of_file(manifest):
        raise BundleError(f"{file}: a validation of another export than {bundle}; validate that with -o {file}")
    return record


def _targets(bundle: Path) -> tuple[TargetManifest, ...]:
    found = []
    for file in sorted(bundle.glob(f"*/{MANIFEST}")):
        try:
            target = read_target(bundle, file.parent.name)
        except BundleError:
            continue  # built from another export, so nothing of it belongs to this bundle
        check_files(file.parent, target.files)
        found.append(target)
    return tuple(found)


def _samples(folder: Path, search: SearchRecord) -> dict[str, FloatArray]:
    check_files(folder, {SAMPLES: search.samples})
    where = folder / SAMPLES
    try:
        samples = read_tensors(where)
    except ValueError as error:
        raise BundleError(f"{where}: {error}; make it again") from None
    shapes = {latents.shape for latents in samples.values()}
    fit = len(shapes) <= 1 and all(latents.ndim > 2 and latents.size for latents in samples.values())
    if not fit or any(latents.dtype != np.float32 or not np.isfinite(latents).all() for latents in samples.values()):
        raise BundleError(f"{where}: expected finite (n, *latent shape) float32 latents of one shape; make it again")
    if samples and FULL_POINT not in samples:
        raise BundleError(f"{where}: no {FULL_POINT!r} in it, which the others are compared with; make it again")
    return samples
