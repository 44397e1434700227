"""A finished search as a folder, and the choice of its plan by what a user asks for.

In: a record, its points' plans, a wish. Out: a plan folder that also holds the record, samples, and every point's plan,
so that another wish needs no other search. Never: samples or times anything.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import safetensors.numpy

from tc_deploy.bundle import Claim, canonical_json, check_files, claimed, reading, relative_path
from tc_deploy.errors import BundleError, UsageError
from tc_deploy.plan import (
    PLAN_FOLDER,
    POINTS,
    SAMPLES,
    SEARCH,
    load_plan,
    write_plan_files,
)
from tc_deploy.search.built_points import PlannedPoint
from tc_deploy.search.record import (
    FULL_POINT,
    LatencySource,
    PointRecord,
    SearchRecord,
    read_search,
)
from tc_deploy.search.remarks import unproven_tokens
from tc_deploy.tensors import read_tensors
from tc_deploy.types import FloatArray

DEFAULT_SHARE = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wish:
    """What a user asks of a plan; with neither, half of the full run's latency."""

    target_psnr_db: float | None = None
    max_latency_ms: float | None = None


def choose_again(folder: Path, wish: Wish) -> SearchRecord:
    """Let another point of a finished search be the folder's plan.

    Raises:
        BundleError: the folder holds no search, or it is damaged.
        PlanError: the plan of a point is malformed.
        UsageError: no point fulfils the wish.
        StorageError: the folder cannot be written.
    """
    with claimed(folder, PLAN_FOLDER) as claim:
        record = read_search(folder)
        check_files(folder, {SAMPLES: record.samples})
        try:
            samples = read_tensors(folder / SAMPLES)
        except ValueError as error:
            raise BundleError(f"{folder / SAMPLES}: {error}; make it again") from None
        plans = {}
        for point in record.points:
            if point.settings is not None:
                plan, tables = load_plan(folder / POINTS / _slug(point.name))
                plans[point.name] = PlannedPoint(name=point.name, kind=point.kind, plan=plan, tables=tables)
        write_search(record, plans, samples, claim, wish)
    return record


def current_point(folder: Path, record: SearchRecord) -> PointRecord:
    """The point that is the folder's plan.

    Raises:
        BundleError: none is, or a file is damaged.
        PlanError: a plan is malformed.
    """
    with reading(folder, PLAN_FOLDER):
        plan, _ = load_plan(folder)
        for point in record.points:
            if point.settings is not None and load_plan(folder / POINTS / _slug(point.name))[0] == plan:
                return point
    raise BundleError(f"{folder}: its plan is no point of its search; choose one with --target-psnr")


def check_wish(wish: Wish, latency_source: LatencySource) -> None:
    """Check that a search with such latencies can fulfil a wish.

    Raises:
        UsageError: the wish is no number, below zero, or in milliseconds where none are measured.
    """
    for option, value in (("--target-psnr", wish.target_psnr_db), ("--max-latency-ms", wish.max_latency_ms)):
        if value is not None and not 0 <= value < math.inf:
            raise UsageError(f"{option} must be a finite number, 0 or more, found {value}")
    if wish.max_latency_ms is not None and latency_source == "flops":
        raise UsageError("--max-latency-ms needs measured latencies; search without --from-flops, or leave it out")


def chosen_point(record: SearchRecord, wish: Wish) -> PointRecord:
    """The point that fulfils a wish best: the fastest that is close enough, or the closest that is fast enough.

    Baselines take part where they are plans, so what is chosen is never dominated by one. A peer that is no plan takes
    nothing away: beside it there may be nothing to deploy. A plan that keeps tokens takes no part unless they are worth
    more than random ones.

    Raises:
        UsageError: none does; names the fastest. Or the wish is in milliseconds, and none were measured.
    """
    check_wish(wish, record.latency_source)
    full = next(point for point in record.points if point.name == FULL_POINT)
    unproven = unproven_tokens(record.points)
    plans = [
        point
        for point in record.points
        if point.settings is not None
        and point.name not in unproven
        and (wish.target_psnr_db is None or point.quality.psnr_db >= wish.target_psnr_db)
        and (wish.max_latency_ms is None or (point.latency_ms or math.inf) <= wish.max_latency_ms)
    ]
    if wish.target_psnr_db is None and wish.max_latency_ms is None:
        plans = [point for point in plans if point.latency_ratio <= DEFAULT_SHARE]
    if not plans:
        fastest = min(
            (point for point in record.points if point.settings is not None), key=lambda point: point.latency_ratio
        )
        time = "" if full.latency_ms is None else f" of {full.latency_ms:.1f} ms"
        raise UsageError(
            f"no plan fulfils it: the fastest takes {fastest.latency_ratio:.2f} of the full run's latency{time}, at"
            f" {fastest.quality.psnr_db:.1f} dB ({fastest.name}); ask for less, or widen the recipe's [search]"
        )
    if wish.target_psnr_db is not None:
        return min(plans, key=lambda point: (point.latency_ratio, -point.quality.psnr_db))
    return max(plans, key=lambda point: (point.quality.psnr_db, -point.latency_ratio))


def write_search(
    record: SearchRecord,
    plans: Mapping[str, PlannedPoint],
    samples: Mapping[str, FloatArray],
    claim: Claim,
    wish: Wish,
) -> None:
    """Write the chosen plan, the record, the samples and every point's plan, all or nothing.

    Raises:
        UsageError: no point fulfils the wish.
        StorageError: the destination cannot be written.
    """
    chosen = chosen_point(record, wish)
    destination = claim.destination
    model = record.model.model_copy(update={"source": relative_path(record.model.source, destination)})
    record = record.model_copy(update={"model": model})
    with claim.new_folder() as folder:
        for point in record.points:
            if point.settings is not None:
                own = Path(POINTS, _slug(point.name))
                (folder / own).mkdir(parents=True)
                planned = plans[point.name]
                write_plan_files(planned.plan, planned.tables, folder / own, destination / own)
        (folder / SAMPLES).write_bytes(safetensors.numpy.save(dict(samples)))
        (folder / SEARCH).write_text(canonical_json(record.model_dump(mode="json")), encoding="utf-8")
        write_plan_files(plans[chosen.name].plan, plans[chosen.name].tables, folder, destination)


def uniquely_named(points: Iterable[PlannedPoint]) -> list[PlannedPoint]:
    """Points whose names and folders are distinct: of two alike, by rounded shares, the later one is numbered."""
    named: dict[str, PlannedPoint] = {}
    for point in points:
        names = itertools.chain([point.name], (f"{point.name} #{number}" for number in itertools.count(2)))
        name = next(name for name in names if _slug(name) not in named)
        named[_slug(name)] = dataclasses.replace(point, name=name)
    return list(named.values())


def _slug(name: str) -> str:
    """A point's name as a folder's."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")
