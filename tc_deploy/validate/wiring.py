"""Whether every step read what its schedule says: the right rows of the tables, the caches of the right full steps.

A graph that is right computes nonsense from the wrong inputs, and an engine's tests of single graphs cannot see it. In:
the calls of a sampling run as they happened, and the tables and the schedule of the run that export made in PyTorch.
Out: in words, what was read in the wrong place. Compared bit for bit. Never: runs anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tc_deploy.golden import Trajectory
from tc_deploy.groups import planned_group_inputs
from tc_deploy.manifest import INDEX_ROLES, PROLOGUE_ROLES, TABLE_ROLES, GraphRecord, Role, TensorName, variant_name
from tc_deploy.plan import Plan
from tc_deploy.schedule import FULL
from tc_deploy.tables import token_index_name
from tc_deploy.validate.record import WiringFault
from tc_deploy.validate.trajectory import CallNote

SCHEDULE = "schedule"
"""Stands for a tensor's name where a step ran another graph than it should."""


def wiring_faults(
    calls: Sequence[CallNote],
    made_before: Mapping[str, Sequence[NDArray[Any]]],
    graphs: Mapping[str, GraphRecord],
    trajectory: Trajectory,
    plan: Plan,
) -> tuple[WiringFault, ...]:
    """Compare a run with the saved one's schedule and tables.

    Args:
        calls: the model's and the solver's of every step, in turn.
        made_before: what the calls before these have made, by tensor name.
        graphs: the bundle's, by name.
        trajectory: the saved run.
        plan: says which blocks' tokens stand together, where one graph holds all variants.

    Returns:
        The first fault of every tensor, in the order of the steps.
    """
    found: dict[_What, WiringFault] = {}
    rows = {name: np.concatenate(made) for name, made in made_before.items()}
    for what, fault in _all_faults(calls, rows, graphs, trajectory, plan):
        found.setdefault(what, fault)
    return tuple(found.values())


_What: TypeAlias = tuple[Role | str, str | None]
"""A tensor's role and, of caches and conditions, which one it is; whatever its age."""


def _what(tensor: TensorName) -> _What:
    return tensor.role, tensor.name if tensor.role in (Role.CONDITION, *PROLOGUE_ROLES) else tensor.cache


def _all_faults(
    calls: Sequence[CallNote],
    rows: Mapping[str, NDArray[Any]],
    graphs: Mapping[str, GraphRecord],
    trajectory: Trajectory,
    plan: Plan,
) -> Iterator[tuple[_What, WiringFault]]:
    steps = list(zip(calls[0::2], calls[1::2], strict=True))
    made = _Made(steps, graphs)
    for step, (model, solver) in enumerate(steps):
        expected = variant_name(trajectory.variants[step])
        if model.graph != expected:
            text = f"ran {model.graph}, but the plan that was exported runs {expected}"
            yield (SCHEDULE, None), WiringFault(step=step, graph=model.graph, tensor=SCHEDULE, text=text)
        for call in (model, solver):
            for tensor in graphs[call.graph].inputs:
                if tensor.role in PROLOGUE_ROLES:
                    fault = _prologue_fault(call, tensor, step, rows, len(steps))
                else:
                    fault = _fault(call, tensor, step, made, trajectory, plan)
                if fault is not None:
                    yield _what(tensor), fault


def _fault(
    call: CallNote, tensor: TensorName, step: int, made: _Made, trajectory: Trajectory, plan: Plan
) -> WiringFault | None:
    """What a call read in the wrong place for one of its inputs; None where it is right."""
    match tensor.role:
        case role if role in TABLE_ROLES:
            return _table_fault(call, tensor, step, trajectory, plan)
        case Role.CACHE:
            # What a full step reads of caches, where one graph holds all variants, is nothing.
            source = None if call.graph == variant_name(FULL) else _latest(made.full_steps, step, tensor.age)
        case Role.LATENTS:
            # The latents before step 0 are the noise, and nothing is before that.
            source = step - tensor.age - 1
        case Role.GUIDED_OUTPUT:
            source = step - tensor.age
        case Role.SAMPLE:
            source = step
        case Role.HIDDEN_STATES:
            source = step - 1
        case Role.CONDITION:
            return _condition_fault(call, tensor.name, step, trajectory.conditions.get(tensor.name))
        case _:
            return None
    return made.fault(call, tensor, step, source)


