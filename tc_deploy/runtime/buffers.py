"""Which buffer: the names that a program and a layout have for memory.

In: a tensor of a graph. Out: a key. Two calls that have the same key share the buffer. Never: makes a buffer.
"""

from __future__ import annotations

import enum
from collections.abc import Container
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tc_deploy.manifest import SCHEDULE, TABLE_ROLES, Role, TensorName

OWN = "own"
"""The place of a row of the scheduler's own solver, beside that of the plan's."""


class Kind(enum.StrEnum):
    """What a buffer is for."""

    CACHE = "caches"
    LATENTS = "latents"
    """And what is made of them: the model's input, the history of the solver."""
    PROLOGUE = "prologue"
    """What steps read of what is made before the first of them."""
    TABLE = "tables"
    """A step's row, written at load and never again."""
    CONDITION = "conditions"
    OUTPUT = "outputs"
    """The model's and the decoder's."""


_KINDS = {
    Role.CACHE: Kind.CACHE,
    Role.HIDDEN_STATES: Kind.LATENTS,
    Role.LATENTS: Kind.LATENTS,
    Role.GUIDED_OUTPUT: Kind.LATENTS,
    Role.SAMPLE: Kind.OUTPUT,
    Role.IMAGES: Kind.OUTPUT,
    Role.PROLOGUE: Kind.PROLOGUE,
    Role.SCHEDULED: Kind.PROLOGUE,
    **dict.fromkeys(TABLE_ROLES, Kind.TABLE),
}


_OF_SEVERAL = (Role.CONDITION, Role.PROLOGUE)
"""Roles of several tensors, whose buffers are called after them."""


@dataclass(frozen=True, kw_only=True)
class BufferKey:
    """One buffer."""

    role: Role
    tensor: str
    """What lies in it, by a name that does not say of which step."""
    place: int | str | None = None
    """Which of several that take turns; or for what alone, as for one graph."""
    step: int | None = None
    """Whose row of a table it is."""

    @property
    def whole(self) -> BufferKey | None:
        """The buffer whose rows it is, one step's after the other's; None where it is a buffer of its own."""
        if self.step is None or self.place != SCHEDULE:
            return None
        return BufferKey(role=self.role, tensor=self.tensor, place=SCHEDULE)

    @property
    def kind(self) -> Kind:
        """What it is for."""
        return _KINDS.get(self.role, Kind.CONDITION)

    def __str__(self) -> str:
        """For people: ``latents@1``, ``timestep#3``."""
        place = "" if self.place is None else f"@{self.place}"
        return f"{self.tensor}{place}" + ("" if self.step is None else f"#{self.step}")


def own_buffer(tensor: TensorName) -> BufferKey:
    """The one buffer of a tensor, the same at every step; where a role has one tensor, by the role's name."""
    if tensor.role in _OF_SEVERAL:
        return BufferKey(role=tensor.role, tensor=tensor.name)
    return role_buffer(tensor.role)


def role_buffer(role: Role, place: int | None = None) -> BufferKey:
    """The buffer of the only tensor of a role, or one of several that take turns."""
    return BufferKey(role=role, tensor=role.value, place=place)


def condition_buffer(name: str) -> BufferKey:
    """A condition's, by the name of the model's argument."""
    return BufferKey(role=Role.CONDITION, tensor=name)


def condition_arrays(
    buffers: Container[BufferKey], name: str, rows: NDArray[Any], steps: int
) -> dict[BufferKey, NDArray[Any]]:
    """What a condition (model batch, ...) writes: where a step or the prologue reads it, and where all steps do."""
    own, scheduled = condition_buffer(name), BufferKey(role=Role.CONDITION, tensor=name, place=SCHEDULE)
    arrays = {own: rows} if own in buffers else {}
    return arrays | ({scheduled: np.concatenate([rows] * steps)} if scheduled in buffers else {})


def scheduled_buffer(tensor: TensorName) -> BufferKey:
    """Of a tensor of the graph that is run for all steps at once: its rows for all of them."""
    return BufferKey(role=tensor.role, tensor=tensor.name, place=SCHEDULE)


def scheduled_row(tensor: TensorName, step: int) -> BufferKey:
    """A step's rows of such a buffer."""
    return BufferKey(role=tensor.role, tensor=tensor.name, place=SCHEDULE, step=step)


def table_row(tensor: TensorName, step: int, place: str | None = None) -> BufferKey:
    """The constant buffer with a table's row for a step."""
    return BufferKey(role=tensor.role, tensor=tensor.name, place=place, step=step)
