"""What a report says first: the plan's standing, and nothing better left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from report.folders import CHOSEN, DIGITS, FEWER, SOLVER_STEPS, edit, make_point, points_of_the_demo, write_search

from tc_deploy.plan import PLAN, content_sha256, load_plan
from tc_deploy.report.source import source_from_folder
from tc_deploy.report.words import Standing, Verdict, verdict_from_source
from tc_deploy.search.pareto import dominates
from tc_deploy.search.record import Kind, PointRecord


def verdict(folder: Path, points: list[PointRecord], **changes: Any) -> Verdict:
    return verdict_from_source(source_from_folder(write_search(folder, points, {}, **changes)))


def plain(text: str) -> str:
    return text.replace("\N{NO-BREAK SPACE}", " ")


def without(*kinds: Kind) -> list[PointRecord]:
    return [point for point in points_of_the_demo() if point.kind not in kinds]


def test_a_plan_ahead_of_every_baseline(tmp_path: Path) -> None:
    found = verdict(tmp_path / "plan", without(Kind.RANDOM_TOKENS, Kind.UNIFORM_BLOCKS, Kind.BETTER_SOLVER))
    assert found.standing is Standing.AHEAD
    assert plain(found.headline) == "3.7 dB closer to the full run than any baseline at comparable time."
    steps, cost, figures, baseline = map(plain, found.sentences)
    assert steps == (
        "20 of 50 steps run the whole model; 23 cached steps of phase 1 do not run it and forecast its output;"
        " 7 cached steps of phase 2 compute 12.5 % of the tokens of all blocks and forecast the rest."
    )
    assert cost == "By FLOPs a run costs 20.9 full steps, 41.9 % of the full run."
    assert figures == (
        "A run takes 47 % of the full run's time (interquartile range 0.94 %), 188 ms for 20 pictures, at 50.8 dB PSNR"
        " to the full run's pictures (64 seeds that the search did not see)."
    )
    assert "skip, K=(4, 2), order 2 (skip, forecast): 42 % of the full run's time, 47.1 dB" in baseline


def test_no_verdict_within_its_own_noise(tmp_path: Path) -> None:
    """A time with an interquartile range of 42 % decides nothing; nobody is ahead by it, and nobody behind."""
    chosen = next(point for point in points_of_the_demo() if point.name == CHOSEN)
    noisy = chosen.model_copy(update={"latency_iqr": 0.42 * chosen.latency_ratio})
    points = [noisy if point.name == CHOSEN else point for point in points_of_the_demo()]
    found = verdict(tmp_path / "plan", points)
    assert found.standing is Standing.UNKNOWN
    assert "interquartile range 42 % of the plan's own" in plain(found.headline)


@pytest.mark.parametrize(
    ("ratio", "psnr_db", "standing", "words"),
    [
        (0.46, 50.8, Standing.BEHIND, "Dominated: rival (skip, forecast) is as fast or faster"),
        (0.47, 50.9, Standing.BEHIND, "Dominated: rival (skip, forecast)"),
        (0.47, 50.8, Standing.EVEN, "A baseline comes within 1 dB at comparable time: rival (skip, forecast)."),
        (0.47, 50.0, Standing.EVEN, "A baseline comes within 1 dB at comparable time: rival (skip, forecast)."),
        (0.49, 53.0, Standing.BEHIND, "rival (skip, forecast) is 2.2 dB better and hardly slower"),
        (0.50, 53.0, Standing.AHEAD, "1.2 dB closer to the full run than any baseline"),
    ],
)
def test_a_baseline_that_comes_near(
    tmp_path: Path, ratio: float, psnr_db: float, standing: Standing, words: str
) -> None:
    rival = make_point("rival", Kind.SKIP_FORECAST, ratio, psnr_db)
    found = verdict(tmp_path / "plan", [*points_of_the_demo(), rival])
    assert found.standing is standing
    assert words in plain(found.headline)


def test_a_point_of_ours_that_dominates_is_named_too(tmp_path: Path) -> None:
    found = verdict(tmp_path / "plan", [*points_of_the_demo(), make_point("other", Kind.TOKEN_CACHE, 0.4, 52.0)])
    assert found.headline.startswith("Dominated: other (tc-deploy)")


def test_the_full_run_is_no_rival(tmp_path: Path) -> None:
    points = [point for point in points_of_the_demo() if point.kind in {Kind.FULL, Kind.TOKEN_CACHE}]
    slow = [point.model_copy(update={"latency_ratio": 1.2}) if point.name == CHOSEN else point for point in points]
    assert verdict(tmp_path / "plan", slow[:2]).headline.startswith("No baseline was run at this latency")


def test_a_better_solver_is_judged_by_where_it_should_arrive(tmp_path: Path) -> None:
    found = verdict(tmp_path / "plan", points_of_the_demo())
    (sentence,) = (plain(sentence) for sentence in found.sentences if "four times the steps" in sentence)
    assert f"{SOLVER_STEPS} (better solver) is closer at no more time: 41.0 dB against 35.1 dB" in sentence


def test_estimated_times_are_called_so(tmp_path: Path) -> None:
    found = verdict(tmp_path / "plan", points_of_the_demo(), latency_source="flops")
    assert "at comparable estimated time" in found.headline
    assert "Nobody measured a latency: every time here is estimated from FLOPs." in found.sentences


def test_a_search_by_flops_has_no_milliseconds(tmp_path: Path) -> None:
    points = [point.model_copy(update={"latency_ms": None}) for point in points_of_the_demo()]
    found = verdict(tmp_path / "plan", points, latency_source="flops")
    assert any("estimated time, at 50.8" in plain(sentence) for sentence in found.sentences)


def test_one_picture_is_no_pictures(tmp_path: Path) -> None:
    found = verdict(tmp_path / "plan", points_of_the_demo(), batch_size=1)
    assert any("188 ms for 1 picture, at" in plain(sentence) for sentence in found.sentences)


@pytest.mark.parametrize(("psnr_db", "named"), [(53.0, True), (50.0, True), (49.0, False)])
def test_what_ran_in_pytorch_is_named_and_decides_nothing(tmp_path: Path, psnr_db: float, *, named: bool) -> None:
    before = verdict(tmp_path / "one", points_of_the_demo())
    peer = make_point("theirs", Kind.CACHE_DIT, 0.4, psnr_db)
    found = verdict(tmp_path / "two", [*points_of_the_demo(), peer])
    assert (found.standing, found.headline) == (before.standing, before.headline)
    words = (
        f"In PyTorch, theirs (cache-dit): 40 % of PyTorch's full run's time, {psnr_db} dB. That is a share of PyTorch"
    )
    assert any(words in plain(sentence) for sentence in found.sentences) == named


def test_a_plan_that_is_a_baseline_s_own(tmp_path: Path) -> None:
    points = [
        point.model_copy(update={"kind": Kind.SKIP_FORECAST}) if point.name == CHOSEN else point
        for point in points_of_the_demo()
    ]
    found = verdict(tmp_path / "plan", points)
    assert any("itself a baseline's (skip, forecast)" in sentence for sentence in found.sentences)


def test_a_plan_that_the_search_does_not_know(tmp_path: Path) -> None:
    points = [point for point in points_of_the_demo() if point.name != CHOSEN]
    found = verdict(tmp_path / "plan", points)  # random tokens have the plan's settings, and are another plan
    assert found.standing is Standing.UNKNOWN
    assert "not among the points" in found.headline


@pytest.mark.parametrize(
    ("psnr_db", "standing", "words"),
    [
        (49.1, Standing.AHEAD, "10.3 dB closer to the full run than fewer steps"),
        (38.2, Standing.EVEN, "Hardly different from fewer steps at the same cost (−0.6 dB)"),
        (30.0, Standing.BEHIND, "Fewer steps are 8.8 dB better at the same cost: do not use this plan."),
        (None, Standing.UNKNOWN, "not measured"),
    ],
)
def test_a_plan_without_a_search(tmp_path: Path, psnr_db: float | None, standing: Standing, words: str) -> None:
    folder = write_search(tmp_path / "plan")
    (folder / "search.json").unlink()
    change = {"measured": None} if psnr_db is None else {}
    edit(folder / PLAN, lambda plan: plan.update(change) if change else plan["measured"].update(psnr_db=psnr_db))
    found = verdict_from_source(source_from_folder(folder))
    assert found.standing is standing
    assert words in plain(found.headline)


def test_domination() -> None:
    point = make_point(FEWER, Kind.FEWER_STEPS, 0.5, 40.0)
    for ratio, psnr_db, dominated in ((0.5, 40.0, False), (0.4, 40.0, True), (0.5, 41.0, True), (0.4, 39.0, False)):
        assert dominates(make_point("x", Kind.CACHE_DIT, ratio, psnr_db), point) is dominated


@pytest.mark.parametrize(("measured_on", "is_quoted"), [("this", True), (None, True), ("0" * 64, False)])
def test_a_search_s_figures_are_of_the_very_plan_that_was_measured(
    tmp_path: Path, measured_on: str | None, is_quoted: bool
) -> None:
    known = content_sha256(load_plan(DIGITS)[0]) if measured_on == "this" else measured_on
    points = [
        point.model_copy(update={"plan_sha256": known}) if point.name == CHOSEN else point
        for point in points_of_the_demo()
    ]
    chosen = source_from_folder(write_search(tmp_path / "digits", points)).chosen
    assert (chosen is not None) == is_quoted
