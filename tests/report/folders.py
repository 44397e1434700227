"""Folders to draw: the demo's plan with a made-up search beside it, plausible and the same every time."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from tc_deploy.bundle import FileRecord, canonical_json, sha256_of_bytes
from tc_deploy.plan import SAMPLES, SEARCH, CacheRecord, ScheduleRecord, load_plan
from tc_deploy.quality.record import Quality
from tc_deploy.search.record import (
    FORMAT_VERSION,
    FULL_POINT,
    Kind,
    PointRecord,
    SearchRecord,
    SettingsRecord,
)
from tc_deploy.types import FloatArray

DIGITS = Path(__file__).parent / "with_tokens"
"""A plan of the digits model that keeps tokens in phase 2; the demo's keeps none."""
STEPS = 50
CHOSEN = "K=(4, 2), phase start 25, order 2"
SOLVER_STEPS = "DPM-Solver++, 20 steps"
FEWER = "25 steps"
RANDOM = "as chosen, tokens at random"
UNIFORM = "as chosen, 8 tokens in every block"


def make_point(name: str, kind: Kind, ratio: float, psnr_db: float, **changes: Any) -> PointRecord:
    """A point with what its ratio and PSNR make likely."""
    full = min(STEPS, round(STEPS * ratio))
    fields: dict[str, Any] = {
        "name": name,
        "kind": kind,
        "runtime": "pytorch" if kind is Kind.CACHE_DIT else "engines",
        "settings": None,
        "steps_full": full,
        "steps_cached": STEPS - full,
        "cost_in_full_steps": 0.95 * STEPS * ratio,
        "latency_ms": 400 * ratio,
        "latency_ratio": ratio,
        "latency_iqr": 0.02 * ratio,
        "quality": Quality(
            psnr_db=psnr_db,
            psnr_db_std=3.1,
            ssim=1 - 10 ** (-psnr_db / 20),
            frechet_distance=40 * 10 ** (-psnr_db / 40),
            class_accuracy=0.984,
        ),
        "converged_psnr_db": 30 + psnr_db / 10,
        "drift": tuple(10 ** (-psnr_db / 20) * math.sqrt(step / STEPS) for step in range(STEPS)),
        "on_front": False,
    }
    return PointRecord(**fields | changes)


def points_of_the_demo() -> list[PointRecord]:
    """All kinds; the shipped plan stands on the front."""
    plan, _ = load_plan(DIGITS)
    ours = SettingsRecord(scheduler_class=plan.sampling.scheduler_class, schedule=plan.schedule, cache=plan.cache)
    points = [make_point(FULL_POINT, Kind.FULL, 1.0, 140.0, latency_iqr=0, drift=(0.0,) * STEPS, on_front=True)]
    points.append(make_point(CHOSEN, Kind.TOKEN_CACHE, 0.47, 50.8, settings=ours, on_front=True))
    cheaper = CacheRecord(reuse="branch", attention="all", forecast_order=2, keep_counts=((0,) * 8, (0,) * 8))
    for phase_start, ratio, psnr_db in ((15, 0.13, 31.5), (20, 0.2, 37.9), (30, 0.31, 45.0), (40, 0.62, 53.4)):
        settings = SettingsRecord(
            scheduler_class="DDIMScheduler",
            schedule=ScheduleRecord(
                steps=STEPS, phase_start=phase_start, cache_interval_early=4, cache_interval_late=3
            ),
            cache=cheaper,
        )
        name = f"K=(4, 3), phase start {phase_start}, order 2"
        more = {"settings": settings, "on_front": True}
        points.append(make_point(name, Kind.TOKEN_CACHE, ratio, psnr_db, **more))
    for steps, psnr_db in ((6, 24.0), (12, 32.5), (18, 37.2), (25, 42.0), (30, 44.3), (40, 48.0)):
        points.append(make_point(f"{steps} steps", Kind.FEWER_STEPS, steps / STEPS, psnr_db, drift=None))
    points.append(make_point(SOLVER_STEPS, Kind.BETTER_SOLVER, 0.4, 36.0, drift=None, converged_psnr_db=41.0))
    points.append(make_point("skip, K=(4, 2)", Kind.SKIP_REUSE, 0.42, 40.9))
    points.append(make_point("skip, K=(4, 2), order 2", Kind.SKIP_FORECAST, 0.42, 47.1))
    points.append(make_point(RANDOM, Kind.RANDOM_TOKENS, 0.475, 49.0, settings=ours))
    points.append(make_point(UNIFORM, Kind.UNIFORM_BLOCKS, 0.49, 49.6))
    points.append(make_point("DBCache, TaylorSeer", Kind.CACHE_DIT, 0.66, 43.0, latency_iqr=0.08))
    return points


def make_samples(points: list[PointRecord], channels: int = 1, side: int = 16, count: int = 8) -> dict[str, FloatArray]:
    """Rings, with as much noise on them as the point's PSNR says."""
    rng = np.random.default_rng(0)
    place = np.linspace(-1.5, 1.5, side, dtype=np.float32)
    distance = np.hypot(place[:, None], place[None, :])
    radii = np.linspace(0.3, 1.2, count, dtype=np.float32)[:, None, None, None]
    rings = np.clip(1.5 - 6 * np.abs(distance - radii), -1, 1).repeat(channels, axis=1)
    return {
        point.name: (rings + 2 * 10 ** (-point.quality.psnr_db / 20) * rng.standard_normal(rings.shape)).astype("f4")
        for point in points
        if point.name in {FULL_POINT, CHOSEN, UNIFORM, RANDOM}
    }


def write_search(
    folder: Path,
    points: list[PointRecord] | None = None,
    samples: dict[str, FloatArray] | None = None,
    **changes: Any,
) -> Path:
    """Put a search beside the plan in ``folder``; without a plan there, beside a copy of the demo's."""
    if not folder.exists():
        shutil.copytree(DIGITS, folder)
    points = points_of_the_demo() if points is None else points
    data = safetensors.numpy.save(make_samples(points) if samples is None else samples)
    (folder / SAMPLES).write_bytes(data)
    fields: dict[str, Any] = {
        "kind": "search",
        "format_version": FORMAT_VERSION,
        "made_by": "tc-deploy 0.1.0",
        "date": "2026-11-23",
        "model": load_plan(folder)[0].model,
        "hardware": "AMD EPYC, 2 cores, 24 GiB",
        "latency_source": "measured",
        "backend": "onnxruntime",
        "backend_version": "1.32.0",
        "batch_size": 20,
        "seed": 0,
        "confirmation_seeds": 64,
        "settings": {"full_steps": [0.24, 0.44], "baselines": "all"},
        "points": tuple(sorted(points, key=lambda point: (point.kind is not Kind.FULL, point.latency_ratio))),
        "remarks": ("Token selection adds 3.7 dB over whole-step skip with forecasting at half of the time.",),
        "samples": FileRecord(size_bytes=len(data), sha256=sha256_of_bytes(data)),
    }
    document = SearchRecord(**fields | changes)
    (folder / SEARCH).write_text(canonical_json(document.model_dump(mode="json")), encoding="utf-8")
    return folder


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON document in place."""
    document = json.loads(path.read_text(encoding="utf-8"))
    change(document)
    path.write_text(canonical_json(document), encoding="utf-8")
