"""The memory of slots, and the graphs bound to it.

In: a bundle, its graphs on a device, a number of slots. Out: buffers by name, parts of them by slot, and calls: the
model's and the solver's, each for some number of samples. Never: writes a buffer, or runs a graph.

A buffer ``slot.NAME`` holds a row (two with guidance) for each slot, side by side, and outlives a call; where something
is kept of several steps there is one for each place, ``slot.NAME@1``. All others belong to a call, and begin with the
row of the call's first sample. What the model reads and writes beside the caches is called ``model.NAME``, what only
one graph knows after the graph: ``cached-1.token_index``, ``solver.latents.1``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache

import numpy as np

from tc_deploy.backends.base import BoundGraph, Buffer, BufferSpec, Device, Graph
from tc_deploy.manifest import (
    BATCH,
    GIVEN_ROLES,
    MODEL_BATCH,
    PROLOGUE_ROLES,
    SOLVER,
    Role,
    TensorName,
    TensorRecord,
    variant_name,
)
from tc_deploy.runtime.binding import Bundle
from tc_deploy.runtime.course import is_shared
from tc_deploy.schedule import FULL

_IN_HALVES = (Role.SAMPLE, Role.HIDDEN_STATES)
"""Of the solver's tensors, those that have a row for each half of guidance."""


class SlotBuffers:
    """See the module.

    Args:
        bundle: names the graphs' tensors.
        device: where the buffers are made, all at once.
        graphs: loaded on that device, by name.
        variants: those in use.
        count: slots.

    Raises:
        BackendError: the device has not that much memory.
    """

    def __init__(
        self, bundle: Bundle, device: Device, graphs: Mapping[str, Graph], variants: Iterable[int], count: int
    ) -> None:
        self._device, self._graphs, self._count = device, graphs, count
        self.halves = 2 if bundle.manifest.guided else 1
        self.steps = bundle.plan.schedule.steps
        self.ages = bundle.plan.cache.forecast_order + 1
        self._models = [variant_name(variant) for variant in variants]
        self.records = {name: bundle.manifest.graphs[name] for name in (*self._models, SOLVER)}
        self._rows_of: dict[str, int] = {}
        """Of a buffer with a batch axis, the rows that a slot has in it."""
        specs: dict[str, BufferSpec] = {}
        for name, tensor, rows in self._wanted():
            axes = {MODEL_BATCH: 1, BATCH: 1}
            shape = tensor.shape_at(axes) if rows is None else (rows * count, *tensor.shape_at(axes)[1:])
            exchanged = tensor.role is not Role.CACHE
            specs.setdefault(name, BufferSpec(dtype=tensor.numpy_dtype, shape=shape, exchanged=exchanged))
            if rows is not None:
                self._rows_of[name] = rows
        self._dtypes = {name: spec.dtype for name, spec in specs.items()}
        self._buffers = dict(zip(specs, device.buffers(list(specs.values())), strict=True))
        # To make a view or to bind costs more than what is done with it.
        self.rows = cache(self._rows)
        self.model = cache(self._model)
        self.solver = cache(self._solver)

    def whole(self, name: str) -> Buffer:
        """A buffer."""
        return self._buffers[name]

    def dtype(self, name: str) -> np.dtype[np.generic]:
        """Of a buffer."""
        return self._dtypes[name]

    def of_slot(self, name: str, number: int) -> Buffer:
        """A slot's part of a buffer."""
        rows = self._rows_of[name]
        return self.rows(name, number * rows, (number + 1) * rows)

    def for_step(self, tensor: TensorName, number: int, step: int) -> Buffer:
        """What a slot has for a tensor of the model at a step."""
        name = slot_name(tensor.name)
        if not _is_scheduled(tensor):
            return self.of_slot(name, number)
        first = number * self._rows_of[name] + step * self.halves
        return self.rows(name, first, first + self.halves)

    def rows_of_slot(self, name: str, number: int, start: int, stop: int) -> Buffer:
        """Some rows of a slot's part of a buffer."""
        first = number * self._rows_of[name]
        return self._rows(name, first + start, first + stop)

    def __contains__(self, name: str) -> bool:
        """Whether there is a buffer of that name."""
        return name in self._buffers

    def _rows(self, name: str, start: int, stop: int) -> Buffer:
        return self._buffers[name].rows(start, stop)

    def _wanted(self) -> Iterable[tuple[str, TensorRecord, int | None]]:
        """Every buffer by name, a tensor like it, and its rows for a slot; None where it has no batch axis."""
        record = self.records[SOLVER]
        for tensor in (*record.inputs, *record.outputs):
            yield call_name(SOLVER, tensor.name), tensor, self.halves if tensor.role in _IN_HALVES else 1
            if tensor.role in (Role.LATENTS, Role.GUIDED_OUTPUT) and tensor in record.inputs:
                place = tensor.age if tensor.role is Role.LATENTS else tensor.age - 1
                yield slot_name(tensor.role, place), tensor, 1
        for graph in self._models:
            record = self.records[graph]
            for tensor in record.inputs:
                if tensor.role in PROLOGUE_ROLES:
                    yield slot_name(tensor.name), tensor, self.halves * (self.steps if _is_scheduled(tensor) else 1)
                name = gathered_name(tensor) if _reads_slots(graph, tensor) else _of_call(graph, tensor)
                yield name, tensor, None if is_shared(tensor) else self.halves
                if tensor.role in GIVEN_ROLES:
                    yield slot_name(tensor.name), tensor, self.halves
            for tensor in record.outputs:
                yield _of_call(graph, tensor), tensor, self.halves
                if graph == variant_name(FULL) and tensor.cache is not None:
                    for position in range(self.ages):
                        yield slot_name(tensor.cache, position), tensor, self.halves

    def _model(self, variant: int, first: int | None, size: int) -> BoundGraph:
        """A variant on so many samples, on the caches of the slots from ``first`` on; None: on those gathered."""
        graph = variant_name(variant)
        record, halves = self.records[graph], self.halves

        def place(tensor: TensorRecord) -> Buffer:
            if _reads_slots(graph, tensor):
                if first is None:
                    return self.rows(gathered_name(tensor), 0, size * halves)
                return self.rows(slot_name(str(tensor.cache), tensor.age), first * halves, (first + size) * halves)
            name = _of_call(graph, tensor)
            return self.whole(name) if is_shared(tensor) else self.rows(name, 0, size * halves)

        inputs = {tensor.name: place(tensor) for tensor in record.inputs}
        # A cached step that computes rows of caches leaves them where nobody reads them.
        outputs = {tensor.name: self.rows(_of_call(graph, tensor), 0, size * halves) for tensor in record.outputs}
        return self._device.capture([self._graphs[graph].bind(inputs, outputs)])

    def _solver(self, size: int) -> BoundGraph:
        """The solver on so many samples."""
        record = self.records[SOLVER]

        def of_call(tensor: TensorRecord) -> Buffer:
            name = call_name(SOLVER, tensor.name)
            return self.rows(name, 0, size * self._rows_of[name])

        inputs, outputs = (
            {tensor.name: of_call(tensor) for tensor in tensors} for tensors in (record.inputs, record.outputs)
        )
        return self._device.capture([self._graphs[SOLVER].bind(inputs, outputs)])


