"""A sampling run in PyTorch under a schedule: what calibration measures with and what engines are compared with.

The sampler itself is diffusers' scheduler, untouched. Nothing here is fast; the engines are for that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tc_deploy.conditions import UNCONDITIONAL, Conditions
from tc_deploy.errors import NotFiniteError, PlanError
from tc_deploy.models.family import DiffusionTransformer
from tc_deploy.models.solver import SolverTable, read_solver, started_scheduler
from tc_deploy.models.table_scheduler import TableScheduler
from tc_deploy.plan import CacheRecord, PromptsRecord, TextsRecord
from tc_deploy.schedule import FULL, Schedule
from tc_deploy.tables import SOLVER_COEFFICIENTS, StepTables, index_row
from tc_deploy.tokencache.forward import run_cached, run_full
from tc_deploy.tokencache.guidance import guided_output
from tc_deploy.types import GuidanceRule

StepFunction = Callable[[int, Mapping[str, Tensor]], Tensor]
"""(step, the model's inputs) to the model's output."""
OWN_REMEDY = "use another checkpoint or scheduler, or a lower guidance scale"
"""For a run of the model itself."""
PLAN_REMEDY = "choose shorter intervals or a lower forecast_order"
"""For a run under a plan."""


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Prompt embeddings that samples take in turn."""

    conditions: Conditions
    record: PromptsRecord | TextsRecord


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """A diffusers scheduler and how it is used."""

    scheduler: Any
    steps: int
    guidance_scale: float | None
    """None: one model call per sample, without guidance."""
    set_timesteps_kwargs: Mapping[str, Any]
    prompts: Prompts | None = None
    """None: conditions are drawn."""
    guidance_rule: GuidanceRule = GuidanceRule.PLAIN
    """How the two outputs are combined."""
    embedded_guidance: float | None = None
    """Strength that a model whose guidance is distilled is told; None leaves it to the prompts, or to the draw."""
    solver: SolverTable | None = None
    """A table in the place of the scheduler's own updates; None: those."""

    def fresh_scheduler(self) -> Any:
        """A scheduler of one's own, its timesteps set; schedulers carry state from step to step."""
        if self.solver is not None:
            return TableScheduler(self.solver)
        return started_scheduler(self.scheduler, self.steps, self.set_timesteps_kwargs)

    def under(self, tables: StepTables) -> Sampling:
        """The sampler of a plan's run, by the plan's tables: the same where its solver was not fitted.

        Raises:
            PlanError: the fitted table is not for this scheduler.
            ExportError: the scheduler's steps are not a deterministic linear update.
        """
        own = read_solver(self.scheduler, self.steps, self.set_timesteps_kwargs)
        solver = planned_solver(own, tables, type(self.scheduler).__name__)
        return self if solver is own else dataclasses.replace(self, solver=solver)

    def guided(self, output: Tensor) -> Tensor:
        """What the scheduler is given of a model's output: both halves mixed, (2B, ...) to (B, ...), where guided."""
        if self.guidance_scale is None:
            return output
        conditional, unconditional = output.chunk(2)
        return guided_output(conditional, unconditional, self.guidance_scale, self.guidance_rule)


def planned_solver(own: SolverTable, tables: StepTables, name: str) -> SolverTable:
    """The solver of a plan's run: the scheduler's own table, or with fitted coefficients in the place of its.

    Args:
        own: the scheduler's.
        tables: the plan's.
        name: the scheduler's, for the message.

    Raises:
        PlanError: the fitted table is not for this scheduler.
    """
    fitted = tables.solver_coefficients
    if fitted is None:
        return own
    history = fitted.shape[1] // 2 - 1
    if len(fitted) != own.steps or history < own.history:
        raise PlanError(
            f"the plan's table {SOLVER_COEFFICIENTS} is for another solver: expected {own.steps} steps and at least"
            f" {2 * (own.history + 1)} columns for {name}, found {fitted.shape}; calibrate again"
        )
    return dataclasses.replace(own, history=history, coefficients=fitted)


class TokenCachedSteps:
    """The steps of one trajectory under a schedule, with the caches between them.

    Args:
        model: the model.
        cache: keep counts, reuse, attention, forecast order.
        schedule: which steps are full.
        tables: the weights of every cached step, and the tokens of those that prune.
    """

    def __init__(
        self,
        model: DiffusionTransformer,
        cache: CacheRecord,
        schedule: Schedule,
        tables: StepTables,
    ) -> None:
        self.model, self.cache, self.schedule = model, cache, schedule
        device = device_of(model)
        self.token_index = {phase: torch.from_numpy(table).to(device) for phase, table in tables.token_index.items()}
        self.weights = torch.tensor(tables.forecast_weights, device=device)
        self.history: list[dict[str, Tensor]] = []

    def __call__(self, step: int, inputs: Mapping[str, Tensor]) -> Tensor:
        """Run one step; steps must come in order, from 0."""
        phase = self.schedule.variants[step]
        if phase == FULL:
            output, noted = run_full(self.model, self.cache, inputs)
            self.history = [noted, *(self.history if step else [])][: self.cache.forecast_order + 1]
            return output
        return run_cached(self.model, self.cache, phase, inputs, *self.cached_arguments(step, len(inputs["timestep"])))

    def cached_arguments(self, step: int, batch: int) -> tuple[list[dict[str, Tensor]], Tensor, Tensor | None]:
        """What a cached step takes beside the model's inputs: history, weights and token index of ``run_cached``."""
        # Before that many full steps have run the weights of the missing ones are 0: any finite tensor will do.
        missing = self.cache.forecast_order + 1 - len(self.history)
        table = self.token_index.get(self.schedule.variants[step])
        rows = None if table is None else self.model.index_row(table[index_row(self.schedule, step)], batch)
        return self.history + [self.history[0]] * missing, self.weights[step].expand(batch, -1), rows


def device_of(model: DiffusionTransformer) -> torch.device:
    """Where a model's weights lie, and so where it runs."""
    return next(model.module.parameters()).device


def finite_steps(whose: str, steps: int, remedy: str) -> Callable[[int, Mapping[str, Tensor], Tensor], None]:
    """What :func:`denoise` calls after each step, so that a run which comes to NaN ends at the step where it does.

    Args:
        whose: run, for the message.
        steps: T.
        remedy: what may help.

    Returns:
        A function that raises :class:`tc_deploy.errors.NotFiniteError` where the new latents are not finite.
    """

    def check(step: int, inputs: Mapping[str, Tensor], latents: Tensor) -> None:  # noqa: ARG001
        if not latents.isfinite().all():
            raise NotFiniteError(
                f"{whose} is not finite from step {step} on (steps count from 0 to {steps - 1}); {remedy}"
            )

    return check


@torch.no_grad()
def denoise(
    model: DiffusionTransformer,
    sampling: Sampling,
    noise: Tensor,
    conditions: Mapping[str, Tensor],
    step_function: StepFunction,
    on_step: Callable[[int, Mapping[str, Tensor], Tensor], None] | None = None,
) -> Tensor:
    """Sample, on the model's device.

    Args:
        model: names the inputs and the output's channels.
        sampling: scheduler, steps, guidance.
        noise: (B, *latent shape) standard normal.
        conditions: by name, (B, ...); those of the unconditional half as ``unconditional.NAME``, where they are left
            out it is "no condition" as the family has it.
        step_function: runs the model at one step.
        on_step: called after each step with the step, the model's inputs and the new latents.

    Returns:
        The final latents, (B, *latent shape), on the CPU.
    """
    scheduler = sampling.fresh_scheduler()
    guided = sampling.guidance_scale is not None
    given = model_batch(model, conditions, guided=guided)
    device = device_of(model)
    latents = noise.to(device)
    if hasattr(scheduler, "init_noise_sigma"):
        latents = latents * scheduler.init_noise_sigma
    channels = latents.shape[1]
    for step, t in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(latents, t) if hasattr(scheduler, "scale_model_input") else latents
        hidden_states = torch.cat([scaled, scaled]) if guided else scaled
        timestep = t.to(device, torch.float32).expand(len(hidden_states))
        inputs = {"hidden_states": hidden_states, "timestep": timestep, **given}
        output = sampling.guided(step_function(step, inputs)[:, :channels])
        latents = scheduler.step(output, t, latents, return_dict=False)[0]
        if on_step is not None:
            on_step(step, inputs, latents)
    return latents.cpu()


def model_batch(model: DiffusionTransformer, conditions: Mapping[str, Tensor], *, guided: bool) -> dict[str, Tensor]:
    """The conditions of all rows of the model's batch."""
    device = device_of(model)
    conditions = {name: value.to(device) for name, value in conditions.items()}
    given = {item.name: conditions[item.name] for item in model.geometry.conditions}
    if not guided:
        return given
    chosen = {name: conditions[UNCONDITIONAL + name] for name in given if UNCONDITIONAL + name in conditions}
    halves = {name: torch.cat([given[name], other]) for name, other in chosen.items()}
    return model.with_unconditional(given) | halves
