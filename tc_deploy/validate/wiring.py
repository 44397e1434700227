"""Whether every step read what its schedule says: the right rows of the tables, the caches of the right full steps.

A graph that is right computes nonsense from the wrong inputs, and an engine's tests of single graphs cannot see it. In:
the calls of a sampling run as they happened, and the tables and the schedule of the run that export made in PyTorch.
Out: in words, what was read in the wrong place. Compared bit for bit. Never: runs anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tc_deploy.golden import Trajectory
from tc_deploy.groups import planned_group_inputs
from tc_deploy.manifest import CACHE_PREFIX, COMPUTED, SAMPLE, TOKEN_INDEX, cached_name, history_of, variant_name
from tc_deploy.plan import Plan
from tc_deploy.runtime.program import STEP_TABLES
from tc_deploy.schedule import FULL
from tc_deploy.tables import token_index_name
from tc_deploy.validate.record import WiringFault
from tc_deploy.validate.trajectory import CallNote

SCHEDULE = "schedule"
"""Stands for a tensor's name where a step ran another graph than it should."""


def wiring_faults(calls: Sequence[CallNote], trajectory: Trajectory, plan: Plan) -> tuple[WiringFault, ...]:
    """Compare a run with the saved one's schedule and tables.

    Args:
        calls: the model's and the solver's of every step, in turn.
        trajectory: the saved run.
        plan: says which blocks' tokens stand together, where one graph holds all variants.

    Returns:
        The first fault of every tensor, in the order of the steps.
    """
    found: dict[str, WiringFault] = {}
    for fault in _all_faults(calls, trajectory, plan):
        found.setdefault(history_of(fault.tensor)[0], fault)
    return tuple(found.values())


def _all_faults(calls: Sequence[CallNote], trajectory: Trajectory, plan: Plan) -> Iterator[WiringFault]:
    steps = list(zip(calls[0::2], calls[1::2], strict=True))
    made = _Made(steps)
    for step, (model, solver) in enumerate(steps):
        expected = variant_name(trajectory.variants[step])
        if model.graph != expected:
            text = f"ran {model.graph}, but the plan that was exported runs {expected}"
            yield WiringFault(step=step, graph=model.graph, tensor=SCHEDULE, text=text)
        for call in (model, solver):
            for tensor, read in call.inputs.items():
                name, age = history_of(tensor)
                if name in STEP_TABLES:
                    yield from _table_faults(call, tensor, step, trajectory, plan)
                elif name.startswith(CACHE_PREFIX) and call.graph != variant_name(FULL):
                    yield from made.faults(call, tensor, read, step, _latest(made.full_steps, step, age))
                elif name in ("latents", "guided_output"):
                    # The latents before step 0 are the noise, and nothing is before that.
                    yield from made.faults(call, tensor, read, step, step - age - (name == "latents"))
                elif name == "model_output":
                    yield from made.faults(call, tensor, read, step, step)
                elif name == "hidden_states":
                    yield from made.faults(call, tensor, read, step, step - 1)
                elif name in trajectory.conditions:
                    yield from _condition_faults(call, tensor, step, trajectory.conditions[name])


class _Made:
    """What each step made, by the name under which it is read."""

    def __init__(self, steps: Sequence[tuple[CallNote, CallNote]]) -> None:
        self.full_steps = [step for step, (model, _) in enumerate(steps) if model.graph == variant_name(FULL)]
        self._by_name: dict[str, dict[int, str]] = {}
        for step, (model, solver) in enumerate(steps):
            names = {SAMPLE: "model_output", "next_latents": "latents"}
            for output, print_of in {**model.outputs, **solver.outputs}.items():
                if step in self.full_steps or not output.startswith(CACHE_PREFIX):
                    self._by_name.setdefault(names.get(output, cached_name(output)), {})[step] = print_of

    def faults(self, call: CallNote, tensor: str, read: str, step: int, source: int | None) -> Iterator[WiringFault]:
        """A fault if ``read`` is not what step ``source`` made; nothing is known of what was before step 0."""
        by_step = self._by_name.get(history_of(tensor)[0], {})
        if source is None or source < 0 or by_step.get(source) == read:
            return
        others = [other for other, made in by_step.items() if made == read and other <= step]
        found = f"that of step {others[-1]}" if others else "of no step"
        text = f"read {tensor} {found}, expected that of step {source}"
        yield WiringFault(step=step, graph=call.graph, tensor=tensor, text=text)


def _latest(full_steps: Sequence[int], step: int, age: int) -> int | None:
    """The full step that is ``age`` before the latest at ``step``; None where there is none yet."""
    before = [full for full in full_steps if full < step]
    return before[-1 - age] if age < len(before) else None


def _table_faults(call: CallNote, tensor: str, step: int, trajectory: Trajectory, plan: Plan) -> Iterator[WiringFault]:
    name, expected = _expected_row(tensor, step, call.graph, trajectory, plan)
    found = call.arrays[tensor]
    if expected is None:
        text = f"reads a row of {name}, but the plan that was exported has none for this step"
    else:
        differs = found != np.broadcast_to(expected, found.shape)
        if not differs.any():
            return
        text = f"{int(differs.any(axis=0).sum())} of {expected.size} numbers in its row of {name} are not the plan's"
    yield WiringFault(step=step, graph=call.graph, tensor=name, text=text)


def _expected_row(
    tensor: str, step: int, graph: str, trajectory: Trajectory, plan: Plan
) -> tuple[str, NDArray[Any] | None]:
    """A table's name, and the row that a step reads."""
    tables: Mapping[str, NDArray[Any]] = trajectory.tables
    if tensor == "input_scale":
        # The solver prepares the next step's input; after the last step nobody reads it.
        return tensor, np.append(tables[tensor], np.float32(1))[step + 1]
    if history_of(tensor)[0] not in (TOKEN_INDEX, COMPUTED):
        return tensor, tables[tensor][step]
    variant = trajectory.variants[step]
    name = token_index_name(variant)
    table = tables.get(name)
    row = None if table is None else table[trajectory.variants[:step].count(variant)]
    if graph != variant_name(variant):
        return name, None
    if tensor == TOKEN_INDEX:
        return name, row
    return tensor, planned_group_inputs(plan, variant, row)[tensor]


def _condition_faults(call: CallNote, tensor: str, step: int, expected: NDArray[Any]) -> Iterator[WiringFault]:
    if not np.array_equal(call.arrays[tensor][: len(expected)], expected):
        text = f"{tensor} is not what the request gave"
        yield WiringFault(step=step, graph=call.graph, tensor=tensor, text=text)
