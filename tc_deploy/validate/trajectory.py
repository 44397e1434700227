"""The saved sampling run once more, on any engines, with an eye on what every graph reads.

In: a bundle, its engines, the run's noise and conditions. Out: the latents after each step and, where asked for, a note
of every call: fingerprints of its inputs and outputs, and the arrays of its tables. Never: judges.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tc_deploy.backends.base import BoundGraph, Buffer, Device, Graph
from tc_deploy.golden import Feed, Trajectory
from tc_deploy.manifest import PROLOGUE_GRAPHS
from tc_deploy.runtime.pipeline import Pipeline
from tc_deploy.types import FloatArray

Engines: TypeAlias = tuple[Device, Mapping[str, Graph]]
"""A device and a bundle's graphs on it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CallNote:
    """One run of a graph."""

    graph: str
    inputs: Mapping[str, str]
    """Fingerprints by tensor name."""
    outputs: Mapping[str, str]
    arrays: Feed
    """The inputs that were asked for; all of them where the step was asked for."""


@dataclass(kw_only=True)
class Recorder:
    """Notes every call of the engines that it has wrapped.

    Args:
        whole_steps: steps whose inputs are kept as arrays; of the others' a fingerprint has to do, caches are large.
        small: inputs that are kept as arrays at every step.
    """

    whole_steps: Container[int] = ()
    small: Container[str] = ()
    calls: list[CallNote] = field(default_factory=list)
    """Of the steps, two of each: the model's and the solver's."""
    made_before: dict[str, list[NDArray[Any]]] = field(default_factory=dict)
    """What the calls before the first step have made, by tensor name."""

    def wrapped(self, engines: Engines) -> Engines:
        """The same engines, watched."""
        device, graphs = engines
        return device, {name: _WatchedGraph(self, name, graph) for name, graph in graphs.items()}

    def run(self, name: str, bound: BoundGraph, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
        """Run a graph and note what it read and made."""
        if name in PROLOGUE_GRAPHS:
            bound.run()
            for tensor, buffer in outputs.items():
                self.made_before.setdefault(tensor, []).append(buffer.read())
            return
        whole = len(self.calls) // 2 in self.whole_steps
        arrays: Feed = {}
        read = {}
        for tensor, buffer in inputs.items():
            array = buffer.read()
            read[tensor] = fingerprint(array)
            if whole or tensor in self.small:
                arrays[tensor] = array
        bound.run()
        made = {tensor: fingerprint(buffer.read()) for tensor, buffer in outputs.items()}
        self.calls.append(CallNote(graph=name, inputs=read, outputs=made, arrays=arrays))


class _WatchedGraph:
    """A graph whose bound runs a recorder sees."""

    def __init__(self, recorder: Recorder, name: str, graph: Graph) -> None:
        self._recorder, self._name, self._graph = recorder, name, graph

    def bind(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> BoundGraph:
        return _WatchedRun(self._recorder, self._name, self._graph.bind(inputs, outputs), inputs, outputs)


class _WatchedRun:
    def __init__(
        self,
        recorder: Recorder,
        name: str,
        bound: BoundGraph,
        inputs: Mapping[str, Buffer],
        outputs: Mapping[str, Buffer],
    ) -> None:
        self._recorder, self._name, self._bound, self._inputs, self._outputs = recorder, name, bound, inputs, outputs

    def run(self) -> None:
        self._recorder.run(self._name, self._bound, self._inputs, self._outputs)


def fingerprint(array: np.ndarray[Any, Any]) -> str:
    """Of an array's bytes."""
    return hashlib.blake2b(np.ascontiguousarray(array).data, digest_size=16).hexdigest()


def run_trajectory(
    path: Path, backend: str, engines: Engines, trajectory: Trajectory, *, times: int = 1
) -> list[FloatArray]:
    """Sample under the plan from the saved noise and conditions.

    Args:
        path: ``engines/NAME``.
        backend: one of its targets.
        engines: what is run, the target's own or others.
        trajectory: the saved run.
        times: how often the same is done.

    Returns:
        For each time the latents after each step, (T, B, C, H, W).

    Raises:
        BackendError: an engine fails.
    """
    runs = []
    with Pipeline(path, backend, batch_size=len(trajectory.noise), engines=engines, check_finite=False) as pipeline:
        for _ in range(times):
            latents: list[FloatArray] = []
            pipeline(
                conditions=trajectory.conditions,
                unconditional=trajectory.unconditional or None,
                latents=trajectory.noise,
                decode=False,
                on_step=lambda first, step, latents=latents: latents.append(step.read_latents()),  # type: ignore[misc]
            )
            runs.append(np.stack(latents))
    return runs
