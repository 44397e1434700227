"""Time the variants of a built bundle, interleaved, and the way from import to the first finished step.

Every round runs each variant once, so that a noisy or slowing machine hits all of them alike; medians are quoted.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tc_deploy.errors import BackendError
from tc_deploy.hardware import hardware_line
from tc_deploy.manifest import variant_name
from tc_deploy.runtime.pipeline import Pipeline
from tc_deploy.schedule import FULL, PHASES

WARMUP_ROUNDS = 3
START_UPS = 5

_START_UP = """
import json, resource, sys, time
start_s = time.perf_counter()
import tc_deploy
pipeline = tc_deploy.load(sys.argv[1], sys.argv[2], batch_size=int(sys.argv[3]))
loaded_s = time.perf_counter()
next(iter(pipeline.steps(class_labels=[0] * pipeline.batch_size)))
done_s = time.perf_counter()
print(json.dumps({
    "load_s": loaded_s - start_s,
    "first_step_s": done_s - start_s,
    "rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    "torch_imported": "torch" in sys.modules,
}))
"""
"""What a fresh process does; imports and time are its own."""


def bench_bundle(
    path: Path,
    backend: str | None,
    batch_size: int | None,
    rounds: int,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> dict[str, Any]:
    """Measure a bundle.

    Args:
        path: ``engines/NAME``.
        backend: which target; None as for ``load``.
        batch_size: samples per batch; None as for ``load``.
        rounds: how often each variant is timed.
        progress: told how far each part is.

    Returns:
        JSON values. The full variant is the graph that a bundle runs: the model's own step, which also writes the
        caches. Hardware; per variant the median, minimum and FLOPs; per cached variant ``compile_efficiency``,
        its speed-up in time over its speed-up in FLOPs (1 means that pruning costs nothing but what is computed);
        start-up times and resident memory of a process that imports, loads and finishes one step.
    """
    with Pipeline(path, backend, batch_size=batch_size) as pipeline:
        # A run first: the caches then hold what they hold in use, and not zeros.
        for _ in pipeline.steps(class_labels=[0] * pipeline.batch_size):
            pass
        times_ms = _interleaved_ms(pipeline, rounds, progress)
        plan, used, batch = pipeline.plan, pipeline.backend, pipeline.batch_size
        rows = batch * (2 if pipeline.manifest.guided else 1)
    flops = dict(enumerate((plan.cost.full_flops, *plan.cost.cached_flops)))
    full_ms = statistics.median(times_ms[variant_name(FULL)])
    by_name = {variant_name(variant): variant for variant in (FULL, *PHASES)}
    variants: dict[str, dict[str, float]] = {}
    for name, times in times_ms.items():
        median_ms = statistics.median(times)
        variants[name] = {"median_ms": round(median_ms, 3), "min_ms": round(min(times), 3)}
        variant = by_name.get(name)
        if variant is not None:
            variants[name]["gflops"] = round(flops[variant] * rows / 1e9, 4)
            variants[name]["time_ratio"] = round(median_ms / full_ms, 4)
            variants[name]["flops_ratio"] = round(flops[variant] / flops[FULL], 4)
            variants[name]["compile_efficiency"] = round((full_ms / median_ms) * (flops[variant] / flops[FULL]), 3)
    return {
        "bundle": str(path),
        "hardware": hardware_line(),
        "backend": used,
        "batch_size": batch,
        "rounds": rounds,
        "variants": variants,
        "start_up": _start_up(path, used, batch, progress),
    }


def _interleaved_ms(
    pipeline: Pipeline, rounds: int, progress: Callable[[str, int, int], None]
) -> dict[str, list[float]]:
    graphs = pipeline.variants()
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for turn in range(WARMUP_ROUNDS + rounds):
        for name, graph in graphs.items():
            start_s = time.perf_counter()
            graph.run()
            if turn >= WARMUP_ROUNDS:
                times[name].append(1e3 * (time.perf_counter() - start_s))
        progress("timing the variants in turn", max(0, turn + 1 - WARMUP_ROUNDS), rounds)
    return times


def _start_up(path: Path, backend: str, batch: int, progress: Callable[[str, int, int], None]) -> dict[str, Any]:
    """Medians over fresh processes."""
    runs = []
    for done in range(START_UPS):
        command = [sys.executable, "-c", _START_UP, str(path), backend, str(batch)]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own words
        if answer.returncode:
            said = answer.stderr.strip().splitlines() or [f"exit code {answer.returncode}"]
            raise BackendError(f"{path}: a fresh process cannot load it: {said[-1]}")
        runs.append(json.loads(answer.stdout))
        progress("starting fresh processes", done + 1, START_UPS)
    medians = {
        key: round(statistics.median(run[key] for run in runs), 3) for key in ("load_s", "first_step_s", "rss_mib")
    }
    return {**medians, "torch_imported": any(run["torch_imported"] for run in runs)}
