"""The geometry of the report's two charts, in the units of their SVG view box; the template draws it.

In: points of a search. Out: charts of plain numbers and words. Never: writes markup.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tc_deploy.report.source import Source
from tc_deploy.report.words import decibels, percent
from tc_deploy.search.record import Kind, PointRecord, SearchRecord

WIDTH = 720
HEIGHT = 430
LEFT, RIGHT, TOP, BOTTOM = 72, 700, 44, 360
"""The plot's edges. Beside and below it is room for labels at the size that they have on a phone."""
MARGIN = 0.06
"""Room between the outermost points and the plot's edges, as a share of its side."""
LOG_STEPS = (1, 1.5, 2, 3, 5, 7)
LINEAR_STEPS = (1, 2, 5, 10)


@dataclass(frozen=True, kw_only=True)
class Tick:
    """A line of the grid with its label."""

    at: float
    label: str


@dataclass(frozen=True, kw_only=True)
class Mark:
    """One point."""

    x: float
    y: float
    kind: Kind
    title: str
    chosen: bool
    x_low: float
    x_high: float
    """Ends of its error bar; both ``x`` where there is none."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One curve, with a mark at its end."""

    path: str
    end: tuple[float, float]
    kind: Kind
    label: str
    chosen: bool


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Everything that a chart's template needs."""

    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    marks: tuple[Mark, ...] = ()
    front: str = ""
    """SVG path of the Pareto front."""
    lines: tuple[Line, ...] = ()
    rule: Tick | None = None
    """A vertical line with a label: the full run, or the start of phase 2."""
    kinds: tuple[Kind, ...] = ()
    """The kinds that appear, for the legend."""


def pareto_chart(source: Source) -> Chart | None:
    """Latency (log) against PSNR; None without a search that has points beside the full run.

    The full run is what PSNR is measured to, so it is no point but a line where the time is.
    """
    if source.search is None:
        return None
    points = [point for point in source.search.points if point.kind is not Kind.FULL]
    if not points:
        return None
    bars = {point.name: _error_bar(point) for point in points}
    ratios = [1.0, *(end for bar in bars.values() for end in bar)]
    psnrs_db = [point.quality.psnr_db for point in points]
    across, low, high = scale(math.log(min(ratios)), math.log(max(ratios)), LEFT, RIGHT)
    up, lowest_db, highest_db = scale(min(psnrs_db), max(psnrs_db), BOTTOM, TOP)

    def x_of(ratio: float) -> float:
        return across(math.log(ratio))

    front = sorted((point for point in points if point.on_front), key=lambda point: point.latency_ratio)
    corners = [(x_of(point.latency_ratio), up(point.quality.psnr_db)) for point in front]
    return Chart(
        x_ticks=tuple(
            Tick(at=x_of(ratio), label=percent(ratio)) for ratio in _log_ticks(math.exp(low), math.exp(high))
        ),
        y_ticks=tuple(Tick(at=up(value), label=label) for value, label in linear_ticks(lowest_db, highest_db)),
        marks=tuple(
            Mark(
                x=x_of(point.latency_ratio),
                y=up(point.quality.psnr_db),
                kind=point.kind,
                title=_point_title(point),
                chosen=point is source.chosen,
                x_low=x_of(bars[point.name][0]),
                x_high=x_of(bars[point.name][1]),
            )
            for point in points
        ),
        front=_stairs(corners, until=x_of(1.0)),
        rule=Tick(at=x_of(1.0), label="full run"),
        kinds=tuple(kind for kind in Kind if any(point.kind is kind for point in points)),
    )


def drift_chart(source: Source) -> Chart | None:
    """Relative L2 to the full run after each step, of the plan and of the nearest in time of every other kind."""
    search = source.search
    if search is None:
        return None
    points = _points_with_drift(source, search)
    if not points:
        return None
    across, first, last = scale(1, max(len(drift) for _, drift in points), LEFT, RIGHT)
    up, _, highest = scale(0.0, max(max(drift) for _, drift in points), BOTTOM, TOP, from_zero=True)
    start = source.plan.run_schedule().phase_start
    lines = []
    for point, drift in points:
        places = [(across(step), up(value)) for step, value in enumerate(drift, start=1)]
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        chosen = point is source.chosen
        lines.append(Line(path=path, end=places[-1], kind=point.kind, label=point.name, chosen=chosen))
    return Chart(
        x_ticks=tuple(Tick(at=across(value), label=label) for value, label in linear_ticks(max(1.0, first), last)),
        y_ticks=tuple(Tick(at=up(value), label=label) for value, label in linear_ticks(0.0, highest)),
        lines=tuple(lines),
        rule=None if start is None else Tick(at=across(start + 0.5), label="phase 2"),
    )


def _points_with_drift(source: Source, search: SearchRecord) -> list[tuple[PointRecord, tuple[float, ...]]]:
    """The chosen point first, then of every kind the one nearest to it in time."""
    chosen = source.chosen
    target = source.plan.cost_ratio() if chosen is None else chosen.latency_ratio
    nearest: dict[Kind, tuple[PointRecord, tuple[float, ...]]] = {}
    for point in sorted(search.points, key=lambda point: (point is not chosen, abs(point.latency_ratio - target))):
        if point.drift and point.kind is not Kind.FULL:
            nearest.setdefault(point.kind, (point, point.drift))
    return list(nearest.values())


def _error_bar(point: PointRecord) -> tuple[float, float]:
    half = point.latency_iqr / 2
    # A log axis has no place for a bar that reaches zero.
    return max(point.latency_ratio - half, point.latency_ratio / 10), point.latency_ratio + half


def _point_title(point: PointRecord) -> str:
    spread = f" ± {percent(point.latency_iqr / 2)}" if point.latency_iqr else ""
    front = ", on the front" if point.on_front else ""
    whose = "PyTorch's own full run's" if point.runtime == "pytorch" else "the full run's"
    time = f"{percent(point.latency_ratio)}{spread} of {whose} time"
    return f"{point.name} ({point.kind}): {time}, {decibels(point.quality.psnr_db)}{front}"


def scale(
    low: float, high: float, start: float, end: float, *, from_zero: bool = False
) -> tuple[Callable[[float], float], float, float]:
    """A linear map of values to places, with some room around them, and the values at its ends."""
    room = MARGIN * (high - low) or 0.5 * (abs(high) or 1.0)
    low, high = low if from_zero else low - room, high + room

    def place(value: float) -> float:
        return round(start + (end - start) * (value - low) / (high - low), 2)

    return place, low, high


def _stairs(corners: Sequence[tuple[float, float]], until: float) -> str:
    """The best that can be had in at most that time: a step up at every point of the front, level in between."""
    if not corners:
        return ""
    (x, y), *rest = corners
    steps = "".join(f"H{x}V{y}" for x, y in rest)
    return f"M{x} {y}{steps}H{max(until, corners[-1][0])}"


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [step * 10.0**power for power in powers for step in LOG_STEPS]
    return [value for value in found if low <= value <= high]


def linear_ticks(low: float, high: float, about: int = 6) -> list[tuple[float, str]]:
    """Round values from ``low`` to ``high``, about so many, each with its label."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in LINEAR_STEPS if power * factor >= rough)
    decimals = max(0, -math.floor(math.log10(step)))
    first = math.ceil(low / step)
    return [(index * step, f"{index * step:.{decimals}f}") for index in range(first, math.floor(high / step) + 1)]
