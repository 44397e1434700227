"""Who calls: the run of a diffusers pipeline that a call of its transformer belongs to, and that run's scheduler.

A pipeline tells its transformer a timestep and nothing of the run, and two runs may come to the same timestep. What
tells them apart is the activation of the pipeline's ``__call__`` and the timesteps that its scheduler has made for it,
a new tensor each time. In: the stack. Out: a :class:`PipelineRun`, and whether its scheduler is the plan's. Never:
keeps a frame, or changes a scheduler.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import diffusers
import numpy as np
from numpy.typing import NDArray

from tc_deploy.errors import UsageError
from tc_deploy.models.loading import scheduler_from_config
from tc_deploy.plan import Plan
from tc_deploy.runtime.request import GUIDANCE_SCALE, TRUE_CFG_SCALE

TIMESTEP_TOLERANCE: Final = 1e-5
"""Relative: schedulers compute timesteps in single precision, some differently from machine to machine."""
_GUIDANCE = (GUIDANCE_SCALE, TRUE_CFG_SCALE)
_PIPELINES = tuple(
    getattr(diffusers, name) for name in ("DiffusionPipeline", "ModularPipeline") if hasattr(diffusers, name)
)


@dataclass(frozen=True, kw_only=True, eq=False)
class PipelineRun:
    """One activation of a pipeline's ``__call__``."""

    scheduler: Any
    timesteps: Any
    """What the scheduler made for this run; kept, so that no other object can have its place in memory."""
    frame: int
    """Of the activation: two that are alive at once differ in it, though they share a scheduler."""
    guidance: Mapping[str, Any]
    """What it was told of guidance, by the argument's name."""

    def is_same(self, other: PipelineRun) -> bool:
        """Whether both are one run."""
        return self.timesteps is other.timesteps and self.frame == other.frame

    @property
    def is_over(self) -> bool:
        """Whether its scheduler has been set up for another run since."""
        return getattr(self.scheduler, "timesteps", None) is not self.timesteps


def calling_run() -> PipelineRun | None:
    """The run of the pipeline that calls; None where no pipeline does."""
    frame = inspect.currentframe()
    while frame is not None:
        # To ask a frame for its locals copies them, so only those are asked that may be a pipeline's.
        if frame.f_code.co_name == "__call__" and frame.f_code.co_varnames[:1] == ("self",):
            arguments = frame.f_locals
            owner = arguments["self"]
            scheduler = getattr(owner, "scheduler", None) if isinstance(owner, _PIPELINES) else None
            timesteps = getattr(scheduler, "timesteps", None)
            if timesteps is not None:
                guidance = {name: arguments[name] for name in _GUIDANCE if name in arguments}
                return PipelineRun(scheduler=scheduler, timesteps=timesteps, frame=id(frame), guidance=guidance)
        frame = frame.f_back
    return None


class PlannedScheduler:
    """The scheduler that a plan was made for.

    Args:
        plan: the plan.

    Raises:
        ModelError: diffusers has no such scheduler any more.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        sampling = plan.sampling
        self._settings = _settings(scheduler_from_config(sampling.scheduler_class, sampling.scheduler_config, "plan"))
        defaults = inspect.signature(getattr(diffusers, sampling.scheduler_class)).parameters
        chosen = {
            key: value
            for key, value in self._settings.items()
            if key in defaults and not _is_equal(value, defaults[key].default)
        }
        self.text = f"{sampling.scheduler_class}({_listed(chosen)})"
        """The class and what is not its default."""

    def check(self, scheduler: Any) -> None:
        """Check a scheduler that has been set up for a run.

        Raises:
            UsageError: it is of another class, has other settings or other timesteps.
        """
        sampling, found = self._plan.sampling, type(scheduler).__name__
        if found != sampling.scheduler_class:
            raise UsageError(
                f"scheduler: expected {self.text}, which the plan is for, found {found}; give the pipeline that"
                f" scheduler, or make a plan for {found}: save it in the model's scheduler/, then"
                f" {self.how_to_plan()}"
            )
        settings = _settings(scheduler)
        other = [key for key, value in self._settings.items() if not _is_equal(value, settings.get(key))]
        if other:
            expected, seen = ({key: of.get(key) for key in other} for of in (self._settings, settings))
            raise UsageError(
                f"scheduler: expected {found} with {_listed(expected)}, as the plan is for {self.text}, found"
                f" {_listed(seen)}; give the pipeline the plan's settings, or save the others in the model's"
                f" scheduler/, then {self.how_to_plan()}"
            )
        self._check_timesteps(np.asarray(scheduler.timesteps.tolist(), np.float64))

    def _check_timesteps(self, found: NDArray[np.float64]) -> None:
        expected = np.asarray(self._plan.sampling.timesteps, np.float64)
        steps = self._plan.schedule.steps
        if len(found) != steps:
            raise UsageError(
                f"timestep: expected {steps} timesteps, found {len(found)}: the plan is for {steps} steps of"
                f" {self.text}; call the pipeline with num_inference_steps={steps}; for other steps"
                f" {self.how_to_plan(' --steps N')}"
            )
        unlike = np.flatnonzero(~np.isclose(found, expected, rtol=TIMESTEP_TOLERANCE, atol=0))
        if unlike.size:
            step = int(unlike[0])
            given = self._plan.sampling.set_timesteps_kwargs
            raise UsageError(
                f"timestep: expected {expected[step]:g} at step {step}, found {found[step]:g}: the plan is for"
                f" {steps} steps of {self.text} set up with {_listed(given) or 'num_inference_steps alone'}; leave out"
                " sigmas, timesteps and another size, which move the timesteps, or name them in a recipe"
                f" (sampling.set_timesteps_kwargs), then {self.how_to_plan()}"
            )

    def how_to_plan(self, option: str = "") -> str:
        """The commands that make another plan of this model."""
        return f"tc-deploy calibrate {self._plan.model.source}{option} -o calibration/NAME, export and build"


def _settings(scheduler: Any) -> dict[str, Any]:
    """What a scheduler's class takes, without what other classes have left in its configuration."""
    taken = inspect.signature(type(scheduler)).parameters
    return {key: value for key, value in scheduler.config.items() if key in taken}


def _is_equal(one: Any, other: Any) -> bool:
    """Whether two settings are the same, though one of them has been through JSON."""
    if isinstance(one, (Sequence, np.ndarray)) and not isinstance(one, str):
        alike = isinstance(other, (Sequence, np.ndarray)) and len(one) == len(other)
        return alike and all(_is_equal(left, right) for left, right in zip(one, other, strict=True))
    return bool(one == other)


def _listed(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={_shown(value)}" for key, value in settings.items())


def _shown(value: Any) -> str:
    text = str(value.tolist() if isinstance(value, np.ndarray) else value)
    return text if len(text) <= 80 else f"{text[:77]}..."
