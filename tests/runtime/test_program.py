"""The static program of a sampling run, played on buffers that only remember who wrote them last."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tc_deploy.manifest import (
    FORECAST_WEIGHTS,
    SAMPLE,
    SOLVER,
    TOKEN_INDEX,
    GraphRecord,
    TensorRecord,
    history_name,
    history_of,
)
from tc_deploy.runtime.program import Call, ProgramStep, program_of, slot, table_row
from tc_deploy.schedule import FULL, Schedule, full_schedule, tprr

READ_BY = {1: ("cache.0.mlp", "cache.1.key"), 2: ("cache.0.mlp", "cache.2.block")}
"""What the cached steps of each phase read; one tensor is shared."""
MODEL_INPUTS = ("hidden_states", "timestep", "class_labels")
STEP_TABLES = ("timestep", TOKEN_INDEX, FORECAST_WEIGHTS, "coefficients", "input_scale")
WRITTEN_BY_A_REQUEST = ("class_labels", "guidance_scale", "hidden_states", slot("latents", 0))


@dataclass(frozen=True)
class Content:
    """What lies in a buffer: which tensor, as of which step (-1: written with the request), of which request."""

    tensor: str
    step: int
    request: int


def record(inputs: tuple[str, ...], outputs: tuple[str, ...]) -> GraphRecord:
    def tensors(names: tuple[str, ...]) -> tuple[TensorRecord, ...]:
        return tuple(TensorRecord(name=name, dtype="float32", shape=(1,)) for name in names)

    return GraphRecord(file="", inputs=tensors(inputs), outputs=tensors(outputs), max_abs_error=None)


def graphs_of(order: int, history: int) -> dict[str, GraphRecord]:
    """Graphs as export makes them, without the graphs."""
    ages = range(order + 1)
    extra = (FORECAST_WEIGHTS,) if order else ()
    cached = {
        f"cached-{phase}": record(
            (*MODEL_INPUTS, *extra, TOKEN_INDEX, *(history_name(name, age) for age in ages for name in names)),
            (SAMPLE,),
        )
        for phase, names in READ_BY.items()
    }
    latents = tuple(history_name("latents", age) for age in range(history + 1))
    earlier = tuple(history_name("guided_output", age) for age in range(1, history + 1))
    solver = record(
        ("model_output", *latents, *earlier, "coefficients", "input_scale", "guidance_scale"),
        ("next_latents", "hidden_states", *(("guided_output",) if history else ())),
    )
    full = record(MODEL_INPUTS, (SAMPLE, *sorted({name for names in READ_BY.values() for name in names})))
    return {"full": full, **cached, SOLVER: solver}


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
    """Plays programs; whatever is read must have been written by the same request, and be what the name says."""

    def __init__(self, order: int, history: int) -> None:
        self.order, self.history = order, history
        self.buffers: dict[str, Content] = {}
        self.request = -1

    def play(self, program: tuple[ProgramStep, ...]) -> None:
        self.request += 1
        for name in WRITTEN_BY_A_REQUEST:
            self.buffers[name] = Content(history_of(name.partition("@")[0])[0], -1, self.request)
        for number in range(self.history + 1):
            self.buffers[slot("guided_output", number)] = Content("zeros", -1, self.request)
        full_steps: list[int] = []
        for number, step in enumerate(program):
            self.play_model(number, step, full_steps)
            self.play_solver(number, step)

    def play_model(self, number: int, step: ProgramStep, full_steps: list[int]) -> None:
        seen = self.read(step.model, number)
        assert seen.pop("hidden_states") == Content("hidden_states", number - 1, self.request)
        assert seen.pop("class_labels") == Content("class_labels", -1, self.request)
        for name, content in seen.items():
            tensor, age = history_of(name)
            # Latest first; before that many full steps have run, the latest stands in.
            expected = full_steps[-1 - age] if age < len(full_steps) else full_steps[-1]
            assert content == Content(tensor, expected, self.request)
        assert (len(seen) > 0) == (step.variant != FULL)
        if step.variant == FULL:
            full_steps.append(number)
        self.write(step.model, number)

    def play_solver(self, number: int, step: ProgramStep) -> None:
        seen = self.read(step.solver, number)
        assert seen.pop("model_output") == Content(SAMPLE, number, self.request)
        assert seen.pop("guidance_scale") == Content("guidance_scale", -1, self.request)
        for name, content in seen.items():
            tensor, age = history_of(name)
            if number - age >= 0:
                assert content == Content(tensor, number - age - (tensor == "latents"), self.request)
            else:
                # The coefficient is 0: anything finite will do.
                assert content in (Content("latents", -1, self.request), Content("zeros", -1, self.request))
        self.write(step.solver, number)
        assert self.buffers[step.latents] == Content("latents", number, self.request)

    def read(self, call: Call, number: int) -> dict[str, Content]:
        """What a call's inputs hold, but for the tables, whose rows are the step's own."""
        assert not set(call.inputs.values()) & set(call.outputs.values()), "a call reads what it writes"
        assert len(set(call.outputs.values())) == len(call.outputs), "a call writes a buffer twice"
        tables = {name: table_row(name, number) for name in call.inputs if name in STEP_TABLES}
        assert tables.items() <= call.inputs.items()
        return {name: self.buffers[buffer] for name, buffer in call.inputs.items() if name not in tables}

    def write(self, call: Call, number: int) -> None:
        for name, buffer in call.outputs.items():
            tensor = "latents" if name == "next_latents" else name
            self.buffers[buffer] = Content(tensor, number, self.request)


def bound(program: tuple[ProgramStep, ...]) -> list[tuple[str, Mapping[str, str], Mapping[str, str]]]:
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
        assert list(inputs) == [tensor.name for tensor in graphs[graph].inputs]
        assert list(outputs) == [tensor.name for tensor in graphs[graph].outputs]


@given(st.integers(1, 24), ORDERS, HISTORIES)
def test_a_full_run_calls_the_full_graph_and_the_solver_in_turn(steps: int, order: int, history: int) -> None:
    program = program_of(graphs_of(order, history), full_schedule(steps), order, history)
    assert [graph for graph, _, _ in bound(program)] == ["full", SOLVER] * steps
    Machine(order, history).play(program)


@given(schedules(), ORDERS, HISTORIES)
def test_no_more_slots_than_the_history_needs(schedule: Schedule, order: int, history: int) -> None:
    program = program_of(graphs_of(order, history), schedule, order, history)
    buffers = {buffer for _, inputs, outputs in bound(program) for buffer in (*inputs.values(), *outputs.values())}
    slots: dict[str, int] = {}
    for buffer in buffers:
        if "@" in buffer:
            tensor = buffer.partition("@")[0]
            slots[tensor] = slots.get(tensor, 0) + 1
    assert slots.pop("latents") <= history + 2
    assert slots.pop("guided_output", 0) <= history + 1
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
