"""The space of a search: distinct candidates, each judged once, and a front that nobody beats."""

from collections.abc import Callable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tc_deploy.calibrate.recipe import SearchRecipe
from tc_deploy.errors import PlanError
from tc_deploy.schedule import FULL
from tc_deploy.search.pareto import front
from tc_deploy.search.space import SHARES, Candidate, Judged, candidates, chosen_for_engines, identity, judge_candidates
from tc_deploy.types import Attention, Reuse, Skip

STEPS = 12
SMALL = SearchRecipe(
    phase_start=(0.5,),
    cache_interval_early=(1, 2, 3),
    cache_interval_late=(1, 2),
    keep_ratio=(0.0, 0.25),
    forecast_order=(1,),
    skip=(Skip.MODEL,),
)
LARGE = SearchRecipe(phase_start=(0.25, 0.5, 0.75), keep_ratio=(0.0, 0.25, 0.5), trials=80)


def judge(candidate: Candidate) -> Judged:
    """Full steps and kept tokens cost and help, with a preference that is not monotone."""
    full = candidate.schedule(STEPS).variants.count(FULL)
    ratio = (full + (STEPS - full) * sum(candidate.keep_ratio) / 2) / STEPS
    return Judged(
        candidate=candidate, latency_ratio=ratio, psnr_db=20 + 30 * ratio - abs(candidate.cache_interval_early - 3)
    )


def recording(asked: list[Candidate]) -> Callable[[Candidate], Judged]:
    def record(candidate: Candidate) -> Judged:
        asked.append(candidate)
        return judge(candidate)

    return record


def test_candidates_that_run_alike_are_one() -> None:
    found = candidates(SMALL, STEPS)
    # K=(1, 1) is the full run. Where a phase has no cached step its keep ratio says nothing.
    #   K=(1, 2): 2 ratios; K=(2, 1), (3, 1): 2 each; K=(2, 2), (3, 2): 4 each.
    assert len(found) == 2 + 2 * 2 + 2 * 4
    assert len({identity(candidate, STEPS) for candidate in found.values()}) == len(found)
    for candidate in found.values():
        assert any(candidate.schedule(STEPS).variants)
        for phase in (1, 2):
            assert candidate.schedule(STEPS).cached_steps(phase) or not candidate.keep_ratio[phase - 1]


def test_reuse_and_attention_matter_only_where_tokens_are_kept() -> None:
    one_setting = candidates(SMALL, STEPS)
    more = SMALL.model_copy(update={"reuse": tuple(Reuse), "attention": tuple(Attention)})
    kept = sum(candidate.keeps_tokens for candidate in one_setting.values())
    assert len(candidates(more, STEPS)) == len(one_setting) - kept + 4 * kept


def test_skipping_blocks_is_another_run_only_where_a_phase_keeps_nothing() -> None:
    both = SMALL.model_copy(update={"skip": tuple(Skip)})
    one = candidates(SMALL, STEPS)
    keeping_everywhere = sum(
        all(candidate.keep_ratio[phase - 1] for phase in (1, 2) if candidate.schedule(STEPS).cached_steps(phase))
        for candidate in one.values()
    )
    assert len(candidates(both, STEPS)) == 2 * len(one) - keeping_everywhere


def test_where_tokens_are_kept_the_start_of_phase_2_tells_runs_apart_and_elsewhere_only_by_its_steps() -> None:
    recipe = SMALL.model_copy(
        update={"phase_start": (0.25, 0.5), "cache_interval_early": (3,), "cache_interval_late": (3,)}
    )
    found = list(candidates(recipe, STEPS).values())
    # Both starts are multiples of 3, so that the steps are the same ones. Each phase's tokens are spent over blocks
    # by the importance of its own steps.
    assert sum(not candidate.keeps_tokens for candidate in found) == 1
    assert [candidate.phase_start for candidate in found if all(candidate.keep_ratio)] == [3, 6]


def test_something_is_judged_even_if_the_optimiser_asks_for_full_runs_alone() -> None:
    late = SMALL.model_copy(
        update={
            "phase_start": (0.8, 0.9, 1.0),
            "cache_interval_early": (1,),
            "cache_interval_late": (1, 2, 3),
            "trials": 1,
        }
    )
    late = late.model_copy(update={"keep_ratio": (0.0,)})
    for seed in range(40):  # with some of which it never asks for the last step but one
        (judged,) = judge_candidates(late, STEPS, seed, judge)
        assert any(judged.candidate.schedule(STEPS).variants)


