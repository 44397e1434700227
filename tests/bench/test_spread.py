"""What is quoted of many values."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tc_deploy.bench.spread import latency_of, median_of, ratio_of

times = st.lists(st.floats(0.001, 1e6), min_size=1)


def test_percentiles() -> None:
    values = [float(value) for value in range(101)]
    expected = {"p50_ms": 50, "p90_ms": 90, "p99_ms": 99, "max_ms": 100, "iqr_ms": 50}
    assert latency_of(values[::-1]) == expected
    assert median_of(values) == {"median": 50, "iqr": 50}


def test_one_value_has_no_spread() -> None:
    assert latency_of([3.0]) == {"p50_ms": 3, "p90_ms": 3, "p99_ms": 3, "max_ms": 3, "iqr_ms": 0}


@given(times)
def test_percentiles_ascend(values: list[float]) -> None:
    found = latency_of(values)
    assert found["p50_ms"] <= found["p90_ms"] <= found["p99_ms"] <= round(max(values), 4)
    assert found["iqr_ms"] >= 0


def test_ratios_are_taken_round_by_round() -> None:
    # The machine is ten times slower in the second round and a hundred times in the third; the ratio never changes.
    assert ratio_of([2.0, 20.0, 200.0], [4.0, 40.0, 400.0]) == {"median": 0.5, "iqr": 0}
    # Of the two medians it would be 1.
    assert ratio_of([1.0, 2.0, 9.0], [2.0, 3.0, 1.0])["median"] == round(2 / 3, 4)


@given(times)
def test_the_ratio_to_itself_is_one(values: list[float]) -> None:
    assert ratio_of(values, values) == {"median": 1, "iqr": 0}
