"""What a plan decides step by step, as arrays: which tokens a cached step computes, how it weighs earlier full steps.

In: a plan's tables by name. Out: their names and bytes, one check of them all, and :class:`StepTables`, from which
every user takes them. Never: decides a number, or imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from tc_deploy.bundle import FileRecord, sha256_of_bytes
from tc_deploy.errors import PlanError
from tc_deploy.schedule import FULL, PHASES, Schedule
from tc_deploy.tensors import what_is_wrong
from tc_deploy.types import FloatArray, IntArray

FORECAST_WEIGHTS: Final = "forecast_weights"
"""Name of the table of fitted weights, ``(T, r + 1)`` float32, r being the forecast order.

Row s is how cached step s combines what the last full steps cached; column 0 belongs to the latest. A full step's row
is 1, 0, 0, which nothing reads, and a column whose full step has not run yet is 0. A plan without the table forecasts
by polynomials.
"""
SOLVER_COEFFICIENTS: Final = "solver_coefficients"
"""Name of the table of a fitted solver, ``(T, 2(h + 1))`` float32, as :class:`tc_deploy.models.solver.SolverTable` has
its own. A plan without the table is solved as its scheduler does; and so is a run with every step full."""


@dataclass(frozen=True, kw_only=True, eq=False)
class StepTables:
    """A plan's tables, as whatever runs its steps takes them."""

    forecast_weights: FloatArray
    """``(T, r + 1)``, see :data:`FORECAST_WEIGHTS`."""
    token_index: Mapping[int, IntArray] = field(default_factory=dict)
    """Per phase that prunes a block, ``(cached steps of the phase, sum of M over pruned blocks)``."""
    solver_coefficients: FloatArray | None = None
    """``(T, 2(h + 1))``, see :data:`SOLVER_COEFFICIENTS`; None: the scheduler's own."""

    @classmethod
    def polynomial(
        cls, schedule: Schedule, order: int, token_index: Mapping[int, IntArray] | None = None
    ) -> StepTables:
        """Tables whose weights are the polynomials', as those of a plan made by hand."""
        return cls(forecast_weights=schedule.polynomial_weights(order), token_index=token_index or {})


def pruned_blocks(keep_counts: tuple[int, ...], tokens: int) -> tuple[int, ...]:
    """Blocks that compute some tokens and not others, so the blocks that have a row in the index table."""
    return tuple(block for block, keep in enumerate(keep_counts) if 0 < keep < tokens)


def token_index_name(phase: int) -> str:
    """Name of the index table of a phase: ``(cached steps of the phase, sum of M over pruned blocks)`` int32.

    Row r is for the r-th cached step of the phase. The blocks stand side by side, in order; inside a block the
    indices ascend.
    """
    return f"token_index_{phase}"


def importance_name(phase: int) -> str:
    """Name of the table with the predictor's scores: ``(L, N)`` float32, mean over the phase's cached steps."""
    return f"importance_{phase}"


def index_row(schedule: Schedule, step: int) -> int:
    """The row of the phase's index table that belongs to a cached step.

    Raises:
        PlanError: ``step`` is a full step.
    """
    variant = schedule.variants[step]
    if variant == FULL:
        raise PlanError(f"step {step} is a full step and has no row in an index table")
    return schedule.variants[:step].count(variant)


def tables_bytes(tables: Mapping[str, FloatArray | IntArray]) -> bytes:
    """The bytes of ``tables.safetensors``; the same tables give the same bytes."""
    return safetensors.numpy.save({name: np.ascontiguousarray(tables[name]) for name in sorted(tables)})


def tables_record(tables: Mapping[str, FloatArray | IntArray]) -> FileRecord:
    """Size and SHA-256 of the tables file."""
    data = tables_bytes(tables)
    return FileRecord(size_bytes=len(data), sha256=sha256_of_bytes(data))


