"""Which run a call goes on with, so that no run goes on with another's caches.

In: a call of the transformer, and the pipeline's run that it comes from. Out: the answer of the trajectory that it
continues or begins. A trajectory, with caches of its own, is told by its run, its half of guidance, its batch and its
conditions; its steps come in order from the first. What fits none is refused. Never: knows of torch or of arguments.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tc_deploy.diffusers.caller import TIMESTEP_TOLERANCE, PipelineRun, PlannedScheduler
from tc_deploy.diffusers.foretold import Foretelling, Past, Seen
from tc_deploy.errors import NotFiniteError, UsageError
from tc_deploy.remarks import warn_once
from tc_deploy.runtime.guidance import remarks_on_guidance
from tc_deploy.runtime.stepper import Engines, Stepper
from tc_deploy.types import FloatArray

KEPT: Final = 4
"""Trajectories whose buffers are kept: two pipelines that take turns, each with both halves of guidance by itself."""
LATENTS: Final = "hidden_states"


class NamedRun:
    """A run that its caller has in hand."""

    is_over = False
    """Nobody says when."""


@dataclass(kw_only=True, eq=False)
class LoopRun:
    """A run of a loop that is no pipeline's: its latents must be what its own solver makes of its outputs."""

    first: NDArray[Any]
    """The latents that it began with."""
    seen: Seen = field(default_factory=Seen)
    is_over: bool = False


Run: TypeAlias = PipelineRun | NamedRun | LoopRun


@dataclass(frozen=True, kw_only=True, eq=False)
class Call:
    """One call of the transformer."""

    timestep: float
    context: str | None
    """Which half of guidance it is, where the pipeline says so."""
    latents: NDArray[Any]
    conditions: Mapping[str, NDArray[Any]]

    @property
    def batch(self) -> int:
        """Rows of every input."""
        return len(self.latents)


@dataclass(kw_only=True, eq=False)
class _Trajectory:
    """One half of a run, and its caches."""

    batch: int
    stepper: Stepper
    run: Run
    context: str | None
    conditions: dict[str, NDArray[Any]]
    latents: NDArray[Any]
    """Of the last call; ``output`` is its answer."""
    output: FloatArray | None = None
    past: Past | None = None
    """Of a loop's run."""

    def unlike(self, call: Call) -> list[str]:
        """The conditions of a call that are not this trajectory's."""
        return [name for name, value in call.conditions.items() if not np.array_equal(self.conditions[name], value)]

    def leads_to(self, latents: NDArray[Any]) -> bool:
        """Whether latents may come at the next step; in a run that its caller vouches for, any may."""
        if self.past is None or not isinstance(self.run, LoopRun):
            return True
        return self.past.leads_to(self.stepper.position, latents, self.run.seen)

    def is_of(self, call: Call) -> bool:
        """Whether a call is of this half."""
        return self.context == call.context and self.batch == call.batch and not self.unlike(call)


