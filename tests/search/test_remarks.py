"""What is said of points: computed, and as plain about a loss as about a gain."""

import pytest
from search_points import point

from tc_deploy.search.pareto import dominates
from tc_deploy.search.record import Kind, PointRecord
from tc_deploy.search.remarks import best_at, front_names, remarks_of, unproven_tokens

FULL = point(Kind.FULL, "full", 1.0, 140.0)
FAST, SLOW = point(Kind.TOKEN_CACHE, "ours a", 0.24, 35.0), point(Kind.TOKEN_CACHE, "ours b", 0.45, 45.0)
TOKENS = point(Kind.TOKEN_CACHE, "ours c", 0.6, 44.0, keep=4)
FEWER = point(Kind.FEWER_STEPS, "5 steps", 0.5, 36.0)
OURS = [FULL, FAST, SLOW, TOKENS, FEWER]


def test_the_best_at_a_latency_is_the_closest_that_is_no_slower() -> None:
    assert best_at(OURS, (Kind.TOKEN_CACHE,), 0.5) == SLOW
    assert best_at(OURS, (Kind.TOKEN_CACHE,), 0.25) == FAST
    assert best_at(OURS, (Kind.TOKEN_CACHE,), 0.1) is None


def test_the_front() -> None:
    assert front_names(OURS) == {"full", "ours a", "ours b"}
    assert dominates(SLOW, TOKENS)
    assert not dominates(TOKENS, SLOW)
    assert not dominates(SLOW, SLOW)


def said(*points: PointRecord) -> str:
    return "\n".join(remarks_of(points))


def test_a_gain_over_fewer_steps_is_named_with_both_figures() -> None:
    text = said(*OURS)
    assert "At 50% of the full run's latency: ours b, 45.0 dB at 0.45, 9.0 dB above fewer steps (5 steps" in text
    assert "At 25% of the full run's latency: ours a, 35.0 dB at 0.24." in text
    assert "Keeping tokens adds nothing here" in text


@pytest.mark.parametrize(
    ("psnr_db", "how"), [(43.9, None), (44.1, "within 1 dB"), (45.5, "better")], ids=["far", "close", "better"]
)
def test_a_baseline_that_comes_close_is_named(psnr_db: float, how: str | None) -> None:
    text = said(*OURS, point(Kind.CACHE_DIT, "theirs", 0.48, psnr_db))
    assert ("At 50%, cache-dit" in text) == (how is not None)
    if how is not None:
        assert f"At 50%, cache-dit is {how}: theirs" in text


def test_a_peer_in_pytorch_is_named_and_beats_nothing_on_engines() -> None:
    points = [*OURS, point(Kind.CACHE_DIT, "theirs", 0.2, 46.0)]
    assert front_names(points) == front_names(OURS)
    text = said(*points)
    assert "ours a: cache-dit (theirs, 46.0 dB at 0.20 in PyTorch) is faster and closer, if ratios in" in text
    assert "ours b: cache-dit" in text
    assert "ours b is not recommended" not in text
    assert "cache-dit ran in PyTorch, and its ratios are to PyTorch's own full run" in text
    assert "of FLOPs, as all are" in remarks_of(points, "flops")[-1]


@pytest.mark.parametrize(
    ("ratio", "psnr_db", "how"),
    [
        (0.4, 31.0, "faster and closer"),
        (0.4, 30.0, "faster and as close"),
        (0.5, 31.0, "as fast and closer"),
    ],
)
def test_how_a_baseline_is_better_is_said_as_it_is(ratio: float, psnr_db: float, how: str) -> None:
    other = point(Kind.FEWER_STEPS, "5 steps", ratio, psnr_db)
    text = said(FULL, point(Kind.TOKEN_CACHE, "ours", 0.5, 30.0), other)
    assert f"ours is not recommended: fewer steps (5 steps) is {how}." in text


