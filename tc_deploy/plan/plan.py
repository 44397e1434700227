"""The plan document: what calibration decided, and whether its parts agree.

In: records and tables. Out: a checked :class:`Plan`, and its identity. The JSON is canonical: equal calibrations give
the same bytes. Never: reads a file, or imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal

import numpy as np
from pydantic import SerializerFunctionWrapHandler, model_serializer

from tc_deploy.bundle import (
    PLAN_DOCUMENT,
    Document,
    FileRecord,
    canonical_json,
    sha256_of_bytes,
)
from tc_deploy.errors import PlanError
from tc_deploy.figures import contradiction_of_cost, contradiction_of_model
from tc_deploy.plan.records import (
    AnySchedule,
    CacheRecord,
    CostRecord,
    ForecastRecord,
    MeasuredRecord,
    ModelRecord,
    OriginRecord,
    SamplingRecord,
)
from tc_deploy.schedule import PHASES, Schedule
from tc_deploy.tables import FORECAST_WEIGHTS, SOLVER_COEFFICIENTS, StepTables, check_tables, token_index_name
from tc_deploy.types import FloatArray, IntArray

FORMAT_VERSION: Final = 3
PLAN: Final = PLAN_DOCUMENT


class Plan(Document):
    """The plan document."""

    kind: Literal["plan"]
    format_version: Literal[3]
    model: ModelRecord
    sampling: SamplingRecord
    schedule: AnySchedule
    cache: CacheRecord
    cost: CostRecord
    origin: OriginRecord
    measured: MeasuredRecord | None
    tables: FileRecord
    forecast: ForecastRecord | None = None
    """None: cached steps forecast by polynomials."""

    @model_serializer(mode="wrap")
    def _without_default(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave the fit out where there is none, so that such a plan has the bytes that it always had."""
        fields: dict[str, Any] = handler(self)
        return {name: value for name, value in fields.items() if name != "forecast" or value is not None}

    def run_schedule(self) -> Schedule:
        """The schedule, checked.

        Raises:
            PlanError: a number is outside its range, or a list makes no schedule.
        """
        return self.schedule.schedule()

    def step_tables(self, tables: Mapping[str, FloatArray | IntArray]) -> StepTables:
        """Its tables, checked before, as whatever runs its steps takes them; without a fit the weights are polynomials.

        Raises:
            PlanError: as for :meth:`run_schedule`.
        """
        schedule, names = self.run_schedule(), {phase: token_index_name(phase) for phase in self.phases_used()}
        weights, solver = tables.get(FORECAST_WEIGHTS), tables.get(SOLVER_COEFFICIENTS)
        return StepTables(
            forecast_weights=(
                schedule.polynomial_weights(self.cache.forecast_order)
                if weights is None
                else weights.astype(np.float32)
            ),
            token_index={phase: tables[name].astype(np.int32) for phase, name in names.items() if name in tables},
            solver_coefficients=None if solver is None else solver.astype(np.float32),
        )

    @property
    def solver_fitted(self) -> bool:
        """Whether its run has a solver's table of its own, and is not solved as the scheduler does."""
        return self.forecast is not None and self.forecast.solver_fitted

    def phases_used(self) -> tuple[int, ...]:
        """The phases that have a cached step, so the cached variants that exist."""
        return tuple(phase for phase in PHASES if self.run_schedule().cached_steps(phase))

    def keep_counts(self, phase: int) -> tuple[int, ...]:
        """Tokens that each block keeps in a cached step of ``phase`` (1 or 2)."""
        return self.cache.keep_counts[phase - 1]

    def cost_in_full_steps(self) -> float:
        """What one sampling run costs, in full steps, by FLOPs."""
        return self.cost.in_full_steps(self.run_schedule())

    def cost_ratio(self) -> float:
        """What one sampling run costs against the run with every step full, by FLOPs; 1 means nothing is saved."""
        return self.cost_in_full_steps() / self.schedule.steps


