"""The schedule and the tokens as they are drawn, against the plan and its tables."""

from __future__ import annotations

import numpy as np
from report.folders import DIGITS
from report.png import pixels_of

from tc_deploy.plan import load_plan
from tc_deploy.report.tokens import GRID_COLOUR, heat_columns, schedule_cells, token_grids
from tc_deploy.tables import token_index_name

PLAN, TABLES = load_plan(DIGITS)


def test_every_step_is_drawn() -> None:
    cells = schedule_cells(PLAN)
    assert " ".join(
        "F" if cell.label == "F" else f"c{cell.label}" for cell in cells
    ) == PLAN.run_schedule().line().replace("| ", "")
    assert [cell.step for cell in cells if cell.opens_phase_2] == [PLAN.schedule.phase_start + 1]
    assert cells[0].title == "step 1, timestep 999: full"


def test_shares_of_each_variant() -> None:
    full, first, second = heat_columns(PLAN)
    assert full.kept == (64,) * 8
    assert set(full.shares) == {1.0}
    assert set(first.shares) == {0.0}
    assert second.kept == PLAN.keep_counts(2)
    assert second.shares[3] == 16 / 64


def test_how_often_a_token_is_kept() -> None:
    (phase,) = token_grids(PLAN, TABLES)
    assert (phase.phase, phase.steps, phase.side) == (2, 7, 8)
    assert [(grid.block, grid.keep) for grid in phase.grids] == [(3, 16), (4, 16), (5, 8), (6, 24)]
    table, start = TABLES[token_index_name(2)], 0
    for grid in phase.grids:
        rows = table[:, start : start + grid.keep]
        start += grid.keep
        drawn = pixels_of(grid.uri).reshape(64, 4)
        assert (drawn[:, :3] == GRID_COLOUR).all()
        for token in range(64):
            assert drawn[token, 3] == np.rint(255 * (rows == token).any(1).mean())


def test_tokens_that_make_no_square() -> None:
    model = PLAN.model.model_copy(update={"tokens": 66})
    (phase,) = token_grids(PLAN.model_copy(update={"model": model}), TABLES)
    assert phase.side == 9
    assert pixels_of(phase.grids[0].uri).shape == (8, 9, 4)
