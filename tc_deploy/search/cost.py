"""What a candidate's run takes, before its engines exist: from timed graphs, or from FLOPs where that was asked for.

Graphs are timed on a grid of keep ratios, the same in every block, inside real runs and in turn with the plain full
step; a step's time is in plain full steps. A plan whose blocks keep different shares takes the mean over its blocks of
what the grid says for their share: exact if a step's time is a sum over blocks.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tc_deploy.manifest import SOLVER
from tc_deploy.plan import CacheRecord
from tc_deploy.schedule import PHASES, Schedule
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
    settings: dict[Setting, GridCosts] = {}
    for reuse, attention, order in dict.fromkeys(
        (item.reuse, item.attention, item.forecast_order) for item in variants if item.graph == "keep"
    ):
        assert reuse is not None, "a cached graph has a setting"
        assert attention is not None, "of three parts"
        assert order is not None, "all of which are recorded"
        own = [
            item for item in variants if (item.reuse, item.attention, item.forecast_order) == (reuse, attention, order)
        ]
        grid = sorted((item.keep_ratio or 0.0, item.ratio) for item in own if item.graph == "keep")
        settings[Reuse(reuse), Attention(attention), order] = GridCosts(
            full=statistics.median(item.ratio for item in own if item.graph == "full"),
            keep_ratios=tuple(ratio for ratio, _ in grid),
            cached=tuple(time for _, time in grid),
        )
    return CostModel(
        tokens=tokens,
        skip=next(item.ratio for item in variants if item.graph == "skip"),
        solver=statistics.median(item.ratio for item in variants if item.graph == SOLVER),
        settings=settings,
    )