def test_a_space_without_a_cached_step_is_refused() -> None:
    with pytest.raises(PlanError, match="no candidate has a cached step in 12 steps"):
        candidates(SearchRecipe(cache_interval_early=(1,), cache_interval_late=(1,)), STEPS)


def test_a_small_space_is_searched_whole() -> None:
    asked: list[Candidate] = []
    judged = judge_candidates(SMALL, STEPS, 0, recording(asked))
    assert asked == list(candidates(SMALL, STEPS).values())
    assert [item.candidate for item in judged] == asked


def test_of_a_large_space_as_many_are_judged_as_allowed_each_once() -> None:
    asked: list[Candidate] = []
    judged = judge_candidates(LARGE, STEPS, 0, recording(asked))
    assert len(candidates(LARGE, STEPS)) > LARGE.trials
    assert len(judged) == len(asked) == LARGE.trials
    assert len({identity(candidate, STEPS) for candidate in asked}) == LARGE.trials
    # Every interval was tried in both phases alike before the optimiser chose; 6 and 8 are one in 6 steps.
    assert {(item.cache_interval_early, item.cache_interval_late) for item in asked} >= {
        (k, k) for k in (2, 3, 4, 5, 6)
    }
    assert {item.cache_interval_early for item in asked if all(item.keep_ratio)} >= {2, 3, 4, 5, 6}


def test_the_seed_decides_what_is_tried() -> None:
    once, again, other = (judge_candidates(LARGE, STEPS, seed, judge) for seed in (0, 0, 1))
    assert once == again
    assert once != other


FIGURES = st.lists(st.tuples(st.floats(0.01, 1), st.floats(10, 60)), min_size=1, max_size=30)
ANY = Candidate(
    phase_start=6,
    cache_interval_early=2,
    cache_interval_late=2,
    keep_ratio=(0, 0),
    forecast_order=1,
    reuse=Reuse.BRANCH,
    attention=Attention.ALL,
    skip=Skip.MODEL,
)


def with_figures(figures: list[tuple[float, float]], *, keeping: bool = False) -> list[Judged]:
    keep_ratio = (0.25, 0.25) if keeping else (0.0, 0.0)
    return [
        Judged(
            candidate=Candidate(**{**vars(ANY), "phase_start": number, "keep_ratio": keep_ratio}),
            latency_ratio=ratio,
            psnr_db=psnr_db,
        )
        for number, (ratio, psnr_db) in enumerate(figures)
    ]


@given(FIGURES)
def test_the_front_is_what_nobody_beats(figures: list[tuple[float, float]]) -> None:
    judged = with_figures(figures)
    best = front(judged)
    for item in judged:
        beaten = any(
            other.latency_ratio <= item.latency_ratio
            and other.psnr_db >= item.psnr_db
            and (other.latency_ratio, other.psnr_db) != (item.latency_ratio, item.psnr_db)
            for other in judged
        )
        same = any((other.latency_ratio, other.psnr_db) == (item.latency_ratio, item.psnr_db) for other in best)
        assert same != beaten


@given(FIGURES, st.integers(1, 8))
@example([(0.03125, 10.0)], 3)
def test_engines_are_built_of_the_front_at_latencies_spread_over_it(
    figures: list[tuple[float, float]], points: int
) -> None:
    judged = with_figures(figures)
    chosen = chosen_for_engines(judged, points)
    assert 1 <= len(chosen) <= points + len(SHARES)
    assert set(chosen) <= set(front(judged))
    assert front(judged)[0] in chosen
    if points > 1:
        assert front(judged)[-1] in chosen
    for share in SHARES:
        fits = [item for item in front(judged) if item.latency_ratio <= share]
        assert not fits or fits[-1] in chosen


def test_one_that_keeps_tokens_is_built_even_if_it_is_beaten() -> None:
    skipping = with_figures([(0.2, 40.0), (0.4, 50.0)])
    # The last would be nearest to the front, but says little of tokens: nearly all of its steps are full.
    keeping = with_figures([(0.3, 30.0), (0.5, 45.0), (0.8, 49.9), (0.9, 50.0)], keeping=True)
    assert chosen_for_engines([*skipping, *keeping], 4) == (*skipping, keeping[1])
