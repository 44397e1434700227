"""Importance to keep counts and index tables: budgets, units, order, ties, and the spread of plans made by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tc_deploy.errors import PlanError
from tc_deploy.tables import pruned_blocks
from tc_deploy.tokencache.selection import keep_counts_from_importance, select_tokens, spread_importance
from tc_deploy.types import FloatArray

importances = arrays.arrays(np.float32, st.integers(1, 12), elements=st.floats(0, 1, width=32))
sizes = st.integers(1, 80)
units = st.integers(1, 24)
ratios = st.floats(0, 1)


# ---------------------------------------------------------------------------------------------------------- keep counts
@given(importance=importances, ratio=ratios, tokens=sizes, multiple=units)
def test_the_budget_is_spent_to_the_last_unit(importance: FloatArray, ratio: float, tokens: int, multiple: int) -> None:
    counts = keep_counts_from_importance(importance, ratio, tokens, multiple)
    budget = round(ratio * len(importance) * tokens)
    assert len(counts) == len(importance)
    assert sum(counts) <= budget
    assert sum(counts) > budget - multiple or sum(counts) == len(counts) * tokens


@given(importance=importances, ratio=ratios, tokens=sizes, multiple=units)
def test_every_count_is_a_multiple_or_all_tokens(
    importance: FloatArray, ratio: float, tokens: int, multiple: int
) -> None:
    for count in keep_counts_from_importance(importance, ratio, tokens, multiple):
        assert 0 <= count <= tokens
        assert count % multiple == 0 or count == tokens


@given(importance=importances, ratio=ratios, tokens=sizes, multiple=units)
def test_a_more_important_block_never_keeps_less(
    importance: FloatArray, ratio: float, tokens: int, multiple: int
) -> None:
    counts = keep_counts_from_importance(importance, ratio, tokens, multiple)
    by_importance = [counts[block] for block in np.argsort(-importance, kind="stable")]
    assert by_importance == sorted(by_importance, reverse=True)


@given(importance=importances, tokens=sizes, multiple=units, ratio=ratios, more=ratios)
def test_a_larger_budget_takes_no_token_away_while_units_are_equal(
    importance: FloatArray, tokens: int, multiple: int, ratio: float, more: float
) -> None:
    whole = tokens * multiple
    smaller, larger = (
        keep_counts_from_importance(importance, share, whole, multiple) for share in sorted((ratio, more))
    )
    assert all(few <= many for few, many in zip(smaller, larger, strict=True))


@given(
    importance=arrays.arrays(np.float32, st.integers(2, 12), elements=st.floats(0.25, 1, width=32)),
    ratio=st.floats(0, 0.25),
)
def test_counts_are_proportional_to_importance(importance: FloatArray, ratio: float) -> None:
    """D'Hondt's rule: no block is a whole unit below its share. At these ratios no block can be full."""
    tokens = 500
    counts = keep_counts_from_importance(importance, ratio, tokens, 1)
    shares = importance.astype(np.float64) / importance.sum(dtype=np.float64) * sum(counts)
    assert (np.array(counts) > shares - 1.01).all()
    assert (np.array(counts) < shares + len(counts)).all()


@given(importance=importances, tokens=sizes, multiple=units)
def test_ratio_0_keeps_nothing_and_1_keeps_all(importance: FloatArray, tokens: int, multiple: int) -> None:
    assert set(keep_counts_from_importance(importance, 0.0, tokens, multiple)) == {0}
    assert set(keep_counts_from_importance(importance, 1.0, tokens, multiple)) == {tokens}


def test_of_equal_blocks_the_first_is_served_first() -> None:
    assert keep_counts_from_importance(np.ones(3, np.float32), 0.5, 16, 8) == (8, 8, 8)
    assert keep_counts_from_importance(np.ones(3, np.float32), 1 / 3, 16, 8) == (8, 8, 0)


def test_units_go_where_importance_per_token_is_highest() -> None:
    importance = np.array([0.1, 0.6, 0.3], np.float32)
    assert keep_counts_from_importance(importance, 0.5, 20, 1) == (3, 18, 9)
    assert keep_counts_from_importance(importance, 0.5, 20, 8) == (0, 20, 8)


@pytest.mark.parametrize("ratio", [-0.01, 1.01, float("nan")])
def test_a_ratio_that_is_no_share_is_refused(ratio: float) -> None:
    with pytest.raises(PlanError, match=r"keep ratio must lie in 0\.\.1, found"):
        keep_counts_from_importance(np.ones(3, np.float32), ratio, 16, 8)


@pytest.mark.parametrize("multiple", [0, -8])
def test_a_unit_of_no_tokens_is_refused(multiple: int) -> None:
    with pytest.raises(PlanError, match=f"multiples of at least 1, found {multiple}"):
        keep_counts_from_importance(np.ones(3, np.float32), 0.5, 16, multiple)


# --------------------------------------------------------------------------------------------------------------- tokens
@st.composite
def scored_blocks(draw: st.DrawFn) -> tuple[FloatArray, tuple[int, ...]]:
    """Scores with many ties, and keep counts from 0 to N."""
    blocks, tokens = draw(st.integers(1, 5)), draw(st.integers(1, 20))
    scores = st.sampled_from([np.float32(0.1), np.float32(0.5), np.float32(0.50001), np.float32(0.9)])
    importance = draw(arrays.arrays(np.float32, (blocks, tokens), elements=scores))
    return importance, draw(st.tuples(*[st.integers(0, tokens)] * blocks))


@given(case=scored_blocks())
def test_the_highest_scores_are_kept_the_lower_token_of_equals(case: tuple[FloatArray, tuple[int, ...]]) -> None:
    importance, keep_counts = case
    index = select_tokens(importance, keep_counts)
    assert index.dtype == np.int32
    expected: list[int] = []
    for block in pruned_blocks(keep_counts, importance.shape[1]):
        order = sorted(range(importance.shape[1]), key=lambda token: (-importance[block, token], token))
        expected += sorted(order[: keep_counts[block]])
    assert index.tolist() == expected


@given(case=scored_blocks())
def test_a_blocks_tokens_ascend_and_none_stands_twice(case: tuple[FloatArray, tuple[int, ...]]) -> None:
    importance, keep_counts = case
    index, start = select_tokens(importance, keep_counts), 0
    for block in pruned_blocks(keep_counts, importance.shape[1]):
        rows = index[start : start + keep_counts[block]]
        start += keep_counts[block]
        assert len(rows) == keep_counts[block]
        assert (np.diff(rows) > 0).all()
        assert rows[0] >= 0
        assert rows[-1] < importance.shape[1]
    assert len(index) == start


def test_blocks_that_keep_all_or_nothing_have_no_place() -> None:
    assert select_tokens(np.ones((2, 4), np.float32), (0, 4)).shape == (0,)


# --------------------------------------------------------------------------------------------------------------- spread
@given(tokens=st.integers(2, 300), step=st.integers(0, 1000), share=st.floats(0.02, 0.98))
def test_hand_made_scores_keep_tokens_evenly(tokens: int, step: int, share: float) -> None:
    keep = max(1, round(share * tokens))
    scores = spread_importance(2, tokens, step)
    assert scores.shape == (2, tokens)
    assert (scores >= 0).all()
    assert (scores < 1).all()
    assert (scores[0] == scores[1]).all()
    kept = np.zeros(tokens, bool)
    kept[np.argsort(-scores[0], kind="stable")[:keep]] = True
    # However a run of tokens is cut out, it holds its share of the kept ones, give or take 5.
    surplus = np.concatenate([[0.0], np.cumsum(kept - keep / tokens)])
    assert surplus.max() - surplus.min() <= 5


@pytest.mark.parametrize("tokens", [16, 64, 256])
@pytest.mark.parametrize("share", [1 / 8, 1 / 4, 1 / 2, 3 / 4])
def test_hand_made_scores_take_every_token_in_turn(tokens: int, share: float) -> None:
    keep, steps = round(share * tokens), 200
    kept = np.zeros((steps, tokens), bool)
    for step in range(steps):
        kept[step, select_tokens(spread_importance(1, tokens, step), (keep,))] = True
    assert set(kept.sum(1)) == {keep}
    # Over the run every token has its share, and none waits longer than three times what it would in turn.
    assert np.abs(kept.mean(0) - share).max() < 0.05
    longest = max(np.diff(np.flatnonzero(kept[:, token]), prepend=-1, append=steps).max() for token in range(tokens))
    assert longest <= 3 / share
    # While it can, a step leaves alone what the step before computed.
    overlap = (kept[1:] & kept[:-1]).sum(1)
    if share < 1 / 3:
        assert overlap.max() <= 1