class Runs:
    """The runs that a bundle's engines are in. One call at a time.

    Args:
        engines: the bundle's.
        timesteps: (T,) of the plan, as the model is given them.
        scheduler: the plan's.
        full: run every step in full.
    """

    def __init__(self, engines: Engines, timesteps: NDArray[Any], scheduler: PlannedScheduler, *, full: bool) -> None:
        self._engines, self._timesteps, self._scheduler, self._full = engines, timesteps, scheduler, full
        self._foretelling = Foretelling(engines.bundle.step_tables, engines.bundle.first_scale)
        self._kept: list[_Trajectory] = []
        """The one used last at the end."""
        self._loop: LoopRun | None = None

    def answer(self, call: Call, run: PipelineRun | NamedRun | None) -> FloatArray:
        """Run the step that a call asks for.

        Args:
            call: the call.
            run: whose it is; None where only the latents can tell.

        Returns:
            (batch, ...) the caller's own.

        Raises:
            UsageError: no run of these conditions has come to this step, or the scheduler is not the plan's.
            NotFiniteError: the model's output is not finite.
            BackendError: the engine fails.
        """
        begins = self._is_step(0, call.timestep)
        known = self._known_run(call, run, begins=begins)
        halves = [trajectory for trajectory in self._kept if trajectory.run is known]
        half = next((trajectory for trajectory in halves if trajectory.is_of(call)), None)
        if half is not None and half.output is not None and self._is_repeated(half, call):
            return half.output.copy()
        next_of = self._begun(call, known, halves, half) if begins else self._continued(call, halves, half)
        return self._stepped(next_of, call)

    def _known_run(self, call: Call, run: PipelineRun | NamedRun | None, *, begins: bool) -> Run:
        if isinstance(run, NamedRun):
            return run
        if run is not None:
            for trajectory in self._kept:
                if isinstance(trajectory.run, PipelineRun) and trajectory.run.is_same(run):
                    return trajectory.run
            self._scheduler.check(run.scheduler)
            bundle = self._engines.bundle
            for remark in remarks_on_guidance(bundle.manifest, bundle.plan, run.guidance):
                warn_once(f"{bundle.path}: {remark}")
            return run
        loop = self._loop
        if begins:
            halves = [trajectory for trajectory in self._kept if trajectory.run is loop]
            joins = loop is not None and np.array_equal(loop.first, call.latents)
            if loop is None or not joins or any(trajectory.stepper.position != 1 for trajectory in halves):
                if loop is not None:
                    loop.is_over = True
                self._loop = loop = LoopRun(first=call.latents.copy())
        return loop or LoopRun(first=call.latents)

    def _is_repeated(self, half: _Trajectory, call: Call) -> bool:
        """Whether a call asks again what was answered last, as halves of guidance with equal prompts do."""
        last = half.stepper.position - 1
        return self._is_step(last, call.timestep) and np.array_equal(half.latents, call.latents)

    def _begun(self, call: Call, run: Run, halves: list[_Trajectory], half: _Trajectory | None) -> _Trajectory:
        if half is not None:
            for trajectory in halves:
                self._kept.remove(trajectory)
            if half.stepper.position == 1:
                raise UsageError(
                    f"{LATENTS}: two calls with the same conditions and other latents at step 0 of a run: engines"
                    " cannot tell which of them a later call goes on with; give each a cache_context of its own, or"
                    " run all samples in one batch"
                )
        stepper = self._free_stepper(call.batch)
        stepper.start()
        trajectory = _Trajectory(
            batch=call.batch,
            stepper=stepper,
            run=run,
            context=call.context,
            conditions={name: value.copy() for name, value in call.conditions.items()},
            latents=call.latents.copy(),
        )
        if isinstance(run, LoopRun):
            trajectory.past = Past(self._foretelling, call.latents)
        return trajectory

    def _continued(self, call: Call, halves: list[_Trajectory], half: _Trajectory | None) -> _Trajectory:
        if half is None:
            raise self._refusal(call, halves)
        position = half.stepper.position
        if position == len(self._timesteps) or not self._is_step(position, call.timestep):
            raise self._out_of_order(call, position % len(self._timesteps))
        if not half.leads_to(call.latents):
            raise UsageError(
                f"{LATENTS}: at step {position} they are not what {self._scheduler.text} makes of the outputs of this"
                " run: they are of another run or another scheduler; begin at the first timestep, or, where the loop"
                " itself changes them, call what `transformer.new_run()` gives"
            )
        return half

    def _stepped(self, half: _Trajectory, call: Call) -> FloatArray:
        """Run the next step; a trajectory that fails in it cannot go on."""
        if half in self._kept:
            self._kept.remove(half)
        step = half.stepper.position
        output = half.stepper.step({LATENTS: call.latents, **call.conditions})
        if not np.isfinite(output).all():
            raise NotFiniteError(
                f"{self._engines.bundle.path}: the model's output is not finite at step {step} of"
                f" {len(self._timesteps)}; look for the reason with: tc-deploy validate {self._engines.bundle.path}"
            )
        half.latents, half.output = call.latents.copy(), output
        if isinstance(half.run, LoopRun):
            half.run.seen.note(step, call.latents, output)
        self._kept.append(half)
        return output.copy()

    def _free_stepper(self, batch: int) -> Stepper:
        """A stepper that no run needs, or a new one in the place of one that has waited longest."""
        steps = len(self._timesteps)
        over = [one for one in self._kept if one.run.is_over] + [
            one for one in self._kept if not one.run.is_over and one.stepper.position == steps
        ]
        for trajectory in over:
            if trajectory.batch == batch:
                self._kept.remove(trajectory)
                return trajectory.stepper
        while len(self._kept) >= KEPT:
            self._kept.remove(over.pop(0) if over else self._kept[0])
        return self._engines.stepper(batch, full=self._full)

    def _refusal(self, call: Call, halves: list[_Trajectory]) -> UsageError:
        """Why a call is of none of the halves that its run has begun."""
        if not halves:
            return self._out_of_order(call, 0)
        last = halves[-1]
        position = last.stepper.position % len(self._timesteps)
        if all(half.batch != call.batch for half in halves):
            return UsageError(
                f"{LATENTS}: expected a batch of {last.batch}, which this run began with, found {call.batch} at step"
                f" {position}; keep guidance on, or off, for the whole run"
            )
        names = last.unlike(call) if last.batch == call.batch else []
        what = ", ".join(names) or "this half of guidance"
        return UsageError(
            f"{what}: not of this run from its first step on, found at timestep {call.timestep:g}; keep prompts, labels"
            f" and guidance the same, and guidance on, or off, for the whole run of at most {KEPT} calls a step"
        )

    def _out_of_order(self, call: Call, position: int) -> UsageError:
        expected = f"timestep: expected {self._timesteps[position]:g} at step {position}, found {call.timestep:g}"
        steps = len(self._timesteps)
        found = next((step for step in range(steps) if self._is_step(step, call.timestep)), None)
        if found is None:
            return UsageError(
                f"{expected}: the plan is for {steps} steps of {self._scheduler.text}; take that scheduler's timesteps"
                f" for num_inference_steps={steps}, or make a plan: {self._scheduler.how_to_plan(' --steps N')}"
            )
        if position == 0:
            return UsageError(
                f"{expected}, which is step {found}: a run that begins there, as image to image and inpainting do with"
                " strength below 1, has no caches of the steps before it; use strength=1, or keep the model's own"
                " transformer for such runs"
            )
        return UsageError(
            f"{expected}, which is step {found}: steps come in order, in every half of guidance; keep guidance on, or"
            " off, for the whole run"
        )

    def _is_step(self, position: int, timestep: float) -> bool:
        return bool(np.isclose(self._timesteps[position], timestep, rtol=TIMESTEP_TOLERANCE, atol=0))
