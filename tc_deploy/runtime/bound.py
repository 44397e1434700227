"""A program bound to an engine: what a pipeline runs, in one piece or step by step.

In: a program's steps, and buffers. Out: captures that run them. Never: writes a buffer, or runs anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tc_deploy.backends.base import BoundGraph, Buffer, Capture, Device
from tc_deploy.runtime.binding import Binder
from tc_deploy.runtime.program import Call, ProgramStep

Watch = Callable[[str, BoundGraph, Buffer], BoundGraph]
"""Given a graph's name, the graph as bound for one step and an output of it (to read it is to wait for the device):
what runs in its place."""


@dataclass(frozen=True, kw_only=True)
class BoundStep:
    """A step of the program, bound to an engine; its graphs are those that a watch has made of them."""

    variant: int
    model: BoundGraph
    solver: BoundGraph
    whole: Capture
    """The two."""
    latents: Buffer


@dataclass(frozen=True, kw_only=True)
class BoundProgram:
    """A program, bound to an engine."""

    prologue: Capture | None
    """What runs before the first step, where there is something."""
    steps: tuple[BoundStep, ...]
    whole: Capture
    """All of it, which nobody watches."""


def bound_program(
    prologue: Sequence[Call], program: Sequence[ProgramStep], binder: Binder, device: Device, watch: Watch | None
) -> BoundProgram:
    """Bind a program's graphs, and capture every step, as a watch has made its graphs, and all steps."""
    calls: list[BoundGraph] = []

    def seen(call: Call) -> BoundGraph:
        bound = binder.bind(call)
        calls.append(bound)
        return bound if watch is None else watch(call.graph, bound, binder.buffers[next(iter(call.outputs.values()))])

    before = [seen(call) for call in prologue]
    steps = []
    for step in program:
        model, solver = seen(step.model), seen(step.solver)
        latents = binder.buffers[step.latents]
        whole = device.capture([model, solver])
        steps.append(BoundStep(variant=step.variant, model=model, solver=solver, whole=whole, latents=latents))
    return BoundProgram(
        prologue=device.capture(before) if before else None, steps=tuple(steps), whole=device.capture(calls)
    )
