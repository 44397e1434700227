"""The cost model: a run's predicted latency over that of the full run."""

import pytest

from tc_deploy.plan import CacheRecord
from tc_deploy.schedule import full_schedule, tprr
from tc_deploy.search.cost import CostModel, GridCosts, cost_model
from tc_deploy.search.record import VariantCost
from tc_deploy.types import Attention, Reuse, Skip

TOKENS = 64
SETTING = (Reuse.BRANCH, Attention.ALL, 1)
GRID = GridCosts(full=1.1, keep_ratios=(0.0, 0.25), cached=(0.1, 0.4))
MODEL = CostModel(tokens=TOKENS, skip=0.01, solver=0.02, settings={SETTING: GRID})
SCHEDULE = tprr(steps=10, phase_start=4, cache_interval_early=2, cache_interval_late=3)  # F c1 F c1 | F c2 c2 F c2 c2


def record(*keep_counts: tuple[int, ...], skip: Skip = Skip.MODEL) -> CacheRecord:
    return CacheRecord(
        reuse=Reuse.BRANCH,
        attention=Attention.ALL,
        forecast_order=1,
        keep_counts=(keep_counts[0], keep_counts[-1]),
        skip=skip,
    )


def test_a_run_of_full_steps_is_the_full_run() -> None:
    assert MODEL.latency_ratio(full_schedule(10), record((0, 0))) == pytest.approx(1.0)


def test_skipped_steps_by_hand() -> None:
    expected = (4 * 1.0 + 6 * 0.01 + 10 * 0.02) / (10 * 1.02)
    assert MODEL.latency_ratio(SCHEDULE, record((0, 0))) == pytest.approx(expected)


def test_kept_tokens_by_hand() -> None:
    # Phase 1 skips the model; phase 2 keeps a quarter in one block and, between the grid's points, an eighth in the
    # other. Its full steps write caches.
    expected = (4 * 1.1 + 2 * 0.01 + 4 * (0.4 + 0.25) / 2 + 10 * 0.02) / (10 * 1.02)
    assert MODEL.latency_ratio(SCHEDULE, record((0, 0), (16, 8))) == pytest.approx(expected)


def test_a_step_that_skips_blocks_alone_is_timed_too() -> None:
    expected = (4 * 1.1 + 6 * 0.1 + 10 * 0.02) / (10 * 1.02)
    assert MODEL.latency_ratio(SCHEDULE, record((0, 0), skip=Skip.BLOCKS)) == pytest.approx(expected)


def test_above_the_grid_a_block_goes_to_its_full_time() -> None:
    assert GRID.step((64, 64), TOKENS) == pytest.approx(1.1)
    assert GRID.step((40, 40), TOKENS) == pytest.approx(0.4 + (40 / 64 - 0.25) / 0.75 * 0.7)


def cost(graph: str, ratio: float, keep_ratio: float | None = None, *, order: int | None = 1) -> VariantCost:
    setting = (None, None, None) if order is None else ("branch", "all", order)
    return VariantCost(
        graph=graph,
        reuse=setting[0],
        attention=setting[1],
        forecast_order=setting[2],
        keep_ratio=keep_ratio,
        ratio=ratio,
        iqr=0.0,
    )


def test_timed_graphs_become_a_model() -> None:
    variants = [
        cost("solver", 0.01, order=None),
        cost("skip", 0.02, order=None),
        *(cost("full", ratio) for ratio in (1.0, 1.1, 1.3)),
        cost("keep", 0.4, 0.25),
        cost("keep", 0.1, 0.0),
        cost("full", 1.2, order=2),
        cost("keep", 0.2, 0.0, order=2),
    ]
    found = cost_model(TOKENS, variants)
    assert found.skip == 0.02
    assert found.solver == 0.01
    assert found.settings == {
        SETTING: GRID,
        (Reuse.BRANCH, Attention.ALL, 2): GridCosts(full=1.2, keep_ratios=(0.0,), cached=(0.2,)),
    }