def test_where_no_plan_fits_the_best_baseline_is_named() -> None:
    text = said(FULL, SLOW, FEWER, point(Kind.SKIP_REUSE, "skipped", 0.2, 31.0))
    assert "At 25% of the full run's latency no plan of the search fits; the best that does is skip, reuse (sk" in text


def test_a_plan_that_loses_to_fewer_steps_is_not_recommended() -> None:
    text = said(FULL, point(Kind.TOKEN_CACHE, "ours", 0.5, 30.0), point(Kind.FEWER_STEPS, "5 steps", 0.4, 36.0))
    assert "6.0 dB BELOW fewer steps" in text
    assert "ours is not recommended: fewer steps (5 steps) is faster and closer." in text


def test_a_plan_that_takes_longer_than_the_full_run_is_not_recommended() -> None:
    text = said(FULL, point(Kind.TOKEN_CACHE, "ours", 1.01, 50.0))
    assert "ours is not recommended: full run (full) is faster and closer." in text


def test_tokens_that_pay_are_not_talked_down_and_are_compared_with_random_ones() -> None:
    paying = point(Kind.TOKEN_CACHE, "ours c", 0.6, 50.0, keep=4)
    random = point(Kind.RANDOM_TOKENS, "ours c, random tokens", 0.6, 51.5, keep=4)
    text = said(FULL, SLOW, paying, random)
    assert "adds nothing" not in text
    assert "ours c: -1.5 dB against the same number of random tokens." in text


def test_tokens_that_are_not_clearly_better_than_random_ones_are_not_recommended() -> None:
    paying = point(Kind.TOKEN_CACHE, "ours c", 0.6, 50.0, keep=4)
    twins = [
        point(kind, f"ours c, {how}", 0.6, psnr_db, keep=4)
        for kind, how, psnr_db in (
            (Kind.RANDOM_TOKENS, "random tokens", 48.0),
            (Kind.UNIFORM_BLOCKS, "uniform blocks", 49.0),
        )
    ]
    assert unproven_tokens([FULL, paying, *twins]) == set()
    assert "is not recommended" not in said(FULL, paying, *twins)
    close = point(Kind.UNIFORM_BLOCKS, "ours c, uniform blocks", 0.6, 49.1, keep=4)
    for points in ([FULL, paying], [FULL, paying, twins[0], close]):
        assert unproven_tokens(points) == {"ours c"}
        assert "ours c is not recommended: its tokens are not shown to be 1 dB better than random ones" in said(*points)
    assert unproven_tokens([FULL, SLOW]) == set()


def timed(name: str, ratio: float, psnr_db: float, iqr: float, kind: Kind = Kind.TOKEN_CACHE) -> PointRecord:
    return point(kind, name, ratio, psnr_db).model_copy(update={"latency_iqr": iqr})


@pytest.mark.parametrize(
    ("theirs", "psnr_db", "how"),
    [
        (0.39, 45.0, None),
        (0.37, 45.0, "faster and as close"),
        (0.39, 45.1, "as fast and closer"),
        (0.37, 45.1, "faster and closer"),
        (0.41, 46.0, None),
    ],
)
def test_times_within_their_spread_are_told_apart_by_no_verdict(theirs: float, psnr_db: float, how: str | None) -> None:
    baseline = timed("theirs", theirs, psnr_db, 0.02, Kind.FEWER_STEPS)
    text = said(FULL, timed("ours", 0.4, 45.0, 0.01), baseline)
    assert ("ours is not recommended" in text) == (how is not None)
    if how is not None:
        assert f"fewer steps (theirs) is {how}." in text


def test_points_whose_times_were_disturbed_are_named() -> None:
    text = said(FULL, timed("calm", 0.4, 45.0, 0.03), timed("wild", 0.3, 44.0, 0.04))
    assert "spread by more than 10%, and say little: wild. Search again" in text
    assert "Something else ran" not in said(FULL, timed("calm", 0.4, 45.0, 0.03))
