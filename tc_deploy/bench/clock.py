"""Times one sampling run, and while it is on also every graph's call inside that run.

Graphs are timed where they work, with the caches that the step before left behind: alone and in a row, the same graphs
take other times, by more than all that the host does.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from tc_deploy.backends.base import BoundGraph, Buffer


@dataclass(frozen=True, kw_only=True)
class Run:
    """One timed run."""

    wall_ms: float
    calls_ms: dict[str, list[float]]
    """By graph, each call's time; empty where the graphs were not timed."""

    def host_share(self) -> float:
        """The part of the run in which no graph ran."""
        return 1 - sum(map(sum, self.calls_ms.values())) / self.wall_ms


class Clock:
    """The clock of one pipeline; its ``watch`` is the pipeline's."""

    def __init__(self) -> None:
        self._calls_ms: dict[str, list[float]] = {}
        self.on = False

    def watch(self, name: str, graph: BoundGraph, output: Buffer) -> BoundGraph:
        """Put the clock around a graph."""
        return _ClockedGraph(self, name, graph, output)

    def add(self, name: str, elapsed_ms: float) -> None:
        """Note a call."""
        self._calls_ms.setdefault(name, []).append(elapsed_ms)

    def timed(self, request: Callable[[], object], *, graphs: bool) -> Run:
        """Run a request.

        Args:
            request: runs the pipeline.
            graphs: time every graph as well. Each is then waited for, so that a device that would run ahead of the host
                does not, and the run's own time is not to be quoted.
        """
        self._calls_ms, self.on = {}, graphs
        start_s = time.perf_counter()
        request()
        wall_ms = 1e3 * (time.perf_counter() - start_s)
        return Run(wall_ms=wall_ms, calls_ms=self._calls_ms)


def step_by_step(first: int, step: object) -> None:
    """An ``on_step`` that looks at nothing: with it a pipeline runs one graph after another, which a clock can time."""


class _ClockedGraph:
    """A bound graph with the clock around it."""

    def __init__(self, clock: Clock, name: str, graph: BoundGraph, output: Buffer) -> None:
        self._clock, self._name, self._graph, self._output = clock, name, graph, output

    def run(self) -> None:
        if not self._clock.on:
            self._graph.run()
            return
        start_s = time.perf_counter()
        self._graph.run()
        self._output.read()  # waits for the device
        self._clock.add(self._name, 1e3 * (time.perf_counter() - start_s))
