"""The charts' geometry: every point stands where its figures say."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report.folders import CHOSEN, DIGITS, make_point, points_of_the_demo, write_search

from tc_deploy.report import charts
from tc_deploy.report.charts import Chart, drift_chart, pareto_chart
from tc_deploy.report.source import Source, source_from_folder
from tc_deploy.search.record import Kind, PointRecord


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return source_from_folder(write_search(tmp_path_factory.mktemp("charts") / "digits", samples={}))


@pytest.fixture(scope="module")
def searched(source: Source) -> Callable[[list[PointRecord]], Source]:
    """The source with other points; hypothesis prints a test's arguments, and a whole source is too long for it."""

    def changed(points: list[PointRecord]) -> Source:
        return with_points(source, points)

    return changed


@pytest.fixture(scope="module")
def pareto(source: Source) -> Chart:
    chart = pareto_chart(source)
    assert chart is not None
    return chart


def with_points(source: Source, points: list[PointRecord]) -> Source:
    assert source.search is not None
    return dataclasses.replace(source, search=source.search.model_copy(update={"points": tuple(points)}))


def test_places_follow_the_figures(pareto: Chart) -> None:
    points = [point for point in points_of_the_demo() if point.kind is not Kind.FULL]
    assert len(pareto.marks) == len(points)
    assert [mark.x for mark in pareto.marks] == sorted(mark.x for mark in pareto.marks)
    by_x = sorted(points, key=lambda point: point.latency_ratio)
    for first, second, one, other in zip(pareto.marks, pareto.marks[1:], by_x, by_x[1:], strict=False):
        assert (first.y > second.y) == (one.quality.psnr_db < other.quality.psnr_db)
    for mark in pareto.marks:
        assert charts.LEFT <= mark.x_low < mark.x < mark.x_high <= charts.RIGHT
        assert charts.TOP <= mark.y <= charts.BOTTOM
    assert [mark.title.split(" (")[0] for mark in pareto.marks if mark.chosen] == [CHOSEN.split(" (")[0]]


def test_time_is_logarithmic(source: Source) -> None:
    points = [make_point(str(ratio), Kind.FEWER_STEPS, ratio, 40.0, latency_iqr=0) for ratio in (0.1, 0.2, 0.4)]
    chart = pareto_chart(with_points(source, points))
    assert chart is not None
    first, second, third = chart.marks
    assert second.x - first.x == pytest.approx(third.x - second.x, abs=0.02)
    assert (first.x_low, first.x_high) == (first.x, first.x)
    assert chart.front == ""


def test_the_front_climbs_at_its_points(pareto: Chart) -> None:
    front = [point.name for point in points_of_the_demo() if point.on_front and point.kind is not Kind.FULL]
    assert pareto.front.count("V") == len(front) - 1
    assert pareto.front.endswith(f"H{pareto.rule.at}" if pareto.rule else "")


def test_drift_of_the_plan_and_its_neighbours(source: Source) -> None:
    chart = drift_chart(source)
    assert chart is not None
    assert [line.chosen for line in chart.lines] == [True, *[False] * (len(chart.lines) - 1)]
    assert chart.lines[0].label == CHOSEN
    kinds = [line.kind for line in chart.lines]
    assert len(set(kinds)) == len(kinds)
    assert Kind.FULL not in kinds
    assert Kind.FEWER_STEPS not in kinds  # its steps are others
    heights = [float(pair.split()[1]) for pair in chart.lines[0].path[1:].split("L")]
    assert heights[0] == charts.BOTTOM  # both start from the same noise
    assert heights == sorted(heights, reverse=True)


def test_no_chart_without_a_search_or_points(source: Source) -> None:
    for empty in (source_from_folder(DIGITS), with_points(source, points_of_the_demo()[:1])):
        assert pareto_chart(empty) is None
        assert drift_chart(empty) is None


@given(
    ratios=st.lists(st.floats(0.001, 5.0), min_size=1, max_size=6),
    psnrs_db=st.lists(st.floats(-20, 140), min_size=1, max_size=6),
    drift=st.lists(st.floats(0, 10), min_size=1, max_size=60),
)
def test_any_figures_fit_in_the_plot(
    searched: Callable[[list[PointRecord]], Source], ratios: list[float], psnrs_db: list[float], drift: list[float]
) -> None:
    points = [
        make_point(str(index), Kind.FEWER_STEPS, ratio, psnr_db, drift=tuple(drift), latency_iqr=ratio)
        for index, (ratio, psnr_db) in enumerate(zip(ratios, psnrs_db, strict=False))
    ]
    found = searched(points)
    for chart in (pareto_chart(found), drift_chart(found)):
        assert chart is not None
        across = [value for mark in chart.marks for value in (mark.x_low, mark.x, mark.x_high)]
        across += [*(tick.at for tick in chart.x_ticks), *(line.end[0] for line in chart.lines)]
        up = [*(mark.y for mark in chart.marks), *(tick.at for tick in chart.y_ticks)]
        up += [line.end[1] for line in chart.lines]
        assert all(math.isfinite(value) for value in (*across, *up))
        assert charts.LEFT <= min(across) <= max(across) <= charts.RIGHT
        assert charts.TOP <= min(up) <= max(up) <= charts.BOTTOM
        assert len({tick.label for tick in chart.y_ticks}) == len(chart.y_ticks) > 0
