"""What a candidate's run takes, before its engines exist: from timed graphs, or from FLOPs where that was asked for.

Graphs are timed on a grid of keep ratios, the same in every block, inside real runs and in turn with the plain full
step; a step's time is in plain full steps. A plan whose blocks keep different shares takes the mean over its blocks of
what the grid says for their share: exact if a step's time is a sum over blocks.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tc_deploy.bench.clock import Clock
from tc_deploy.bench.interleave import interleaved
from tc_deploy.bench.spread import median_of
from tc_deploy.manifest import SOLVER, variant_name
from tc_deploy.plan import CacheRecord
from tc_deploy.runtime.pipeline import Pipeline
from tc_deploy.schedule import FULL, PHASES, Schedule
from tc_deploy.search.record import VariantCost
from tc_deploy.types import Attention, Reuse

Setting = tuple[Reuse, Attention, int]
"""Reuse, attention and forecast order: what a graph's time depends on beside the keep counts."""


@dataclass(frozen=True, kw_only=True)
class GridCosts:
    """Times of graphs of one setting, in plain full steps."""

    full: float
    """The full step that writes this setting's caches."""
    keep_ratios: tuple[float, ...]
    """From 0 on, ascending."""
    cached: tuple[float, ...]
    """Of a cached step at each of the ratios."""

    def step(self, keep_counts: Sequence[int], tokens: int) -> float:
        """A cached step of these keep counts; a block that keeps all tokens takes what it takes in a full step."""
        ratios, times = (*self.keep_ratios, 1.0), (*self.cached, self.full)
        return float(np.mean(np.interp([count / tokens for count in keep_counts], ratios, times)))


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """Predicts a run's latency over that of the full run."""

    tokens: int
    skip: float
    """A cached step that skips the model, in plain full steps."""
    solver: float
    """The solver's share of a step, in plain full steps."""
    settings: Mapping[Setting, GridCosts]

    def latency_ratio(self, schedule: Schedule, cache: CacheRecord) -> float:
        """Latency of a sampling run over that of the full run."""
        grid = self.settings.get((cache.reuse, cache.attention, cache.forecast_order))
        writes_caches = any(schedule.cached_steps(phase) and not cache.skips_model(phase) for phase in PHASES)
        total = schedule.full_steps * (grid.full if grid is not None and writes_caches else 1.0)
        for phase in PHASES:
            count = len(schedule.cached_steps(phase))
            if count and cache.skips_model(phase):
                total += count * self.skip
            elif count:
                assert grid is not None, "every setting of the space that runs blocks was timed"
                total += count * grid.step(cache.keep_counts[phase - 1], self.tokens)
        return (total + schedule.steps * self.solver) / (schedule.steps * (1 + self.solver))


def time_graphs(
    reference: Path,
    bundles: Sequence[Path],
    backend: str,
    batch_size: int,
    rounds: int,
    progress: Callable[[int, int], None],
) -> list[dict[str, dict[str, float]]]:
    """Time the graphs of bundles in turn with those of a bundle of full steps, one bundle at a time.

    Args:
        reference: the bundle of full steps.
        bundles: the others.
        backend: the engine kind.
        batch_size: pictures per run.
        rounds: runs of each.
        progress: told how many bundles are done, and of how many.

    Returns:
        Per bundle, by graph: ``median`` and ``iqr`` of its mean time in a run over that of the reference's full step in
        the same round.
    """
    found = []
    for done, bundle in enumerate(bundles):
        progress(done, len(bundles))
        clocks = {path: Clock() for path in (reference, bundle)}
        with (
            Pipeline(reference, backend, batch_size=batch_size, watch=clocks[reference].watch) as plain,
            Pipeline(bundle, backend, batch_size=batch_size, watch=clocks[bundle].watch) as cached,
        ):
            requests = {
                path: functools.partial(
                    clocks[path].timed,
                    functools.partial(pipeline, **pipeline.placeholders(batch_size)),
                    graphs=True,
                )
                for path, pipeline in ((reference, plain), (bundle, cached))
            }
            interleaved(requests, 1)
            runs = interleaved(requests, rounds)
        full = [statistics.mean(run.calls_ms[variant_name(FULL)]) for run in runs[reference]]
        found.append(
            {
                name: median_of(
                    [statistics.mean(run.calls_ms[name]) / base for run, base in zip(runs[bundle], full, strict=True)]
                )
                for name in runs[bundle][0].calls_ms
            }
        )
    progress(len(bundles), len(bundles))
    return found


def variant_cost(
    graph: str, figures: Mapping[str, float], setting: Setting | None = None, keep_ratio: float | None = None
) -> VariantCost:
    """One line of the cost model, for the record."""
    reuse, attention, order = setting or (None, None, None)
    return VariantCost(
        graph=graph,
        reuse=reuse,
        attention=attention,
        forecast_order=order,
        keep_ratio=keep_ratio,
        ratio=figures["median"],
        iqr=figures["iqr"],
    )


def cost_model(tokens: int, variants: Sequence[VariantCost]) -> CostModel:
    """Put the timed graphs together."""
    grids: dict[Setting, GridCosts] = {}
    for found in variants:
        if found.graph == "keep":
            assert found.reuse is not None, "a cached graph has a setting"
            assert found.attention is not None, "of three parts"
            assert found.forecast_order is not None, "all of which are recorded"
            setting = (Reuse(found.reuse), Attention(found.attention), found.forecast_order)
            own = [
                other
                for other in variants
                if (other.reuse, other.attention, other.forecast_order) == (found.reuse, found.attention, setting[2])
            ]
            grid = sorted((other.keep_ratio or 0.0, other.ratio) for other in own if other.graph == "keep")
            grids[setting] = GridCosts(
                full=statistics.median(other.ratio for other in own if other.graph == "full"),
                keep_ratios=tuple(ratio for ratio, _ in grid),
                cached=tuple(time for _, time in grid),
            )
    return CostModel(
        tokens=tokens,
        skip=max((item.ratio for item in variants if item.graph == "skip"), default=0.0),
        solver=statistics.median(item.ratio for item in variants if item.graph == SOLVER),
        settings=grids,
    )