class _Made:
    """What each step made, by what it is."""

    def __init__(self, steps: Sequence[tuple[CallNote, CallNote]], graphs: Mapping[str, GraphRecord]) -> None:
        self.full_steps = [step for step, (model, _) in enumerate(steps) if model.graph == variant_name(FULL)]
        self._prints: dict[_What, dict[int, str]] = {}
        for step, calls in enumerate(steps):
            for call in calls:
                for tensor in graphs[call.graph].outputs:
                    if step in self.full_steps or tensor.role is not Role.CACHE:
                        self._prints.setdefault(_what(tensor), {})[step] = call.outputs[tensor.name]

    def fault(self, call: CallNote, tensor: TensorName, step: int, source: int | None) -> WiringFault | None:
        """A fault if what was read is not what step ``source`` made; nothing is known of what was before step 0."""
        read, by_step = call.inputs[tensor.name], self._prints.get(_what(tensor), {})
        if source is None or source < 0 or by_step.get(source) == read:
            return None
        others = [other for other, made in by_step.items() if made == read and other <= step]
        found = f"that of step {others[-1]}" if others else "of no step"
        text = f"read {tensor.name} {found}, expected that of step {source}"
        return WiringFault(step=step, graph=call.graph, tensor=tensor.name, text=text)


def _latest(full_steps: Sequence[int], step: int, age: int) -> int | None:
    """The full step that is ``age`` before the latest at ``step``; None where there is none yet."""
    before = [full for full in full_steps if full < step]
    return before[-1 - age] if age < len(before) else None


def _table_fault(
    call: CallNote, tensor: TensorName, step: int, trajectory: Trajectory, plan: Plan
) -> WiringFault | None:
    name, expected = _expected_row(tensor, step, call.graph, trajectory, plan)
    found = call.arrays[tensor.name]
    if expected is None:
        text = f"reads a row of {name}, but the plan that was exported has none for this step"
    else:
        differs = found != np.broadcast_to(expected, found.shape)
        if not differs.any():
            return None
        text = f"{int(differs.any(axis=0).sum())} of {expected.size} numbers in its row of {name} are not the plan's"
    return WiringFault(step=step, graph=call.graph, tensor=name, text=text)


def _expected_row(
    tensor: TensorName, step: int, graph: str, trajectory: Trajectory, plan: Plan
) -> tuple[str, NDArray[Any] | None]:
    """A table's name, and the row that a step reads."""
    tables: Mapping[str, NDArray[Any]] = trajectory.tables
    if tensor.role is Role.INPUT_SCALE:
        # The solver prepares the next step's input; after the last step nobody reads it.
        return tensor.name, np.append(tables[tensor.name], np.float32(1))[step + 1]
    if tensor.role not in INDEX_ROLES:
        return tensor.name, tables[tensor.name][step]
    variant = trajectory.variants[step]
    name = token_index_name(variant)
    table = tables.get(name)
    row = None if table is None else table[trajectory.variants[:step].count(variant)]
    if graph != variant_name(variant):
        return name, None
    if tensor.group is None:
        return name, row
    return tensor.name, planned_group_inputs(plan, variant, row)[tensor.name]


def _prologue_fault(
    call: CallNote, tensor: TensorName, step: int, rows: Mapping[str, NDArray[Any]], steps: int
) -> WiringFault | None:
    """Compare what a step read of what was made before the first one: the same at each, or its own rows of all."""
    made = rows.get(tensor.name)
    if made is not None and tensor.role is Role.SCHEDULED:
        made = np.split(made, steps)[step]
    if made is not None and np.array_equal(call.arrays[tensor.name], made):
        return None
    text = f"{tensor.name} is not what was made for this step before the first"
    return WiringFault(step=step, graph=call.graph, tensor=tensor.name, text=text)


def _condition_fault(call: CallNote, name: str, step: int, expected: NDArray[Any] | None) -> WiringFault | None:
    if expected is None or np.array_equal(call.arrays[name][: len(expected)], expected):
        return None
    return WiringFault(step=step, graph=call.graph, tensor=name, text=f"{name} is not what the request gave")
