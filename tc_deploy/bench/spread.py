"""What is quoted of many values: percentiles and the interquartile range.

A p99 of fewer than a hundred values lies between the two largest: it tells of the worst that was seen, and no more.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

DIGITS = 4
"""After the point; a tenth of a microsecond."""


def latency_of(times_ms: Sequence[float]) -> dict[str, float]:
    """Percentiles of times, with linear interpolation, the largest, and the interquartile range."""
    p25, p50, p75, p90, p99 = np.percentile(times_ms, (25, 50, 75, 90, 99)).tolist()
    found = {"p50_ms": p50, "p90_ms": p90, "p99_ms": p99, "max_ms": max(times_ms), "iqr_ms": p75 - p25}
    return {name: round(value, DIGITS) for name, value in found.items()}


def median_of(values: Sequence[float]) -> dict[str, float]:
    """Median and interquartile range."""
    p25, p50, p75 = np.percentile(values, (25, 50, 75)).tolist()
    return {"median": round(p50, DIGITS), "iqr": round(p75 - p25, DIGITS)}


def ratio_of(times_ms: Sequence[float], base_ms: Sequence[float]) -> dict[str, float]:
    """Median and interquartile range of the ratios round by round, in which a slow round cancels out."""
    return median_of([time / base for time, base in zip(times_ms, base_ms, strict=True)])
