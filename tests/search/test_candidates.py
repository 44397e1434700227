"""What a search tries: numbers of full steps from shares, and a round-robin for tokens, in any run."""

import pytest

from tc_deploy.schedule import FULL
from tc_deploy.search.candidates import full_step_counts, token_schedule


@pytest.mark.parametrize(
    ("shares", "steps", "expected"),
    [
        ((0.24, 0.08), 50, (4, 12)),
        ((0.0, 0.01, 1.0), 10, (1, 9)),
        ((0.5,), 2, (1,)),
        ((0.3, 0.34), 6, (2,)),
    ],
)
def test_shares_are_numbers_of_full_steps_that_leave_a_cached_one(
    shares: tuple[float, ...], steps: int, expected: tuple[int, ...]
) -> None:
    assert full_step_counts(shares, steps) == expected


@pytest.mark.parametrize("steps", [2, 3, 6, 50])
def test_tokens_are_kept_in_three_of_four_steps(steps: int) -> None:
    schedule = token_schedule(steps)
    assert schedule.steps == steps
    assert schedule.variants[0] == FULL
    assert schedule.full_steps == -(-steps // min(4, steps))
    assert set(schedule.variants) == {FULL, 1}