def _is_scheduled(tensor: TensorName) -> bool:
    """Whether a slot keeps a tensor for every step."""
    return tensor.role is Role.SCHEDULED


def slot_name(what: str, position: int | None = None) -> str:
    """The buffer of all slots that holds something; of what is kept of several steps, the one for a place."""
    return f"slot.{what}" + ("" if position is None else f"@{position}")


def call_name(graph: str, tensor: str) -> str:
    """The buffer of a call that a tensor of one graph has."""
    return f"{graph}.{tensor}"


def model_name(tensor: str) -> str:
    """The buffer of a call that a tensor of all the model's graphs has."""
    return call_name("model", tensor)


def gathered_name(tensor: TensorRecord) -> str:
    """The buffer of a call for the caches of slots that lie apart."""
    return f"gathered.{tensor.cache}@{tensor.age}"


def _reads_slots(graph: str, tensor: TensorRecord) -> bool:
    """Whether an input of a model's graph is a cache of the slots."""
    return tensor.role is Role.CACHE and graph != variant_name(FULL)


def _of_call(graph: str, tensor: TensorRecord) -> str:
    """The buffer of a call that any other tensor of a model's graph has.

    Where one graph holds all variants, the full one is given caches to read too: zeros, which nobody writes.
    """
    shared = tensor.role in (Role.SAMPLE, *GIVEN_ROLES, *PROLOGUE_ROLES)
    return model_name(tensor.name) if shared else call_name(graph, tensor.name)
