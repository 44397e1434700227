"""Several bound graphs as one, on a device that has nothing to capture: they run in turn."""

from __future__ import annotations

from collections.abc import Sequence

from tc_deploy.backends.base import BoundGraph


class InTurn:
    """Bound graphs that run one after another."""

    def __init__(self, graphs: Sequence[BoundGraph]) -> None:
        self._graphs = tuple(graphs)

    def prepare(self) -> None:
        """Nothing: a first run costs what every run costs."""

    def run(self) -> None:
        """Run all of them.

        Raises:
            BackendError: one of them fails.
        """
        for graph in self._graphs:
            graph.run()
