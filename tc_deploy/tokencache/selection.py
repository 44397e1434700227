"""Importance to decisions: how many tokens each block keeps, and which.

In: arrays of scores. Out: keep counts and index tables, deterministic. Never: touches a model.
"""

from __future__ import annotations

import numpy as np

from tc_deploy.errors import PlanError
from tc_deploy.schedule import PHASES, Schedule
from tc_deploy.tables import pruned_blocks
from tc_deploy.types import FloatArray, IntArray


def keep_counts_from_importance(
    importance: FloatArray, keep_ratio: float, tokens: int, multiple: int
) -> tuple[int, ...]:
    """Spend a phase's budget over its blocks.

    The budget, ``keep_ratio * L * N`` tokens, goes out in units of ``multiple`` tokens; each unit to the block whose
    importance per token already given is highest (D'Hondt's rule, so shares are proportional to importance), until a
    block has all its tokens.

    Args:
        importance: (L,) mean importance of each block in the phase, not negative.
        keep_ratio: share of all tokens, 0 to 1. The result's share is at most this, and above it minus one unit.
        tokens: N.
        multiple: unit; a block's last unit is smaller where N is not a multiple.

    Returns:
        (L,) tokens kept per block, 0 to N.

    Raises:
        PlanError: ``keep_ratio`` is outside 0..1, or ``multiple`` is below 1.
    """
    if not 0 <= keep_ratio <= 1:
        raise PlanError(f"keep ratio must lie in 0..1, found {keep_ratio}")
    if multiple < 1:
        raise PlanError(f"keep counts must be multiples of at least 1, found {multiple}")
    blocks = len(importance)
    budget = round(keep_ratio * blocks * tokens)
    counts = [0] * blocks
    shares = [float(score) for score in importance]
    while True:
        units = {block: min(multiple, tokens - counts[block]) for block in range(blocks)}
        open_blocks = [block for block, unit in units.items() if 0 < unit <= budget]
        if not open_blocks:
            return tuple(counts)
        chosen = max(open_blocks, key=lambda block: (shares[block] / (counts[block] + units[block]), -block))
        counts[chosen] += units[chosen]
        budget -= units[chosen]


def phase_keep_counts(
    importance: FloatArray, keep_ratio: tuple[float, float], multiple: int, schedule: Schedule
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Spend each phase's budget by the mean importance of its blocks over its own cached steps.

    Args:
        importance: (T, L, N) scores of every step.
        keep_ratio: shares of phases 1 and 2.
        multiple: unit.
        schedule: which steps are cached; a phase without any takes the mean over all steps.

    Returns:
        Keep counts of phases 1 and 2, as :func:`keep_counts_from_importance` gives them.
    """

    def of_phase(phase: int) -> tuple[int, ...]:
        steps = list(schedule.cached_steps(phase))
        per_block = importance[steps or slice(None)].mean(axis=(0, 2))
        return keep_counts_from_importance(per_block, keep_ratio[phase - 1], importance.shape[2], multiple)

    return of_phase(1), of_phase(2)


def select_tokens(importance: FloatArray, keep_counts: tuple[int, ...]) -> IntArray:
    """Choose the tokens that one cached step computes.

    Args:
        importance: (L, N), finite; higher means compute again.
        keep_counts: tokens kept per block; blocks that keep none or all have no place in the result.

    Returns:
        (sum of M over pruned blocks,) int32: blocks side by side, indices ascending in each so that the gather order
        is reproducible. Of equal scores the lower token goes first.
    """
    rows = [
        np.sort(np.argsort(-importance[block], kind="stable")[: keep_counts[block]])
        for block in pruned_blocks(keep_counts, importance.shape[1])
    ]
    return np.concatenate(rows).astype(np.int32) if rows else np.zeros(0, np.int32)


def token_index_from_importance(
    importance: FloatArray, keep_counts: tuple[tuple[int, ...], tuple[int, ...]], schedule: Schedule
) -> dict[int, IntArray]:
    """Choose the tokens of every cached step.

    Args:
        importance: (T, L, N) scores of every step.
        keep_counts: tokens kept per block, of phases 1 and 2.
        schedule: which steps are cached.

    Returns:
        Per phase that prunes a block: (cached steps of the phase, sum of M over pruned blocks) int32.
    """
    return {
        phase: np.stack([select_tokens(importance[step], keep_counts[phase - 1]) for step in steps])
        for phase in PHASES
        if (steps := schedule.cached_steps(phase)) and pruned_blocks(keep_counts[phase - 1], importance.shape[2])
    }


def spread_importance(blocks: int, tokens: int, step: int) -> FloatArray:
    """Scores for a plan made by hand: tokens evenly spread, other ones at every step, in turn.

    Token n scores by the fractional part of ``(n + step) / golden ratio``: any number of the highest scores is spread
    evenly over the tokens (three-distance theorem), and steps that follow each other choose different ones.

    Returns:
        (L, N) in (0, 1).
    """
    golden_ratio = (1 + 5**0.5) / 2
    scores = ((np.arange(tokens) + step) / golden_ratio % 1).astype(np.float32)
    return np.tile(scores, (blocks, 1))
