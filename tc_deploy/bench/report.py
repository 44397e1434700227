"""What is reported of one contender's timed runs, as JSON values with units in the keys.

In: the runs, round by round, and the plan. Never: runs anything.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from tc_deploy.bench.clock import Run
from tc_deploy.bench.spread import DIGITS, latency_of, median_of, ratio_of
from tc_deploy.manifest import PROLOGUE_GRAPHS, SOLVER, variant_name
from tc_deploy.plan import Plan
from tc_deploy.schedule import FULL

PLAN_RUN = "plan"
FULL_RUN = "full"
KEEPS_NOTHING = "keeps no token, so nearly all of its time is element-wise work, which FLOPs leave out"
NOT_COUNTED = "its FLOPs are not counted"


def runs_report(
    runs: Mapping[str, Sequence[Run]], first: Mapping[str, Sequence[Run]], batch_size: int
) -> dict[str, dict[str, Any]]:
    """Latency and throughput of whole sampling runs.

    Args:
        runs: of the contender, the plan's and the full ones; position r is round r.
        first: likewise of the contender that the others are compared with.
        batch_size: pictures that a run makes.

    Returns:
        By kind of run the latency, ``images_per_s`` at its median, and the ratios of its time to the full run's
        (``ratio_to_full``) and to the first contender's run of the same kind (``ratio_to_first``).
    """
    walls_ms = {kind: [run.wall_ms for run in runs[kind]] for kind in (PLAN_RUN, FULL_RUN)}
    found = {}
    for kind, times_ms in walls_ms.items():
        latency = latency_of(times_ms)
        found[kind] = latency | {
            "images_per_s": round(1e3 * batch_size / latency["p50_ms"], DIGITS),
            "ratio_to_full": ratio_of(times_ms, walls_ms[FULL_RUN]),
            "ratio_to_first": ratio_of(times_ms, [run.wall_ms for run in first[kind]]),
        }
    return found


def host_share(runs: Sequence[Run]) -> dict[str, float]:
    """The part of a run in which no graph ran."""
    return median_of([run.host_share() for run in runs])


def variants_report(runs: Sequence[Run], plan: Plan, rows: int) -> dict[str, dict[str, Any]]:
    """Every graph's time inside the plan's runs.

    Args:
        runs: with their graphs timed.
        plan: tells what each variant computes.
        rows: the model's batch.

    Returns:
        By graph, the full step's first, then the solver and what runs before the first step: calls per run, latency,
        FLOPs, the ratios of time and FLOPs to the full step's, and ``compile_efficiency``, the speed-up in time over
        the speed-up in FLOPs (1 means that pruning costs nothing but what is computed). Where one has no meaning it is
        None and ``note`` says why.
    """
    flops = (plan.cost.full_flops, *plan.cost.cached_flops)
    variants = {variant_name(variant): variant for variant in (FULL, *plan.phases_used())}
    before = [name for name in PROLOGUE_GRAPHS if name in runs[0].calls_ms]
    medians_ms = {
        name: [statistics.median(run.calls_ms[name]) for run in runs] for name in (*variants, SOLVER, *before)
    }
    found: dict[str, dict[str, Any]] = {}
    for name in medians_ms:
        variant = variants.get(name)
        time_ratio = ratio_of(medians_ms[name], medians_ms[variant_name(FULL)])["median"]
        flops_ratio = None if variant is None else flops[variant] / flops[FULL]
        note = None
        if variant is None:
            note = NOT_COUNTED
        elif variant != FULL and not any(plan.keep_counts(variant)):
            note = KEEPS_NOTHING
        found[name] = {
            "calls": len(runs[0].calls_ms[name]),
            **latency_of([time for run in runs for time in run.calls_ms[name]]),
            "gflops": None if variant is None else round(flops[variant] * rows / 1e9, DIGITS),
            "time_ratio": time_ratio,
            "flops_ratio": None if flops_ratio is None else round(flops_ratio, DIGITS),
            "compile_efficiency": None if note or flops_ratio is None else round(flops_ratio / time_ratio, DIGITS),
            "note": note,
        }
    return found


def start_up_report(processes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians over fresh processes; ``torch_imported`` if one of them did."""
    numbers = ("load_s", "first_step_s", "resident_mib", "peak_mib")
    medians = {name: round(statistics.median(found[name] for found in processes), 3) for name in numbers}
    return {**medians, "torch_imported": any(found["torch_imported"] for found in processes)}
