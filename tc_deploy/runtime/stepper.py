"""The model's calls of a sampling run, without its solver: for a loop that somebody else drives.

In: a bundle and, at every step, the model's inputs. Out: the model's output. A :class:`Stepper` owns the caches between
the steps of one trajectory; guidance is two rows of its batch, or two steppers. Never: knows of a scheduler's update.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tc_deploy.backends.base import BoundGraph, Buffer, Device, Graph
from tc_deploy.backends.load import load_target
from tc_deploy.backends.process import check_process
from tc_deploy.errors import UsageError
from tc_deploy.manifest import FP32_GRAPHS, SOLVER, Role, TensorRecord, model_axes
from tc_deploy.runtime.binding import Binder, Bundle
from tc_deploy.runtime.buffers import BufferKey, condition_arrays, own_buffer, role_buffer
from tc_deploy.runtime.layout import layout_of
from tc_deploy.runtime.program import program_of, prologue_calls
from tc_deploy.schedule import full_schedule
from tc_deploy.types import FloatArray


@dataclass(frozen=True, kw_only=True)
class _BoundCall:
    """The model's call of one step."""

    graph: BoundGraph
    reads: tuple[str, ...]
    """The inputs that it takes from the caller; none where it skips the model."""


@dataclass(frozen=True, kw_only=True)
class _Prologue:
    """What is made before the first step."""

    graph: BoundGraph
    buffers: Mapping[BufferKey, Buffer]
    """Of conditions."""
    conditions: tuple[str, ...]
    steps: int

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> None:
        for name in self.conditions:
            for key, array in condition_arrays(self.buffers, name, inputs[name], self.steps).items():
                self.buffers[key].write(array)
        self.graph.run()


class Engines:
    """A bundle's engines, loaded once for any number of steppers.

    Args:
        bundle: as :func:`tc_deploy.runtime.binding.read_bundle` gives it.

    Raises:
        BundleError: the target is not of this bundle, or a file of it is missing, truncated or altered.
        BackendError: the engine is not installed or refuses the graphs.
    """

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self._device: Device
        self._graphs: dict[str, Graph]
        self._device, self._graphs = load_target(
            bundle.path, bundle.manifest, bundle.backend, lambda graph: graph not in (SOLVER, *FP32_GRAPHS)
        )

    @property
    def inputs(self) -> tuple[TensorRecord, ...]:
        """What the caller gives at every step; the batch is the first axis of each."""
        return self.bundle.manifest.given

    @property
    def static_batch(self) -> int | None:
        """The model's batch where the graphs fix it; None where they take any."""
        size = self.inputs[0].shape[0]
        return size if isinstance(size, int) else None

    def stepper(self, model_batch: int, *, full: bool = False) -> Stepper:
        """Bind one trajectory's calls to buffers of its own.

        Args:
            model_batch: rows of every input.
            full: run every step in full, for comparison.

        Raises:
            UsageError: the graphs fix another batch.
            BackendError: the engine refuses that batch.
        """
        if model_batch < 1 or self.static_batch not in (None, model_batch):
            expected = "at least 1" if self.static_batch is None else f"exactly {self.static_batch}"
            raise UsageError(
                f"{self.bundle.path}: exported for a batch of {expected} in the model (guidance counts twice), found"
                f" {model_batch}; export again with another --static-batch, or without it"
            )
        plan, manifest = self.bundle.plan, self.bundle.manifest
        schedule = full_schedule(plan.schedule.steps) if full else plan.run_schedule()
        program = program_of(manifest.graphs, schedule, plan.cache.forecast_order, manifest.solver.history)
        before = prologue_calls(manifest.graphs, plan.schedule.steps)
        called = [*before, *(step.model for step in program)]
        layout = layout_of(manifest.graphs, called, model_axes(model_batch, plan.schedule.steps))
        binder = Binder(self.bundle, self._device, self._graphs, layout)
        keys = {tensor.name: own_buffer(tensor) for tensor in self.inputs}
        calls = [
            _BoundCall(
                graph=self._device.capture([binder.bind(step.model)]),
                reads=tuple(name for name in keys if name in step.model.inputs),
            )
            for step in program
        ]
        given = {name: binder.buffers[key] for name, key in keys.items() if key in binder.buffers}
        prologue = _Prologue(
            graph=self._device.capture([binder.bind(call) for call in before]),
            buffers={key: buffer for key, buffer in binder.buffers.items() if key.role is Role.CONDITION},
            conditions=tuple(tensor.name for tensor in self.inputs if tensor.role is Role.CONDITION),
            steps=plan.schedule.steps,
        )
        output = binder.buffers[role_buffer(Role.SAMPLE)]
        return Stepper(calls, given, output, prologue if before else None)


class Stepper:
    """One trajectory: its position and its caches. Made by :meth:`Engines.stepper`."""

    def __init__(
        self, calls: list[_BoundCall], given: Mapping[str, Buffer], output: Buffer, prologue: _Prologue | None
    ) -> None:
        self._calls, self._given, self._output, self._prologue = calls, given, output, prologue
        self.position = 0
        """The step that comes next; T after the last."""

    def start(self) -> None:
        """Begin another trajectory. The first step runs in full and replaces what the last one left."""
        self.position = 0

    def step(self, inputs: Mapping[str, NDArray[Any]]) -> FloatArray:
        """Run the next step.

        Args:
            inputs: an array of the buffer's own dtype and shape for each of :attr:`Engines.inputs`. Conditions are
                those of the first step: what was made of these serves all.

        Returns:
            (model batch, ...) the model's output, the caller's own.

        Raises:
            UsageError: the trajectory has ended.
            BackendError: the engine fails; start again.
        """
        if self.position == len(self._calls):
            raise UsageError(f"all {len(self._calls)} steps of the plan have run; start again")
        check_process()
        if self._prologue is not None and self.position == 0:
            self._prologue.run(inputs)
        call = self._calls[self.position]
        for name in call.reads:
            self._given[name].write(inputs[name])
        call.graph.run()
        self.position += 1
        return np.asarray(self._output.read())
