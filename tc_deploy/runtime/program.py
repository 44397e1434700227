"""A sampling run as data: which graph runs at each step, on which buffers.

The schedule is known before a run, and so is every buffer that a step reads and writes: caches and latents rotate
through slots by binding, never by copy. In: a manifest and a schedule. Out: a list of calls, the same for every
request. Never: touches a buffer or an engine.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tc_deploy.manifest import (
    DECODER,
    INDEX_ROLES,
    PROLOGUE,
    RUN_BATCH,
    SCHEDULE,
    SOLVER,
    TABLE_ROLES,
    TEXT_ENCODER,
    GraphRecord,
    Role,
    TensorRecord,
    variant_name,
)
from tc_deploy.runtime.buffers import (
    OWN,
    BufferKey,
    own_buffer,
    role_buffer,
    scheduled_buffer,
    scheduled_row,
    table_row,
)
from tc_deploy.schedule import FULL, Schedule

EVERY_FULL_STEP = -1
"""In the place of a step: what every full step takes."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """One graph on its buffers, by tensor name."""

    graph: str
    inputs: Mapping[str, BufferKey]
    outputs: Mapping[str, BufferKey]


@dataclass(frozen=True, kw_only=True)
class ProgramStep:
    """One denoising step: the model's variant, then the solver."""

    variant: int
    model: Call
    solver: Call
    latents: BufferKey
    """The buffer that holds the latents after the step."""


def program_of(
    graphs: Mapping[str, GraphRecord],
    schedule: Schedule,
    forecast_order: int,
    solver_history: int,
    *,
    own_solver: bool = False,
) -> tuple[ProgramStep, ...]:
    """Lay out a sampling run.

    The latents of step s lie in slot ``s mod (solver_history + 2)``, so an update never writes what it reads; a cache
    of the f-th full step lies in slot ``f mod (forecast_order + 1)``, so a full step, which has no use for
    a cache, overwrites the oldest. Where one graph holds all variants, a full step is given zeros to read, and what a
    cached step's blocks have computed goes where nobody reads it.

    Args:
        graphs: the bundle's graphs.
        schedule: which variant each step runs.
        forecast_order: r; a cached step reads the caches of the last r + 1 full steps.
        solver_history: h; the solver reads h earlier latents and guided outputs.
        own_solver: solve as the scheduler does, where the plan's solver is another.

    Returns:
        One entry per step.
    """
    steps = []
    full_steps = 0
    for step, variant in enumerate(schedule.variants):
        graph = graphs[variant_name(variant)]
        full_steps += variant == FULL
        inputs = {
            tensor.name: _model_input(tensor, step, variant, full_steps, forecast_order) for tensor in graph.inputs
        }
        outputs = {tensor.name: _model_output(tensor, variant, full_steps, forecast_order) for tensor in graph.outputs}
        model = Call(graph=variant_name(variant), inputs=inputs, outputs=outputs)
        latents = role_buffer(Role.LATENTS, (step + 1) % (solver_history + 2))
        steps.append(
            ProgramStep(
                variant=variant,
                model=model,
                solver=_solver_call(graphs[SOLVER], step, solver_history, OWN if own_solver else None),
                latents=latents,
            )
        )
    return tuple(steps)


def prologue_calls(graphs: Mapping[str, GraphRecord], steps: int) -> tuple[Call, ...]:
    """What runs before a request's first step: nothing where the steps' graphs compute everything themselves.

    What follows from the timestep is made for all steps at once, in one call where the graph's batch is open. Where it
    is fixed, it is that of a step, and there is a call for each.
    """
    calls = []
    if PROLOGUE in graphs:
        record = graphs[PROLOGUE]
        inputs, outputs = ({one.name: own_buffer(one) for one in each} for each in (record.inputs, record.outputs))
        calls.append(Call(graph=PROLOGUE, inputs=inputs, outputs=outputs))
    if SCHEDULE in graphs:
        record = graphs[SCHEDULE]
        if any(RUN_BATCH in tensor.shape for tensor in record.outputs):
            inputs, outputs = (
                {one.name: scheduled_buffer(one) for one in each} for each in (record.inputs, record.outputs)
            )
            calls.append(Call(graph=SCHEDULE, inputs=inputs, outputs=outputs))
            return tuple(calls)
        for step in range(steps):
            inputs = {
                one.name: table_row(one, step) if one.role in TABLE_ROLES else own_buffer(one) for one in record.inputs
            }
            outputs = {one.name: scheduled_row(one, step) for one in record.outputs}
            calls.append(Call(graph=SCHEDULE, inputs=inputs, outputs=outputs))
    return tuple(calls)


