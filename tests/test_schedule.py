"""Schedules as pure functions: TPRR's invariants for any numbers, those of any list, the example that defines it."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tc_deploy.errors import PlanError
from tc_deploy.schedule import FULL, MAX_FORECAST_ORDER, PHASES, Schedule, full_schedule, schedule_from_line, tprr
from tc_deploy.types import FloatArray

FLOAT32_EPS = float(np.finfo(np.float32).eps)
ORDERS = st.integers(0, MAX_FORECAST_ORDER)


@st.composite
def schedules(draw: st.DrawFn, max_steps: int = 120) -> Schedule:
    """Any list."""
    later = draw(st.lists(st.sampled_from((FULL, *PHASES)), max_size=max_steps - 1))
    return Schedule(variants=(FULL, *later))


def history(schedule: Schedule, step: int, order: int) -> list[int]:
    """The last ``order + 1`` full steps before ``step``, latest first."""
    return [s for s in range(step - 1, -1, -1) if schedule.variants[s] == FULL][: order + 1]


def cached_steps(schedule: Schedule) -> list[int]:
    return [step for phase in PHASES for step in schedule.cached_steps(phase)]


def test_the_example_that_defines_it() -> None:
    schedule = tprr(steps=10, phase_start=4, cache_interval_early=2, cache_interval_late=3)
    assert schedule.line() == "F c1 F c1 | F c2 c2 F c2 c2"
    assert schedule.variants == (0, 1, 0, 1, 0, 2, 2, 0, 2, 2)
    assert schedule.cached_steps(1) == (1, 3)
    assert schedule.cached_steps(2) == (5, 6, 8, 9)
    assert schedule.full_steps == 4


@given(schedules())
def test_one_variant_for_each_step(schedule: Schedule) -> None:
    assert len(schedule.variants) == schedule.steps
    assert set(schedule.variants) <= {FULL, *PHASES}


@dataclasses.dataclass(frozen=True)
class Numbers:
    """What TPRR makes a list of."""

    steps: int
    phase_start: int
    cache_interval_early: int
    cache_interval_late: int

    @property
    def schedule(self) -> Schedule:
        return tprr(**dataclasses.asdict(self))


@st.composite
def numbers(draw: st.DrawFn, max_steps: int = 120) -> Numbers:
    steps = draw(st.integers(1, max_steps))
    interval = st.integers(1, steps + 2)
    return Numbers(steps, draw(st.integers(0, steps)), draw(interval), draw(interval))


@given(numbers())
def test_each_phase_starts_in_full(given: Numbers) -> None:
    assert given.schedule.variants[0] == FULL
    if given.phase_start < given.steps:
        assert given.schedule.variants[given.phase_start] == FULL


@given(numbers())
def test_a_cached_step_runs_its_own_phase(given: Numbers) -> None:
    assert all(step < given.phase_start for step in given.schedule.cached_steps(1))
    assert all(step >= given.phase_start for step in given.schedule.cached_steps(2))


@given(numbers())
def test_a_cache_is_never_older_than_its_interval(given: Numbers) -> None:
    for step in cached_steps(given.schedule):
        interval = given.cache_interval_early if given.schedule.variants[step] == 1 else given.cache_interval_late
        assert step - history(given.schedule, step, 0)[0] <= interval - 1


@given(numbers())
def test_interval_one_means_no_caching(given: Numbers) -> None:
    first = dataclasses.replace(given, cache_interval_early=1).schedule
    assert first.cached_steps(1) == ()
    assert first.cached_steps(2) == given.schedule.cached_steps(2)
    assert dataclasses.replace(given, cache_interval_early=1, cache_interval_late=1).schedule == full_schedule(
        given.steps
    )


@given(numbers())
def test_full_steps_by_formula(given: Numbers) -> None:
    later = given.steps - given.phase_start
    assert given.schedule.full_steps == math.ceil(given.phase_start / given.cache_interval_early) + math.ceil(
        later / given.cache_interval_late
    )
    assert given.schedule.full_steps + len(cached_steps(given.schedule)) == given.steps


@given(numbers())
def test_the_line_of_two_phases_has_a_bar(given: Numbers) -> None:
    marks = given.schedule.line().split()
    if 0 < given.phase_start < given.steps:
        assert marks.index("|") == given.phase_start == given.schedule.phase_start
    else:
        assert "|" not in marks
        assert given.schedule.phase_start is None


@given(schedules())
def test_the_line_says_it_all(schedule: Schedule) -> None:
    marks = schedule.line().split()
    variant = {"F": 0, "c1": 1, "c2": 2}
    assert tuple(variant[mark] for mark in marks if mark != "|") == schedule.variants
    again = schedule_from_line(schedule.line())
    assert again == schedule
    assert hash(again) == hash(schedule)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "steps must be at least 1, found 0"),
        ("|", "steps must be at least 1, found 0"),
        ("c1 F", "step 0 must be a full step.*found c1"),
        ("F c1 c3", "step 2: expected F, c1, c2, found 'c3'"),
        ("F f", "step 1: expected F, c1, c2, found 'f'"),
    ],
)
def test_a_list_that_is_no_schedule_is_refused(line: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        schedule_from_line(line)


@pytest.mark.parametrize("variants", [(0, 3), (0, -1), (1,), ()])
def test_variants_that_are_none_are_refused(variants: tuple[int, ...]) -> None:
    with pytest.raises(PlanError, match=r"^schedule: "):
        Schedule(variants=variants)


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
    weights: FloatArray = tprr(
        steps=6, phase_start=0, cache_interval_early=1, cache_interval_late=3
    ).polynomial_weights(1)
    thirds = [[1, 0], [1, 0], [1, 0], [1, 0], [4 / 3, -1 / 3], [5 / 3, -2 / 3]]
    np.testing.assert_array_equal(weights, np.array(thirds, dtype=np.float32))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("steps", -3),
        ("phase_start", -1),
        ("phase_start", 11),
        ("cache_interval_early", 0),
        ("cache_interval_early", -2),
        ("cache_interval_late", 0),
    ],
)
def test_bad_numbers_are_named(field: str, value: int) -> None:
    numbers = {"steps": 10, "phase_start": 4, "cache_interval_early": 2, "cache_interval_late": 3} | {field: value}
    with pytest.raises(PlanError, match=rf"\b{field}\b.*found {value}"):
        tprr(**numbers)


@pytest.mark.parametrize("order", [-1, MAX_FORECAST_ORDER + 1])
def test_bad_forecast_order_is_named(order: int) -> None:
    with pytest.raises(PlanError, match=f"forecast order.*found {order}"):
        full_schedule(4).polynomial_weights(order)


def test_full_schedule_needs_a_step() -> None:
    with pytest.raises(PlanError, match="steps"):
        full_schedule(0)
