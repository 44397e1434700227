"""Traffic through a scheduler, under a clock that runs as calls of the engine would take.

In: a scheduler, arrivals, and what a call costs: numbers, or a function that runs it and measures. Out: when each job
came, got a slot and was done. Never: opens a socket, or waits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from tc_deploy.runtime.course import Course, Tick
from tc_deploy.serving.scheduler import Job, Scheduler

Cost = Callable[[Tick], float]
"""The seconds that a tick takes."""


@dataclass(kw_only=True)
class Traffic:
    """What became of arrivals."""

    latency_s: list[float] = field(default_factory=list)
    """From arrival to the last step, of those that were done, in the order of their ends."""
    end_s: float = 0.0
    """When the last was done."""
    busy_s: float = 0.0
    """In which the engine ran."""
    refused: int = 0
    rows: int = 0
    """Slots of all calls, those that were computed in vain too."""
    useful_rows: int = 0

    @property
    def throughput(self) -> float:
        """Jobs per second."""
        return len(self.latency_s) / self.end_s

    def latency_at(self, percent: float) -> float:
        """A percentile of the latencies, in seconds."""
        return float(np.percentile(self.latency_s, percent))


def poisson_arrivals(rate: float, count: int, seed: int) -> list[float]:
    """Times of so many arrivals, ``rate`` per second on average, each independent of the others."""
    gaps = np.random.default_rng(seed).exponential(1 / rate, count)
    return [float(time_s) for time_s in np.cumsum(gaps)]


def costs_of(call_s: Mapping[tuple[int, int], float]) -> Cost:
    """What calls cost by a table, by variant and number of slots."""
    return lambda tick: call_s[tick.kind.variant, tick.size]


def simulate(
    scheduler: Scheduler,
    arrivals: Sequence[tuple[float, Course]],
    cost: Cost,
    admitted: Callable[[Job], object] = lambda job: None,
) -> Traffic:
    """Let jobs arrive, and time pass until the last is done.

    Args:
        scheduler: fresh.
        arrivals: ascending times in seconds, and what each job is.
        cost: of a tick; it may run it.
        admitted: told of each job that gets a slot.
    """
    traffic, now_s, coming = Traffic(), 0.0, 0
    while True:
        while coming < len(arrivals) and arrivals[coming][0] <= now_s:
            arrived_s, course = arrivals[coming]
            traffic.refused += not scheduler.submit([Job(course=course, arrived_s=arrived_s, what=coming)])
            coming += 1
        for job in scheduler.admit(now_s):
            admitted(job)
        tick = scheduler.tick(now_s)
        if tick is None:
            if coming == len(arrivals):
                return traffic
            now_s = arrivals[coming][0]
            continue
        seconds = cost(tick)
        now_s += seconds
        traffic.busy_s += seconds
        traffic.rows += tick.size
        traffic.useful_rows += len(tick.places)
        for job in scheduler.done(tick, now_s):
            traffic.latency_s.append(now_s - job.arrived_s)
            traffic.end_s = now_s
