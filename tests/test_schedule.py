"""TPRR as a pure function: its invariants for any numbers, and the example that defines it."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tc_deploy.errors import PlanError
from tc_deploy.schedule import FULL, MAX_FORECAST_ORDER, PHASES, Schedule, full_schedule
from tc_deploy.types import FloatArray

FLOAT32_EPS = float(np.finfo(np.float32).eps)
ORDERS = st.integers(0, MAX_FORECAST_ORDER)


@st.composite
def schedules(draw: st.DrawFn, max_steps: int = 120) -> Schedule:
    steps = draw(st.integers(1, max_steps))
    interval = st.integers(1, steps + 2)
    return Schedule(steps=steps, boundary=draw(st.integers(0, steps)), k1=draw(interval), k2=draw(interval))


def history(schedule: Schedule, step: int, order: int) -> list[int]:
    """The last ``order + 1`` full steps before ``step``, latest first."""
    return [s for s in range(step - 1, -1, -1) if schedule.variants[s] == FULL][: order + 1]


def cached_steps(schedule: Schedule) -> list[int]:
    return [step for phase in PHASES for step in schedule.cached_steps(phase)]


def test_the_example_that_defines_it() -> None:
    schedule = Schedule(steps=10, boundary=4, k1=2, k2=3)
    assert schedule.line() == "F c1 F c1 | F c2 c2 F c2 c2"
    assert schedule.variants == (0, 1, 0, 1, 0, 2, 2, 0, 2, 2)
    assert schedule.cached_steps(1) == (1, 3)
    assert schedule.cached_steps(2) == (5, 6, 8, 9)
    assert schedule.full_steps == 4


@given(schedules())
def test_one_variant_for_each_step(schedule: Schedule) -> None:
    assert len(schedule.variants) == schedule.steps
    assert set(schedule.variants) <= {FULL, *PHASES}


@given(schedules())
def test_each_phase_starts_in_full(schedule: Schedule) -> None:
    assert schedule.variants[0] == FULL
    if schedule.boundary < schedule.steps:
        assert schedule.variants[schedule.boundary] == FULL


@given(schedules())
def test_a_cached_step_runs_its_own_phase(schedule: Schedule) -> None:
    assert all(step < schedule.boundary for step in schedule.cached_steps(1))
    assert all(step >= schedule.boundary for step in schedule.cached_steps(2))


@given(schedules())
def test_a_cache_is_never_older_than_its_interval(schedule: Schedule) -> None:
    for step in cached_steps(schedule):
        interval = schedule.k1 if schedule.variants[step] == 1 else schedule.k2
        assert step - history(schedule, step, 0)[0] <= interval - 1


@given(schedules())
def test_interval_one_means_no_caching(schedule: Schedule) -> None:
    first = dataclasses.replace(schedule, k1=1)
    assert first.cached_steps(1) == ()
    assert first.cached_steps(2) == schedule.cached_steps(2)
    assert dataclasses.replace(schedule, k1=1, k2=1).variants == full_schedule(schedule.steps).variants


@given(schedules())
def test_full_steps_by_formula(schedule: Schedule) -> None:
    later = schedule.steps - schedule.boundary
    assert schedule.full_steps == math.ceil(schedule.boundary / schedule.k1) + math.ceil(later / schedule.k2)
    assert schedule.full_steps + len(cached_steps(schedule)) == schedule.steps


@given(schedules())
def test_the_line_says_it_all(schedule: Schedule) -> None:
    marks = schedule.line().split()
    variant = {"F": 0, "c1": 1, "c2": 2}
    assert tuple(variant[mark] for mark in marks if mark != "|") == schedule.variants
    if 0 < schedule.boundary < schedule.steps:
        assert marks.index("|") == schedule.boundary
    else:
        assert "|" not in marks


@given(schedules())
def test_it_is_a_pure_function(schedule: Schedule) -> None:
    again = Schedule(**dataclasses.asdict(schedule))
    assert again == schedule
    assert hash(again) == hash(schedule)
    assert again.variants == schedule.variants


@given(schedules(), ORDERS)
def test_forecast_weights_sum_to_one(schedule: Schedule, order: int) -> None:
    weights = schedule.polynomial_weights(order).astype(np.float64)
    assert weights.shape == (schedule.steps, order + 1)
    rounding = FLOAT32_EPS * np.abs(weights).sum(axis=1)
    assert (np.abs(weights.sum(axis=1) - 1) <= rounding).all()


@given(schedules(), ORDERS, st.lists(st.integers(-9, 9), min_size=1, max_size=MAX_FORECAST_ORDER + 1))
def test_forecast_continues_polynomials_exactly(schedule: Schedule, order: int, coefficients: list[int]) -> None:
    weights = schedule.polynomial_weights(order)
    for step in cached_steps(schedule):
        nodes = history(schedule, step, order)
        polynomial = np.polynomial.Polynomial(coefficients[: len(nodes)])
        terms = weights[step, : len(nodes)].astype(np.float64) * polynomial(np.array(nodes, dtype=np.float64))
        rounding = FLOAT32_EPS * (np.abs(terms).sum() + abs(polynomial(step)))
        assert abs(terms.sum() - polynomial(step)) <= rounding


@given(schedules(), ORDERS)
def test_forecast_takes_nothing_from_steps_that_did_not_run(schedule: Schedule, order: int) -> None:
    weights = schedule.polynomial_weights(order)
    for step in cached_steps(schedule):
        assert (weights[step, len(history(schedule, step, order)) :] == 0).all()


@given(schedules())
def test_order_zero_reuses(schedule: Schedule) -> None:
    assert (schedule.polynomial_weights(0) == 1).all()


def test_linear_forecast_by_hand() -> None:
    weights: FloatArray = Schedule(steps=6, boundary=0, k1=1, k2=3).polynomial_weights(1)
    thirds = [[1, 0], [1, 0], [1, 0], [1, 0], [4 / 3, -1 / 3], [5 / 3, -2 / 3]]
    np.testing.assert_array_equal(weights, np.array(thirds, dtype=np.float32))


@pytest.mark.parametrize(
    ("field", "value"),
    [("steps", 0), ("steps", -3), ("boundary", -1), ("boundary", 11), ("k1", 0), ("k1", -2), ("k2", 0)],
)
def test_bad_numbers_are_named(field: str, value: int) -> None:
    numbers = {"steps": 10, "boundary": 4, "k1": 2, "k2": 3} | {field: value}
    with pytest.raises(PlanError, match=rf"\b{field}\b.*found {value}"):
        Schedule(**numbers)


@pytest.mark.parametrize("order", [-1, MAX_FORECAST_ORDER + 1])
def test_bad_forecast_order_is_named(order: int) -> None:
    with pytest.raises(PlanError, match=f"forecast order.*found {order}"):
        full_schedule(4).polynomial_weights(order)


def test_full_schedule_needs_a_step() -> None:
    with pytest.raises(PlanError, match="steps"):
        full_schedule(0)