def check_tables(
    tables: Mapping[str, NDArray[Any]],
    schedule: Schedule,
    keep_counts: tuple[tuple[int, ...], tuple[int, ...]],
    forecast_order: int,
    tokens: int,
    where: str,
) -> None:
    """Check every table against what the plan's document says.

    Args:
        tables: by name.
        schedule: which steps are full.
        keep_counts: per phase, checked; one for each of the L blocks.
        forecast_order: r.
        tokens: N.
        where: the plan's folder, for messages.

    Raises:
        PlanError: a table is missing, unknown, or not what its name stands for.
    """
    names = {name(phase) for phase in PHASES for name in (token_index_name, importance_name)}
    unknown = sorted(tables.keys() - names - {FORECAST_WEIGHTS, SOLVER_COEFFICIENTS})
    if unknown:
        raise PlanError(f"{where}: table {unknown[0]} is unknown; calibrate again")
    if FORECAST_WEIGHTS in tables:
        _check_forecast_weights(
            tables[FORECAST_WEIGHTS], schedule, forecast_order, f"{where}: table {FORECAST_WEIGHTS}"
        )
    if SOLVER_COEFFICIENTS in tables:
        _check_solver_coefficients(tables[SOLVER_COEFFICIENTS], schedule.steps, f"{where}: table {SOLVER_COEFFICIENTS}")
    for phase in PHASES:
        counts, name = keep_counts[phase - 1], importance_name(phase)
        wrong = what_is_wrong(tables.get(name), np.float32, (len(counts), tokens))
        if name in tables and wrong is not None:
            raise PlanError(f"{where}: table {name}: {wrong}; calibrate again")
        _check_token_index(tables.get(token_index_name(phase)), schedule, phase, counts, tokens, where)


def _check_forecast_weights(table: NDArray[Any], schedule: Schedule, order: int, what: str) -> None:
    if order == 0:
        raise PlanError(f"{what}: expected none, as forecast order 0 reuses and no step reads weights; calibrate again")
    usual = schedule.polynomial_weights(order)
    wrong = what_is_wrong(table, np.float32, usual.shape)
    if wrong is not None:
        raise PlanError(f"{what}: {wrong}; calibrate again")
    full = np.array(schedule.variants) == FULL
    ran = np.cumsum(full)[:, None]
    fixed = full[:, None] | (np.arange(order + 1) >= ran)
    if (table[fixed] != usual[fixed]).any():
        step = int(np.flatnonzero(((table != usual) & fixed).any(axis=1))[0])
        expected = (
            "1 and then 0, as it is a full step" if full[step] else f"0 from column {ran[step, 0]} on, as no more"
        )
        more = "" if full[step] else " full steps have run"
        raise PlanError(
            f"{what}: step {step}: expected {expected}{more}, found {table[step].tolist()}; calibrate again"
        )


def reads_before_start(coefficients: NDArray[Any]) -> bool:
    """Whether a solver's table (T, 2(h + 1)) reads from before step 0, where there is nothing."""
    steps, terms = len(coefficients), coefficients.shape[1] // 2
    before = np.arange(terms) > np.arange(steps)[:, None]
    return bool(coefficients[np.concatenate([before, before], axis=1)].any())


def _check_solver_coefficients(table: NDArray[Any], steps: int, what: str) -> None:
    terms = max(1, table.shape[-1] // 2) if table.ndim else 1
    wrong = what_is_wrong(table, np.float32, (steps, 2 * terms))
    if wrong is None and reads_before_start(table):
        wrong = "a step reads from before step 0"
    if wrong is not None:
        raise PlanError(f"{what}: {wrong}; calibrate again")


def _check_token_index(
    table: NDArray[Any] | None, schedule: Schedule, phase: int, keep_counts: tuple[int, ...], tokens: int, where: str
) -> None:
    pruned, steps = pruned_blocks(keep_counts, tokens), schedule.cached_steps(phase)
    if not pruned or not steps:
        return
    name = token_index_name(phase)
    expected = (len(steps), sum(keep_counts[block] for block in pruned))
    if table is None or table.shape != expected or table.dtype != np.int32:
        found = "nothing" if table is None else f"{table.shape} {table.dtype}"
        raise PlanError(f"{where}: table {name}: expected {expected} int32, found {found}; calibrate again")
    start = 0
    for block in pruned:
        rows = table[:, start : start + keep_counts[block]]
        start += keep_counts[block]
        if rows.min() < 0 or rows.max() >= tokens or (np.diff(rows, axis=1) <= 0).any():
            raise PlanError(
                f"{where}: table {name}: block {block} must name ascending tokens in 0..{tokens - 1}; calibrate again"
            )
