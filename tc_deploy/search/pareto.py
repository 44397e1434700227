"""What is worth having of many, by latency and PSNR: candidates of a search and its points alike."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypeVar


class Measured(Protocol):
    """Anything with the two figures."""

    @property
    def latency_ratio(self) -> float:
        """Lower is better."""

    @property
    def psnr_db(self) -> float:
        """Higher is better."""


MeasuredT = TypeVar("MeasuredT", bound=Measured)


def front(items: Iterable[MeasuredT]) -> tuple[MeasuredT, ...]:
    """Those that no other beats in one figure without losing in the other, by latency; of equal ones the first."""
    best: list[MeasuredT] = []
    for item in sorted(items, key=lambda item: (item.latency_ratio, -item.psnr_db)):
        if not best or item.psnr_db > best[-1].psnr_db:
            best.append(item)
    return tuple(best)


def dominates(one: Measured, other: Measured) -> bool:
    """Whether ``one`` is as fast and as close to the full run as ``other``, and better in one of the two."""
    mine, theirs = ((item.latency_ratio, -item.psnr_db) for item in (one, other))
    return mine != theirs and mine[0] <= theirs[0] and mine[1] <= theirs[1]
