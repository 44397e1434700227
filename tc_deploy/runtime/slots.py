"""Slots: samples that stand at different steps, batched step by step.

In: samples, each put into a slot, and ticks, which say what slots take a step together. Out: latents. A slot owns its
caches. Slots lie side by side in one buffer for each cached tensor, and a call of slots that are neighbours is bound to
the part that holds them, so that nothing moves; only where they lie apart are their caches copied together. How old the
cache in a place is differs from slot to slot, so each row's forecast weights are permuted accordingly. All else that a
call reads is small, and is copied into buffers of the call. Never: decides what runs, knows of requests, or starts a
thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tc_deploy.backends.base import Device, Graph
from tc_deploy.errors import UsageError
from tc_deploy.manifest import (
    GIVEN_ROLES,
    INDEX_ROLES,
    MODEL_OUTPUT,
    NEXT_LATENTS,
    PROLOGUE_ROLES,
    SOLVER,
    TABLE_ROLES,
    Role,
    TensorName,
    guided_output_tensor,
    latents_tensor,
    variant_name,
)
from tc_deploy.runtime.binding import Bundle
from tc_deploy.runtime.course import HD, Course, Place, Tick, courses_of, is_shared
from tc_deploy.runtime.program import EVERY_FULL_STEP
from tc_deploy.runtime.slot_buffers import SlotBuffers, call_name, gathered_name, model_name, slot_name
from tc_deploy.runtime.slot_prologue import SlotPrologue
from tc_deploy.schedule import FULL
from tc_deploy.types import FloatArray


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """What a slot is to make."""

    course: Course
    noise: FloatArray
    """(*latent shape), standard normal."""
    given: Mapping[str, NDArray[Any]]
    """Conditions by name, without a batch axis."""
    unconditional: Mapping[str, NDArray[Any]]
    """The same for the unconditional half; empty without guidance."""
    guidance_scale: float | None


def sizes_of(bundle: Bundle, slots: int) -> tuple[int, ...]:
    """How many slots one call may have: powers of two and all, or what the bundle was exported for.

    Raises:
        UsageError: the slots are none, or fewer than a call must have.
    """
    fixed = bundle.manifest.batch_size
    if slots < (fixed or 1):
        raise UsageError(f"{bundle.path}: slots must be at least {fixed or 1}, found {slots}")
    if fixed is not None:
        return (fixed,)
    return tuple(sorted({*(2**power for power in range(slots.bit_length())), slots}))


class Slots:
    """The slots of one bundle's engines; all their memory is allocated here.

    Args:
        bundle: whose documents are read and whose files are checked.
        device: where the graphs are.
        graphs: the bundle's, by name.
        count: how many slots.

    Raises:
        UsageError: too few slots for the bundle.
        BackendError: the device lacks memory, or shows no rows of its buffers.
    """

    def __init__(self, bundle: Bundle, device: Device, graphs: Mapping[str, Graph], count: int) -> None:
        self._bundle, self._solver_record = bundle, bundle.manifest.solver
        self.manifest = bundle.manifest
        self.count, self.sizes = count, sizes_of(bundle, count)
        self.courses = courses_of(bundle)
        variants = sorted({variant for course in self.courses.values() for variant in course.variants})
        self._buffers = SlotBuffers(bundle, device, graphs, variants, count)
        self._prologue = SlotPrologue(bundle, device, graphs) if bundle.manifest.has_prologue else None
        self._history = self._solver_record.history
        self._samples: dict[int, Sample] = {}
        self._table_row = cache(self._row_of_table)
        made = self._buffers.records[variant_name(FULL)].outputs
        self._cached = {tensor.name: tensor.cache for tensor in made if tensor.cache is not None}

    def start(self, number: int, sample: Sample) -> None:
        """Put a sample into a slot; whatever was there is gone.

        Nothing of the last sample reaches this one: the solver's history is cleared, and the first step, which is full,
        replaces every cache.
        """
        buffers, halves = self._buffers, self._buffers.halves
        self._samples[number] = sample
        start = sample.noise[None] * np.float32(self._solver_record.init_noise_sigma)
        for age in range(self._history + 1):
            # Before step 0 there is nothing; the coefficient is 0, but 0 times what a failed sample left may be NaN.
            buffers.of_slot(slot_name(Role.LATENTS, age), number).write(start)
        for age in range(self._history):
            buffers.of_slot(slot_name(Role.GUIDED_OUTPUT, age), number).write(np.zeros_like(start))
        scaled = start * self._bundle.first_scale
        buffers.of_slot(slot_name(Role.HIDDEN_STATES), number).write(np.concatenate([scaled] * halves))
        both = {
            name: np.stack([value, sample.unconditional[name]] if halves == 2 else [value])
            for name, value in sample.given.items()
        }
        for name, rows in both.items():
            if slot_name(name) in buffers:
                buffers.of_slot(slot_name(name), number).write(rows)
        if self._prologue is not None:
            self._prologue.run(
                both, lambda name, start, stop: buffers.rows_of_slot(slot_name(name), number, start, stop)
            )

    def run(self, tick: Tick) -> None:
        """Take a step with some slots, and the steps after it that skip the model.

        Raises:
            BackendError: the engine fails.
        """
        going: Sequence[Place] = tick.places
        self._step(tick.kind.variant, tick.size, going)
        while going := [place for place in map(self._without_model, going) if place is not None]:
            for variant in sorted({self._variant(place) for place in going}):
                alike = [place for place in going if self._variant(place) == variant]
                self._step(variant, self._size_for(len(alike)), alike)

    def latents(self, number: int, step: int) -> FloatArray:
        """A copy of a slot's latents (*latent shape) as they stand before a step; before T, the last ones."""
        found: FloatArray = self._latents(number, step).read()[0]
        return found

    def measured(self, clock: Callable[[], float] = time.perf_counter) -> dict[tuple[int, int], float]:
        """Run every call, once to warm it up and once to time it, on whatever lies there; no slot may be in use.

        Returns:
            Seconds by variant and number of slots.

        Raises:
            BackendError: the engine refuses a number of slots, or fails.
        """
        seconds = {}
        for course in self.courses.values():
            self._samples[0] = Sample(
                course=course, noise=np.zeros(0, np.float32), given={}, unconditional={}, guidance_scale=1.0
            )
            for step, kind in enumerate(course.kinds):
                for size in self.sizes:
                    if kind is None or (kind.variant, size) in seconds:
                        continue
                    tick = Tick(kind=kind, size=size, places=(Place(slot=0, step=step),))
                    for _ in range(2):
                        start = clock()
                        self.run(tick)
                        self.latents(0, step)
                        seconds[kind.variant, size] = clock() - start
        self._samples.clear()
        return seconds

    def _variant(self, place: Place) -> int:
        return self._samples[place.slot].course.variants[place.step]

    def _without_model(self, place: Place) -> Place | None:
        """The step after, if it skips the model."""
        course, step = self._samples[place.slot].course, place.step + 1
        return Place(slot=place.slot, step=step) if step < course.steps and course.kinds[step] is None else None

    def _size_for(self, count: int) -> int:
        """The smallest call that so many samples fit in."""
        return next(size for size in self.sizes if size >= count)

    def _step(self, variant: int, size: int, places: Sequence[Place]) -> None:
        """One step of some slots, which are of one variant."""
        first = self._first(variant, size, places)
        rows = {place.slot: number if first is None else place.slot - first for number, place in enumerate(places)}
        self._run_model(variant, size, first, places, rows)
        if variant == FULL:
            self._keep_caches(places, rows)
        self._run_solver(places, rows)

    def _first(self, variant: int, size: int, places: Iterable[Place]) -> int | None:
        """The first slot of a call that reads caches where they lie; None where it reads none, or they lie apart."""
        slots = [place.slot for place in places]
        if variant == FULL or max(slots) - min(slots) >= size:
            return None
        return min(*slots, self.count - size)

    def _run_model(
        self, variant: int, size: int, first: int | None, places: Sequence[Place], rows_of: Mapping[int, int]
    ) -> None:
        """The call of a step's graph: the model's, or the one that forecasts its output."""
        buffers, halves, graph = self._buffers, self._buffers.halves, variant_name(variant)
        # What a row that is computed in vain is told does not matter, as long as it makes sense.
        told = [places[0]] * size
        for place in places:
            told[rows_of[place.slot]] = place
        for tensor in buffers.records[graph].inputs:
            name = tensor.name
            if tensor.role is Role.CACHE:
                if first is not None or variant == FULL:
                    continue
                kept, name = slot_name(str(tensor.cache), tensor.age), gathered_name(tensor)
                given = {place: buffers.of_slot(kept, place.slot) for place in places}
            elif tensor.role in (*GIVEN_ROLES, *PROLOGUE_ROLES):
                name = model_name(name)
                given = {place: buffers.for_step(tensor, place.slot, place.step) for place in places}
            else:
                given = {}
            if given:
                for place, kept_rows in given.items():
                    row = rows_of[place.slot] * halves
                    buffers.rows(name, row, row + halves).copy(kept_rows)
                continue
            table = call_name(graph, name)
            if is_shared(tensor):
                buffers.whole(table).write(self._row(table, tensor, places[0]))
            else:
                rows = np.stack([self._row(table, tensor, place) for place in told])
                buffers.rows(table, 0, size * halves).write(np.repeat(rows, halves, axis=0))
        buffers.model(variant, first, size).run()

    def _keep_caches(self, places: Iterable[Place], rows_of: Mapping[int, int]) -> None:
        """Put what a full step has computed where its slots have their oldest caches."""
        buffers, halves, graph = self._buffers, self._buffers.halves, variant_name(FULL)
        for place in places:
            variants = self._samples[place.slot].course.variants
            if set(variants) == {FULL}:
                continue  # nobody will read them
            row = rows_of[place.slot] * halves
            earlier = variants[: place.step].count(FULL)
            # After the first one all places hold it: those that no weight asks for must be finite, and of this sample.
            positions = [earlier % buffers.ages] if earlier else range(buffers.ages)
            for output, cached in self._cached.items():
                made = buffers.rows(call_name(graph, output), row, row + halves)
                for position in positions:
                    buffers.of_slot(slot_name(cached, position), place.slot).copy(made)

    def _run_solver(self, places: Sequence[Place], rows_of: Mapping[int, int]) -> None:
        """The sampler's update of some slots, whose model output lies in these rows."""
        buffers, halves = self._buffers, self._buffers.halves
        size = self._size_for(len(places))

        def call(name: str, row: int) -> Any:
            return buffers.rows(call_name(SOLVER, name), row, row + 1)

        for row, place in enumerate(places):
            # The model has a sample's halves side by side, the solver all conditional rows before the others.
            for half in range(halves):
                made = rows_of[place.slot] * halves + half
                call(MODEL_OUTPUT.name, half * size + row).copy(buffers.rows(model_name(Role.SAMPLE), made, made + 1))
            for age in range(self._history + 1):
                call(latents_tensor(age).name, row).copy(self._latents(place.slot, place.step - age))
            for age in range(1, self._history + 1):
                call(guided_output_tensor(age).name, row).copy(self._guided_output(place.slot, place.step - age))
        told = [*places, *[places[-1]] * (size - len(places))]
        for tensor in buffers.records[SOLVER].inputs:
            if tensor.role in TABLE_ROLES:
                name = call_name(SOLVER, tensor.name)
                buffers.rows(name, 0, size).write(np.stack([self._row(name, tensor, place) for place in told]))
        if halves == 2:
            scales = np.array([self._samples[place.slot].guidance_scale for place in told], np.float32)
            buffers.rows(call_name(SOLVER, Role.GUIDANCE_SCALE), 0, size).write(scales)
        buffers.solver(size).run()
        for row, place in enumerate(places):
            self._latents(place.slot, place.step + 1).copy(call(NEXT_LATENTS.name, row))
            if self._history:
                self._guided_output(place.slot, place.step).copy(call(Role.GUIDED_OUTPUT, row))
            for half in range(halves):
                to = place.slot * halves + half
                buffers.rows(slot_name(Role.HIDDEN_STATES), to, to + 1).copy(
                    call(Role.HIDDEN_STATES, half * size + row)
                )

    def _latents(self, number: int, step: int) -> Any:
        return self._buffers.of_slot(slot_name(Role.LATENTS, step % (self._history + 1)), number)

    def _guided_output(self, number: int, step: int) -> Any:
        return self._buffers.of_slot(slot_name(Role.GUIDED_OUTPUT, step % self._history), number)

    def _row(self, buffer: str, tensor: TensorName, place: Place) -> NDArray[Any]:
        return self._table_row(buffer, tensor, self._samples[place.slot].course.name, place.step)

    def _row_of_table(self, buffer: str, tensor: TensorName, course: str, step: int) -> NDArray[Any]:
        """What a step of a course takes of an input's table, in the type of the buffer that it goes to."""
        variants, ages = self.courses[course].variants, self._buffers.ages
        grouped = variants[step] == FULL and tensor.role in INDEX_ROLES
        row = self._bundle.row(tensor, EVERY_FULL_STEP if grouped else step, own_solver=course == HD)
        if tensor.role is Role.FORECAST_WEIGHTS and variants[step] != FULL:
            # The cache of the f-th full step lies in place f mod (r + 1).
            latest = variants[:step].count(FULL) - 1
            row = row[[(latest - position) % ages for position in range(ages)]]
        return np.asarray(row, self._buffers.dtype(buffer))
