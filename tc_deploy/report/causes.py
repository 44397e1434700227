"""The picture of a validation: how far the latents drift after each step, one curve per cause, on a logarithmic axis.

In: a validation. Out: a chart of plain numbers and words; the template draws it. Never: writes markup.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tc_deploy.report.charts import BOTTOM, LEFT, RIGHT, TOP, Tick, linear_ticks, scale
from tc_deploy.validate.record import ValidationRecord

_LEAST = 1e-9
"""Below it nothing can be told from rounding; a curve that reaches zero stops there."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One cause's curve."""

    cause: str
    """``algorithm``, ``export``, ``engine`` or ``precision``; also its name in the style sheet."""
    meaning: str
    path: str
    """SVG path, broken where a step has no error to draw."""


@dataclass(frozen=True, kw_only=True)
class CauseChart:
    """Everything that the template needs; named as the other charts' parts are."""

    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    curves: tuple[Curve, ...]
    rule: Tick | None = None


def cause_chart(validation: ValidationRecord | None, phase_start: int | None) -> CauseChart | None:
    """Relative L2 of the latents by cause; None without a validation, or where it found no error at all.

    Args:
        validation: what ``tc-deploy validate -o`` wrote.
        phase_start: the plan's first step of phase 2; None where there are no two phases.
    """
    if validation is None:
        return None
    drift = validation.drift
    meanings = {
        "algorithm": (drift.algorithm, "caching, against full steps: PyTorch"),
        "export": (drift.export, "the ONNX graphs, against PyTorch"),
        "engine": (drift.engine, f"{validation.backend}, against ONNX Runtime"),
        "precision": (drift.precision, f"{validation.precision}, against the graphs' own precision"),
    }
    values = [
        value for column, _ in meanings.values() for value in column or () if value is not None and value > _LEAST
    ]
    if not values:
        return None
    steps = len(drift.total)
    across, first, last = scale(1, steps, LEFT, RIGHT)
    up, low, high = scale(math.log10(min(values)), math.log10(max(values)), BOTTOM, TOP)
    curves = []
    for cause, (column, meaning) in meanings.items():
        places = [
            (across(step), up(math.log10(value))) if value is not None and value > _LEAST else None
            for step, value in enumerate(column or (), start=1)
        ]
        if any(places):
            curves.append(Curve(cause=cause, meaning=meaning, path=_path(places)))
    return CauseChart(
        x_ticks=tuple(Tick(at=across(value), label=label) for value, label in linear_ticks(max(1.0, first), last)),
        y_ticks=tuple(
            Tick(at=up(power), label=f"1e{power}".replace("-", "−"))
            for power in range(math.ceil(low), math.floor(high) + 1)
        ),
        curves=tuple(curves),
        rule=None if phase_start is None else Tick(at=across(phase_start + 0.5), label="phase 2"),
    )


def _path(places: list[tuple[float, float] | None]) -> str:
    parts, drawing = [], False
    for place in places:
        if place is not None:
            parts.append(f"{'L' if drawing else 'M'}{place[0]:.1f} {place[1]:.1f}")
        drawing = place is not None
    # A single step is a dot: a line of no length, drawn with round ends.
    return "".join(parts) if len(parts) > 1 else f"{parts[0]}h0"
