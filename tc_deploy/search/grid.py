"""The graphs that the cost model is made of, built and timed: each setting on a grid of keep counts.

In: the space of a search and what builds points. Out: lines for the record. Never: times a candidate.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tc_deploy.calibrate.calibration import Report
from tc_deploy.calibrate.recipe import SearchRecipe
from tc_deploy.manifest import SOLVER
from tc_deploy.plan import CacheRecord
from tc_deploy.schedule import tprr
from tc_deploy.search.baselines import Baselines
from tc_deploy.search.built_points import PlannedPoint, PointMaker
from tc_deploy.search.cost import Setting, variant_cost
from tc_deploy.search.record import Kind, VariantCost
from tc_deploy.search.space import Candidate
from tc_deploy.types import Skip

ROUNDS = 5
INTERVAL = 4
"""Of the schedule that graphs are timed in, in both phases."""


@dataclass(frozen=True, kw_only=True)
class GridPoint:
    """A bundle whose two cached graphs are two places of the grid."""

    setting: Setting | None
    """None where the cached steps skip the model."""
    keep_ratios: tuple[float, float]
    point: PlannedPoint


def timed_graphs(
    recipe: SearchRecipe, space: Iterable[Candidate], baselines: Baselines, maker: PointMaker, report: Report
) -> tuple[VariantCost, ...]:
    """Time every setting of the space that runs blocks, on its grid of keep ratios; and skipping, and the solver.

    Each time is kept as soon as it is known: taken again it would be another, and so would the candidates be.

    Args:
        recipe: the lists of the space.
        space: the candidates.
        baselines: makes plans of the model.
        maker: builds and times them.
        report: told how far it is.
    """
    costs: list[VariantCost] = []
    grid = list(_grid(recipe, space, baselines))
    for done, item in enumerate(grid):
        report("building graphs, and timing them in turn", done, len(grid))
        figures = maker.graph_times(item.point, ROUNDS)
        costs.append(variant_cost(SOLVER, figures[SOLVER], item.setting))
        if item.setting is None:
            costs.append(variant_cost("skip", figures["cached-1"]))
            continue
        costs.append(variant_cost("full", figures["full"], item.setting))
        first, second = item.keep_ratios
        costs.append(variant_cost("keep", figures["cached-1"], item.setting, first))
        if second != first:
            costs.append(variant_cost("keep", figures["cached-2"], item.setting, second))
    report("building graphs, and timing them in turn", len(grid), len(grid))
    return tuple(costs)


def _grid(recipe: SearchRecipe, space: Iterable[Candidate], baselines: Baselines) -> Iterator[GridPoint]:
    """Two keep ratios to a bundle, which has two phases; the last one twice where their number is odd."""
    tokens = baselines.model.geometry.tokens
    counts = sorted({round(ratio * tokens) for ratio in (0.0, *recipe.keep_ratio)} - {tokens})
    first = (recipe.reuse[0], recipe.attention[0], max(recipe.forecast_order))
    yield _grid_point(baselines, first, (0, 0), Skip.MODEL)
    settings = dict.fromkeys((item.reuse, item.attention, item.forecast_order) for item in space if item.runs_blocks)
    for setting in settings:
        for pair in zip(counts[::2], [*counts[1::2], counts[-1]], strict=False):
            yield _grid_point(baselines, setting, pair, Skip.BLOCKS)


def _grid_point(baselines: Baselines, setting: Setting, counts: tuple[int, int], skip: Skip) -> GridPoint:
    model, steps = baselines.model, baselines.sampling.steps
    interval = min(INTERVAL, max(2, steps // 2))
    reuse, attention, order = setting
    cache = CacheRecord(
        reuse=reuse,
        attention=attention,
        forecast_order=order,
        keep_counts=((counts[0],) * len(model.blocks), (counts[1],) * len(model.blocks)),
        skip=skip,
    )
    schedule = tprr(steps=steps, phase_start=steps // 2, cache_interval_early=interval, cache_interval_late=interval)
    return GridPoint(
        setting=None if skip is Skip.MODEL else setting,
        keep_ratios=(counts[0] / model.geometry.tokens, counts[1] / model.geometry.tokens),
        point=baselines.cached(schedule, cache, "grid", Kind.TOKEN_CACHE),
    )
