"""The static program of a sampling run, played on buffers that only remember who wrote them last."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tc_deploy.manifest import (
    SOLVER,
    TABLE_ROLES,
    GraphRecord,
    Role,
    TensorName,
    TensorRecord,
    cache_tensor,
    model_inputs,
    names_of,
    only_tensor,
    solver_inputs,
    solver_outputs,
    variant_name,
)
from tc_deploy.runtime.buffers import BufferKey, Kind, condition_buffer, role_buffer, table_row
from tc_deploy.runtime.program import Call, ProgramStep, program_of
from tc_deploy.schedule import FULL, Schedule, full_schedule, tprr

READ_BY = {1: ("cache.0.mlp", "cache.1.key"), 2: ("cache.0.mlp", "cache.2.block")}
"""What the cached steps of each phase read; one tensor is shared."""
MODEL_INPUTS = model_inputs(("hidden_states", "timestep", "class_labels"))
WRITTEN_BY_A_REQUEST = (
    condition_buffer("class_labels"),
    role_buffer(Role.GUIDANCE_SCALE),
    role_buffer(Role.HIDDEN_STATES),
    role_buffer(Role.LATENTS, 0),
)


@dataclass(frozen=True)
class Content:
    """What lies in a buffer: which tensor, as of which step (-1: written with the request), of which request."""

    tensor: str
    step: int
    request: int


def record(inputs: tuple[TensorName, ...], outputs: tuple[TensorName, ...]) -> GraphRecord:
    def tensors(names: tuple[TensorName, ...]) -> tuple[TensorRecord, ...]:
        return tuple(TensorRecord(**dict(name), dtype="float32", shape=(1,)) for name in names)

    return GraphRecord(file="", inputs=tensors(inputs), outputs=tensors(outputs), max_abs_error=None)


def graphs_of(order: int, history: int) -> dict[str, GraphRecord]:
    """Graphs as export makes them, without the graphs."""
    sample, index = only_tensor(Role.SAMPLE), only_tensor(Role.TOKEN_INDEX)
    extra = (only_tensor(Role.FORECAST_WEIGHTS),) if order else ()
    cached = {
        variant_name(phase): record(
            (*MODEL_INPUTS, *extra, index, *(cache_tensor(name, age) for age in range(order + 1) for name in names)),
            (sample,),
        )
        for phase, names in READ_BY.items()
    }
    left = sorted({name for names in READ_BY.values() for name in names})
    full = record(MODEL_INPUTS, (sample, *map(cache_tensor, left)))
    return {"full": full, **cached, SOLVER: record(solver_inputs(history, guided=True), solver_outputs(history))}


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    steps = draw(st.integers(1, 24))
    phase_start = draw(st.integers(0, steps))
    return tprr(
        steps=steps,
        phase_start=phase_start,
        cache_interval_early=draw(st.integers(1, 7)),
        cache_interval_late=draw(st.integers(1, 7)),
    )


ORDERS = st.integers(0, 2)
HISTORIES = st.integers(0, 2)


class Machine:
    """Plays programs; whatever is read must have been written by the same request, and be what its record says."""

    def __init__(self, order: int, history: int) -> None:
        self.graphs, self.history = graphs_of(order, history), history
        self.buffers: dict[BufferKey, Content] = {}
        self.request = -1

    def play(self, program: tuple[ProgramStep, ...]) -> None:
        self.request += 1
        for key in WRITTEN_BY_A_REQUEST:
            self.buffers[key] = Content(key.tensor, -1, self.request)
        for number in range(self.history + 1):
            self.buffers[role_buffer(Role.GUIDED_OUTPUT, number)] = Content("zeros", -1, self.request)
        full_steps: list[int] = []
        for number, step in enumerate(program):
            self.play_model(number, step, full_steps)
            self.play_solver(number, step)

    def play_model(self, number: int, step: ProgramStep, full_steps: list[int]) -> None:
        caches = 0
        for tensor, content in self.read(step.model, number):
            match tensor.role:
                case Role.HIDDEN_STATES:
                    assert content == Content("hidden_states", number - 1, self.request)
                case Role.CONDITION:
                    assert content == Content("class_labels", -1, self.request)
                case _:
                    # Latest first; before that many full steps have run, the latest stands in.
                    expected = full_steps[-1 - tensor.age] if tensor.age < len(full_steps) else full_steps[-1]
                    assert content == Content(str(tensor.cache), expected, self.request)
                    caches += 1
        assert (caches > 0) == (step.variant != FULL)
        if step.variant == FULL:
            full_steps.append(number)
        self.write(step.model, number)

    def play_solver(self, number: int, step: ProgramStep) -> None:
        for tensor, content in self.read(step.solver, number):
            made = number - tensor.age
            match tensor.role:
                case Role.SAMPLE:
                    assert content == Content("sample", number, self.request)
                case Role.GUIDANCE_SCALE:
                    assert content == Content("guidance_scale", -1, self.request)
                case Role.LATENTS if made >= 0:
                    assert content == Content("latents", made - 1, self.request)
                case Role.GUIDED_OUTPUT if made >= 0:
                    assert content == Content("guided_output", made, self.request)
                case _:
                    # The coefficient is 0: anything finite will do.
                    assert content in (Content("latents", -1, self.request), Content("zeros", -1, self.request))
        self.write(step.solver, number)
        assert self.buffers[step.latents] == Content("latents", number, self.request)

    def read(self, call: Call, number: int) -> list[tuple[TensorRecord, Content]]:
        """What a call's inputs hold, but for the tables, whose rows are the step's own."""
        assert not set(call.inputs.values()) & set(call.outputs.values()), "a call reads what it writes"
        assert len(set(call.outputs.values())) == len(call.outputs), "a call writes a buffer twice"
        found = []
        for tensor in self.graphs[call.graph].inputs:
            if tensor.role in TABLE_ROLES:
                assert call.inputs[tensor.name] == table_row(tensor, number)
            else:
                found.append((tensor, self.buffers[call.inputs[tensor.name]]))
        return found

    def write(self, call: Call, number: int) -> None:
        for tensor in self.graphs[call.graph].outputs:
            self.buffers[call.outputs[tensor.name]] = Content(tensor.cache or tensor.role.value, number, self.request)


def bound(program: tuple[ProgramStep, ...]) -> list[tuple[str, Mapping[str, BufferKey], Mapping[str, BufferKey]]]:
    return [(call.graph, call.inputs, call.outputs) for step in program for call in (step.model, step.solver)]


@given(schedules(), ORDERS, HISTORIES)
def test_every_step_reads_what_it_should_and_nothing_of_an_earlier_request(
    schedule: Schedule, order: int, history: int
) -> None:
    program = program_of(graphs_of(order, history), schedule, order, history)
    machine = Machine(order, history)
    for _ in range(2):
        machine.play(program)


@given(schedules(), ORDERS, HISTORIES)
def test_full_runs_and_cached_runs_take_turns_on_the_same_buffers(schedule: Schedule, order: int, history: int) -> None:
    graphs = graphs_of(order, history)
    machine = Machine(order, history)
    for turn in (schedule, full_schedule(schedule.steps), schedule):
        machine.play(program_of(graphs, turn, order, history))


@given(schedules(), ORDERS, HISTORIES)
def test_a_program_is_data(schedule: Schedule, order: int, history: int) -> None:
    graphs = graphs_of(order, history)
    one, other = (program_of(graphs, schedule, order, history) for _ in range(2))
    assert one == other
    assert [step.variant for step in one] == list(schedule.variants)
    for graph, inputs, outputs in bound(one):
        assert tuple(inputs) == names_of(graphs[graph].inputs)
        assert tuple(outputs) == names_of(graphs[graph].outputs)


@given(st.integers(1, 24), ORDERS, HISTORIES)
def test_a_full_run_calls_the_full_graph_and_the_solver_in_turn(steps: int, order: int, history: int) -> None:
    program = program_of(graphs_of(order, history), full_schedule(steps), order, history)
    assert [graph for graph, _, _ in bound(program)] == ["full", SOLVER] * steps
    Machine(order, history).play(program)


@given(schedules(), ORDERS, HISTORIES)
def test_no_more_slots_than_the_history_needs(schedule: Schedule, order: int, history: int) -> None:
    program = program_of(graphs_of(order, history), schedule, order, history)
    buffers = {buffer for _, inputs, outputs in bound(program) for buffer in (*inputs.values(), *outputs.values())}
    slots = Counter(buffer.tensor for buffer in buffers if buffer.place is not None)
    assert slots.pop("latents") <= history + 2
    assert slots.pop("guided_output", 0) <= history + 1
    assert slots.keys() == {buffer.tensor for buffer in buffers if buffer.kind is Kind.CACHE}
    assert all(count <= order + 1 for count in slots.values())


def test_a_machine_notices_a_wrong_program() -> None:
    """The player above can fail: a cache that is one full step too old, and latents that are read and written."""
    schedule = tprr(steps=6, phase_start=6, cache_interval_early=2, cache_interval_late=1)
    graphs = graphs_of(1, 1)
    good = program_of(graphs, schedule, 1, 1)
    stale = program_of(graphs, schedule, 0, 1)
    with pytest.raises(AssertionError):
        Machine(1, 1).play(stale)
    with pytest.raises(AssertionError):
        Machine(1, 1).play(program_of(graphs, schedule, 1, 0))
    Machine(1, 1).play(good)