def decoder_call(graph: GraphRecord, steps: Sequence[ProgramStep]) -> Call:
    """The decoder's call after the last step, on the latents where that left them."""
    inputs = {tensor.name: steps[-1].latents for tensor in graph.inputs}
    return Call(graph=DECODER, inputs=inputs, outputs={tensor.name: own_buffer(tensor) for tensor in graph.outputs})


def text_call(graph: GraphRecord) -> Call:
    """The text encoder's call, on buffers of its own: a request's prompts are not one to a row of the model's batch."""

    def keys(tensors: Iterable[TensorRecord]) -> dict[str, BufferKey]:
        return {tensor.name: BufferKey(role=tensor.role, tensor=tensor.name, place=TEXT_ENCODER) for tensor in tensors}

    return Call(graph=TEXT_ENCODER, inputs=keys(graph.inputs), outputs=keys(graph.outputs))


def _model_input(tensor: TensorRecord, step: int, variant: int, full_steps: int, forecast_order: int) -> BufferKey:
    if tensor.role in TABLE_ROLES:
        # What tokens a full step computes is the same at each of them, and in the run in which all are full.
        grouped = variant == FULL and tensor.role in INDEX_ROLES
        return table_row(tensor, EVERY_FULL_STEP if grouped else step)
    if tensor.role is Role.SCHEDULED:
        return scheduled_row(tensor, step)
    if tensor.role is not Role.CACHE:
        return own_buffer(tensor)
    return _zeros(tensor) if variant == FULL else _cache_slot(tensor, full_steps, forecast_order)


def _model_output(tensor: TensorRecord, variant: int, full_steps: int, forecast_order: int) -> BufferKey:
    if tensor.role is Role.SAMPLE:
        return own_buffer(tensor)
    if variant == FULL:
        return _cache_slot(tensor, full_steps, forecast_order)
    return BufferKey(role=tensor.role, tensor=tensor.name, place=variant_name(variant))


def _solver_call(graph: GraphRecord, step: int, history: int, whose: str | None) -> Call:
    def read(tensor: TensorRecord) -> BufferKey:
        match tensor.role:
            case Role.COEFFICIENTS:
                return table_row(tensor, step, whose)
            case role if role in TABLE_ROLES:
                return table_row(tensor, step)
            case Role.LATENTS:
                # Before step 0 there is nothing; the coefficient is 0 and any finite buffer will do.
                return role_buffer(Role.LATENTS, max(step - tensor.age, 0) % (history + 2))
            case Role.GUIDED_OUTPUT:
                return role_buffer(Role.GUIDED_OUTPUT, (step - tensor.age) % (history + 1))
            case _:
                return own_buffer(tensor)

    def written(tensor: TensorRecord) -> BufferKey:
        match tensor.role:
            case Role.LATENTS:
                return role_buffer(Role.LATENTS, (step + 1) % (history + 2))
            case Role.GUIDED_OUTPUT:
                return role_buffer(Role.GUIDED_OUTPUT, step % (history + 1))
            case _:
                return own_buffer(tensor)

    return Call(
        graph=SOLVER,
        inputs={tensor.name: read(tensor) for tensor in graph.inputs},
        outputs={tensor.name: written(tensor) for tensor in graph.outputs},
    )


def _cache_slot(tensor: TensorRecord, full_steps: int, forecast_order: int) -> BufferKey:
    """Slot of a cached tensor, given how many full steps have begun.

    Where fewer full steps have run than the age asks for, the forecast's weight is 0, and the latest is bound: it is
    finite and of this request, whatever an earlier request left behind.
    """
    assert tensor.cache is not None, "a cached tensor says of what"
    age = tensor.age if tensor.age < full_steps else 0
    place = (full_steps - 1 - age) % (forecast_order + 1)
    return BufferKey(role=Role.CACHE, tensor=tensor.cache, place=place)


def _zeros(tensor: TensorRecord) -> BufferKey:
    """The buffer that nobody writes, for all cached tensors of a kind."""
    place = "x".join((tensor.dtype, *map(str, tensor.shape)))
    return BufferKey(role=Role.CACHE, tensor="cache.zeros", place=place)
