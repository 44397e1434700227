"""The schedule step by step, and which tokens are computed at them.

In: a plan and its tables. Out: records that the template draws. Never: writes markup.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from tc_deploy.plan import Plan
from tc_deploy.report.images import png_uri
from tc_deploy.schedule import FULL
from tc_deploy.tables import pruned_blocks, token_index_name
from tc_deploy.types import FloatArray, IntArray

HEAT_WIDTH = 620
HEAT_ROW_HEIGHT = 24
GRID_COLOUR = (56, 128, 196)
"""Of a token that is always kept; visible on light and on dark paper. One kept less often is more transparent."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One step of the schedule."""

    step: int
    variant: int
    label: str
    title: str
    opens_phase_2: bool


@dataclass(frozen=True, kw_only=True)
class Column:
    """What one variant computes: per block the tokens kept, and their share."""

    variant: int
    kept: tuple[int, ...]
    shares: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Grid:
    """How often each token of a block is kept over the cached steps of a phase."""

    block: int
    keep: int
    uri: str
    alt: str


@dataclass(frozen=True, kw_only=True)
class PhaseGrids:
    """The grids of a phase."""

    phase: int
    steps: int
    side: int
    """Tokens in a row of a grid."""
    grids: tuple[Grid, ...]


def schedule_cells(plan: Plan) -> tuple[Cell, ...]:
    """The steps in order, numbered from 1 as people count."""
    schedule = plan.run_schedule()
    cells = []
    for step, variant in enumerate(schedule.variants):
        full = variant == FULL
        what = "full" if full else f"cached, phase {variant}"
        cells.append(
            Cell(
                step=step + 1,
                variant=variant,
                label="F" if full else str(variant),
                title=f"step {step + 1}, timestep {plan.sampling.timesteps[step]:g}: {what}",
                opens_phase_2=step == schedule.phase_start,
            )
        )
    return tuple(cells)


def heat_columns(plan: Plan) -> tuple[Column, ...]:
    """What each variant that occurs computes in each block; a full step computes all tokens."""
    tokens = plan.model.tokens
    everything = (tokens,) * plan.model.blocks
    kept = {FULL: everything, **{phase: plan.keep_counts(phase) for phase in plan.phases_used()}}
    return tuple(
        Column(variant=variant, kept=counts, shares=tuple(round(count / tokens, 4) for count in counts))
        for variant, counts in kept.items()
    )


def token_grids(plan: Plan, tables: Mapping[str, FloatArray | IntArray]) -> tuple[PhaseGrids, ...]:
    """How often each token is computed, for the phases that have an index table."""
    found = []
    side = math.ceil(math.sqrt(plan.model.tokens))
    for phase in plan.phases_used():
        pruned = pruned_blocks(plan.keep_counts(phase), plan.model.tokens)
        if not pruned:
            continue
        table = tables[token_index_name(phase)]
        starts = np.cumsum([plan.keep_counts(phase)[block] for block in pruned])[:-1]
        grids = []
        for block, rows in zip(pruned, np.split(table, starts, axis=1), strict=True):
            times = np.bincount(rows.ravel(), minlength=plan.model.tokens)
            always, never = int((times == len(table)).sum()), int((times == 0).sum())
            alt = f"block {block}: of {plan.model.tokens} tokens {always} are kept at every step and {never} never"
            grids.append(Grid(block=block, keep=rows.shape[1], uri=_grid_uri(times / len(table), side), alt=alt))
        found.append(PhaseGrids(phase=phase, steps=len(table), side=side, grids=tuple(grids)))
    return tuple(found)


def _grid_uri(shares: np.ndarray, side: int) -> str:
    """A picture with one pixel per token, (rows, side), in the model's order."""
    opacity = np.zeros(math.ceil(len(shares) / side) * side, np.uint8)
    opacity[: len(shares)] = np.rint(255 * shares)
    pixels = np.empty((len(opacity), 4), np.uint8)
    pixels[:, :3] = GRID_COLOUR
    pixels[:, 3] = opacity
    return png_uri(pixels.reshape(-1, side, 4))
