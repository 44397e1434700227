"""A sampling run as data: which graph runs at each step, on which buffers.

The schedule is known before a run, and so is every buffer that a step reads and writes: caches and latents rotate
through slots by binding, never by copy. In: a manifest and a schedule. Out: a list of calls, the same for every
request. Never: touches a buffer or an engine.

Buffers are named ``<tensor>@<slot>`` where slots rotate, ``<table>#<step>`` for a row of a table, and by the
tensor's name otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tc_deploy.manifest import (
    CACHE_PREFIX,
    COMPUTED,
    DECODER,
    FORECAST_WEIGHTS,
    IMAGES,
    LATENTS,
    SAMPLE,
    SOLVER,
    TEXT_ENCODER,
    TOKEN_INDEX,
    GraphRecord,
    TensorRecord,
    cached_name,
    history_of,
    variant_name,
)
from tc_deploy.schedule import FULL, Schedule

STEP_TABLES = ("timestep", TOKEN_INDEX, COMPUTED, FORECAST_WEIGHTS, "coefficients", "input_scale")
"""Inputs that a step takes from a table: one constant buffer per step."""
EVERY_FULL_STEP = -1
"""In the place of a step: what every full step takes."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """One graph on its buffers: tensor name to buffer name."""

    graph: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class ProgramStep:
    """One denoising step: the model's variant, then the solver."""

    variant: int
    model: Call
    solver: Call
    latents: str
    """Buffer that holds the latents after the step."""


def slot(name: str, number: int | str) -> str:
    """Name of one slot of a rotating buffer, or of the buffer that one variant has of a tensor."""
    return f"{name}@{number}"


def table_row(table: str, step: int) -> str:
    """Name of the constant buffer with a table's row for a step."""
    return f"{table}#{step}"


def row_of(buffer: str) -> tuple[str, int] | None:
    """The table and the step that :func:`table_row` made a buffer's name of; None for any other buffer."""
    table, mark, step = buffer.partition("#")
    return (table, int(step)) if mark else None


def tensor_of(buffer: str) -> str:
    """The tensor that :func:`slot` made a buffer's name of; where slots do not rotate, the name itself."""
    return buffer.partition("@")[0]


def is_given(tensor: str) -> bool:
    """Whether an input of the model's graph comes from the request: no table has it, and no earlier step made it."""
    return history_of(tensor)[0] not in STEP_TABLES and not tensor.startswith(CACHE_PREFIX)


def program_of(
    graphs: Mapping[str, GraphRecord], schedule: Schedule, forecast_order: int, solver_history: int
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

    Returns:
        One entry per step.
    """
    steps = []
    full_steps = 0
    for step, variant in enumerate(schedule.variants):
        graph = graphs[variant_name(variant)]
        full_steps += variant == FULL
        inputs = {}
        for tensor in graph.inputs:
            if is_given(tensor.name):
                inputs[tensor.name] = tensor.name
            elif not tensor.name.startswith(CACHE_PREFIX):
                # What tokens a full step computes is the same at each of them, and in the run in which all are full.
                grouped = variant == FULL and history_of(tensor.name)[0] in (TOKEN_INDEX, COMPUTED)
                inputs[tensor.name] = table_row(tensor.name, EVERY_FULL_STEP if grouped else step)
            elif variant == FULL:
                inputs[tensor.name] = _zeros(tensor)
            else:
                inputs[tensor.name] = _cache_slot(tensor.name, full_steps, forecast_order)
        outputs = {}
        for tensor in graph.outputs:
            if tensor.name == SAMPLE:
                outputs[tensor.name] = SAMPLE
            elif variant == FULL:
                outputs[tensor.name] = _cache_slot(cached_name(tensor.name), full_steps, forecast_order)
            else:
                outputs[tensor.name] = slot(tensor.name, variant_name(variant))
        model = Call(graph=variant_name(variant), inputs=inputs, outputs=outputs)
        latents = _rotating("latents", step + 1, solver_history + 2)
        steps.append(
            ProgramStep(
                variant=variant, model=model, solver=_solver_call(graphs[SOLVER], step, solver_history), latents=latents
            )
        )
    return tuple(steps)


def decoder_call(steps: Sequence[ProgramStep]) -> Call:
    """The decoder's call after the last step, on the latents where that left them."""
    return Call(graph=DECODER, inputs={LATENTS: steps[-1].latents}, outputs={IMAGES: IMAGES})


def text_call(graph: GraphRecord) -> Call:
    """The text encoder's call, on buffers of its own: a request's prompts are not one to a row of the model's batch."""

    def names(tensors: Iterable[TensorRecord]) -> dict[str, str]:
        return {tensor.name: f"{TEXT_ENCODER}.{tensor.name}" for tensor in tensors}

    return Call(graph=TEXT_ENCODER, inputs=names(graph.inputs), outputs=names(graph.outputs))


def _solver_call(graph: GraphRecord, step: int, history: int) -> Call:
    inputs = {}
    for tensor in graph.inputs:
        name, age = history_of(tensor.name)
        if name in STEP_TABLES:
            inputs[tensor.name] = table_row(name, step)
        elif name == "latents":
            # Before step 0 there is nothing; the coefficient is 0 and any finite buffer will do.
            inputs[tensor.name] = _rotating(name, max(step - age, 0), history + 2)
        elif name == "guided_output":
            inputs[tensor.name] = _rotating(name, step - age, history + 1)
        else:
            inputs[tensor.name] = SAMPLE if name == "model_output" else name
    outputs = {
        "next_latents": _rotating("latents", step + 1, history + 2),
        "hidden_states": "hidden_states",
        "guided_output": _rotating("guided_output", step, history + 1),
    }
    return Call(graph=SOLVER, inputs=inputs, outputs={tensor.name: outputs[tensor.name] for tensor in graph.outputs})


def _cache_slot(tensor: str, full_steps: int, forecast_order: int) -> str:
    """Slot of a cached tensor, given how many full steps have begun.

    Where fewer full steps have run than the age asks for, the forecast's weight is 0, and the latest is bound: it is
    finite and of this request, whatever an earlier request left behind.
    """
    name, age = history_of(tensor)
    age = age if age < full_steps else 0
    return _rotating(name, full_steps - 1 - age, forecast_order + 1)


def _zeros(tensor: TensorRecord) -> str:
    """The buffer that nobody writes, for all cached tensors of a kind."""
    return slot(f"{CACHE_PREFIX}zeros", "x".join((tensor.dtype, *map(str, tensor.shape))))


def _rotating(name: str, position: int, slots: int) -> str:
    return slot(name, position % slots)