def check_plan(plan: Plan, tables: Mapping[str, FloatArray | IntArray], where: str) -> None:
    """Check all that the JSON schema cannot say.

    Raises:
        PlanError: keep counts, timesteps or tables do not fit the model and the schedule, figures contradict each
            other, or what was measured or fitted is of another plan.
    """
    schedule = plan.run_schedule()
    if len(plan.sampling.timesteps) != schedule.steps:
        raise PlanError(f"{where}: {len(plan.sampling.timesteps)} timesteps for {schedule.steps} steps")
    for phase in PHASES:
        check_keep_counts(plan.keep_counts(phase), plan.model.blocks, plan.model.tokens, f"{where}: phase {phase}")
    model, cost = plan.model, plan.cost
    wrong = contradiction_of_model(model.config, model.latent_size, model.tokens, model.width) or contradiction_of_cost(
        cost.full_flops, cost.cached_flops, plan.cache.keep_counts, model.tokens
    )
    if wrong is not None:
        raise PlanError(f"{where}: {wrong}; calibrate again")
    _check_forecast(plan, tables, where)
    check_tables(tables, schedule, plan.cache.keep_counts, plan.cache.forecast_order, plan.model.tokens, where)
    if plan.measured is not None and plan.measured.plan_sha256 != content_sha256(plan):
        raise PlanError(
            f"{where}: what it says under measured is of another plan, so {PLAN} was edited since; calibrate again, or"
            ' set "measured" to null'
        )


def _check_forecast(plan: Plan, tables: Mapping[str, FloatArray | IntArray], where: str) -> None:
    fit = plan.forecast
    if (fit is None) != (FORECAST_WEIGHTS not in tables):
        said, found = ("nothing", "a table") if fit is None else ("a fit", "no table")
        raise PlanError(f"{where}: it says {said} under forecast, and has {found} {FORECAST_WEIGHTS}; calibrate again")
    if plan.solver_fitted != (SOLVER_COEFFICIENTS in tables):
        said, found = ("a fitted solver", "no table") if plan.solver_fitted else ("no fitted solver", "a table")
        raise PlanError(
            f"{where}: it says {said} under forecast, and has {found} {SOLVER_COEFFICIENTS}; calibrate again"
        )
    measured = plan.measured
    towards = None if fit is None else fit.converged_steps
    judged = None if measured is None or measured.converged is None else measured.converged.steps
    if measured is not None and judged != towards:
        names = ("the full run" if steps is None else f"a run of {steps} steps" for steps in (towards, judged))
        fitted, other = names
        raise PlanError(f"{where}: it was fitted towards {fitted}, and measured by {other}; calibrate again")
    if fit is None:
        return
    if fit.fitted_for != fitted_for_sha256(plan.model, plan.sampling, plan.schedule, plan.cache):
        raise PlanError(
            f"{where}: its forecast weights were fitted for another model, sampler, schedule or cache than {PLAN} has,"
            " which was edited since; calibrate again"
        )
    seeds = () if plan.measured is None else plan.measured.seeds
    if any(fit.first_seed <= seed < fit.first_seed + fit.samples for seed in seeds):
        raise PlanError(f"{where}: it was measured on seeds that its forecast weights were fitted on; calibrate again")


def check_keep_counts(keep_counts: tuple[int, ...], blocks: int, tokens: int, where: str) -> None:
    """Check one phase's keep counts.

    Raises:
        PlanError: not one count per block, or a count outside 0..N.
    """
    if len(keep_counts) != blocks:
        raise PlanError(f"{where}: expected one keep count for each of the {blocks} blocks, found {len(keep_counts)}")
    for block, keep in enumerate(keep_counts):
        if not 0 <= keep <= tokens:
            raise PlanError(f"{where}, block {block}: keep count must lie in 0..{tokens}, found {keep}")


def plan_sha256(plan: Plan) -> str:
    """The plan's identity: SHA-256 of its canonical bytes (which name the tables' SHA-256)."""
    return sha256_of_bytes(plan_bytes(plan))


def content_sha256(plan: Plan) -> str:
    """What a plan does, as one number: SHA-256 of all but what was measured of it and where its sources were found."""
    content = plan.model_dump(mode="json", exclude={"measured": True, "model": {"source"}})
    if isinstance(content["origin"].get("conditions"), dict):
        content["origin"]["conditions"].pop("file", None)
    return sha256_of_bytes(canonical_json(content).encode("utf-8"))


def fitted_for_sha256(model: ModelRecord, sampling: SamplingRecord, schedule: AnySchedule, cache: CacheRecord) -> str:
    """What fitted forecast weights are for, as one number: another model, sampler or schedule has others."""
    parts = {
        "weights": model.weights_sha256,
        "sampling": sampling.model_dump(mode="json"),
        "schedule": schedule.model_dump(mode="json"),
        "cache": cache.model_dump(mode="json"),
    }
    return sha256_of_bytes(canonical_json(parts).encode("utf-8"))


def plan_bytes(plan: Plan) -> bytes:
    """The canonical bytes of ``plan.json``."""
    return canonical_json(plan.model_dump(mode="json")).encode("utf-8")
