"""A whole search on a tiny model: real engines, real timing, every baseline; what it writes, and how it goes on."""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.numpy
from bundles import Answer, SaveDit, run_cli, snapshot

from tc_deploy.calibrate.recipe import read_recipe
from tc_deploy.errors import PlanError, UsageError
from tc_deploy.export.bundle_export import export_bundle
from tc_deploy.export.options import ExportOptions
from tc_deploy.plan import PLAN, SAMPLES, SEARCH, load_plan
from tc_deploy.search.choose import POINTS, Wish, chosen_point
from tc_deploy.search.peer import why_no_peer
from tc_deploy.search.plan_search import search_plan
from tc_deploy.search.record import FULL_POINT, Kind, SearchRecord, read_search

STEPS = 6
RECIPE = """
model = "{model}"

[sampling]
num_inference_steps = 6
guidance_scale = 1.5

[cache]
multiple = 4

[forecast]
fit_samples = 8

[predictor]
trajectories = 2
iterations = 2
batch_size = 2

[search]
full_steps = [0.34, 0.5]
keep_ratio = [0.0]
confirmation_samples = 2
baselines = "all"
latency_rounds = 2
"""


@dataclass(frozen=True, kw_only=True)
class Searched:
    """A search's recipe, its folder and what the command said."""

    recipe: Path
    folder: Path
    answer: Answer

    @property
    def record(self) -> SearchRecord:
        return read_search(self.folder)


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory, save_dit: SaveDit) -> Searched:
    """Latency by FLOPs, so that nothing depends on the machine's mood; one block and one order, for few exports."""
    folder = tmp_path_factory.mktemp("search")
    model = save_dit(folder / "model", num_layers=1)
    recipe = folder / "recipe.toml"
    recipe.write_text(RECIPE.format(model=model), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tc_deploy.search.baselines.TAYLOR_ORDERS", (2,))
        answer = run_cli("plan", recipe, "-o", folder / "plan", "--pareto", "--from-flops", "--target-psnr", 0)
    assert answer.code == 0, answer.err
    return Searched(recipe=recipe, folder=folder / "plan", answer=answer)


def test_every_baseline_runs_beside_our_points(searched: Searched) -> None:
    record = searched.record
    assert record.points[0].name == FULL_POINT
    assert record.points[0].quality.psnr_db == 140.0
    kinds = {point.kind for point in record.points}
    assert kinds >= set(Kind) - {Kind.CACHE_DIT, Kind.RANDOM_TOKENS, Kind.UNIFORM_BLOCKS}
    assert (Kind.CACHE_DIT in kinds) == (why_no_peer() is None)
    names = [point.name for point in record.points]
    assert len(set(names)) == len(names)
    ours = [point for point in record.points if point.kind is Kind.TOKEN_CACHE]
    assert [point.steps_full for point in ours] == [2, 3]
    for point in record.points:
        steps = point.settings.schedule.steps if point.settings else STEPS
        assert point.steps_full + point.steps_cached == steps
        same_steps = point.settings is not None and steps == STEPS
        assert (point.drift is None) != same_steps
        assert f": {point.name}" in searched.answer.out


def test_points_that_keep_no_token_are_fitted_and_what_they_are_compared_with_is_not(searched: Searched) -> None:
    for point in searched.record.points:
        if point.settings is not None:
            slug = re.sub(r"[^a-z0-9.]+", "-", point.name.lower()).strip("-")
            plan, _ = load_plan(searched.folder / POINTS / slug)
            fitted = point.kind is Kind.TOKEN_CACHE or point.name.startswith("fitted solver")
            assert (plan.forecast is not None) == fitted == ("fitted" in point.name)
            assert plan.forecast is None or (plan.forecast.first_seed, plan.forecast.samples) == (0, 8)
    assert any("fitted" in point.name for point in searched.record.points)


def test_a_fitted_solver_calls_the_model_as_often_as_ours_and_evenly(searched: Searched) -> None:
    fitted = {point.name: point for point in searched.record.points if point.name.startswith("fitted solver")}
    assert sorted(fitted) == ["fitted solver, 2 calls", "fitted solver, 3 calls"]
    found = [point.settings.schedule.schedule().variants for _, point in sorted(fitted.items()) if point.settings]
    assert found == [(0, 1, 1, 0, 1, 1), (0, 1, 0, 1, 0, 1)]
    assert {point.kind for point in fitted.values()} == {Kind.BETTER_SOLVER}


def test_latency_by_flops_says_so_and_is_the_cost(searched: Searched) -> None:
    record = searched.record
    assert record.latency_source == "flops"
    assert "latency by FLOPs" in searched.answer.out
    for point in record.points:
        assert point.latency_ms is None
        assert point.latency_ratio == pytest.approx(point.cost_in_full_steps / STEPS, abs=1e-3)
    plan, _ = load_plan(searched.folder)
    assert plan.origin.settings.get("latency", "flops") == "flops"


def test_every_points_plan_and_samples_are_kept(searched: Searched) -> None:
    record = searched.record
    samples = safetensors.numpy.load_file(searched.folder / SAMPLES)
    assert set(samples) == {point.name for point in record.points}
    assert all(array.shape == (2, 4, 8, 8) for array in samples.values())
    folders = sorted((searched.folder / POINTS).iterdir())
    assert len(folders) == sum(point.settings is not None for point in record.points)
    schedules = [load_plan(folder)[0].schedule for folder in folders]
    assert {schedule.steps for schedule in schedules} >= {STEPS, 3}
    assert not list(searched.folder.parent.glob(".plan.*"))


def test_another_point_is_chosen_without_searching(searched: Searched, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(searched.folder, tmp_path / "plan"))
    best = max(
        (point for point in searched.record.points if point.on_front and point.name != FULL_POINT),
        key=lambda point: point.quality.psnr_db,
    )
    answer = run_cli("plan", folder, "--target-psnr", best.quality.psnr_db - 1e-6)
    assert answer.code == 0, answer.err
    assert answer.out.splitlines()[-1] == f"{folder}: {best.kind}: {best.name}"
    assert best.settings is not None
    plan, _ = load_plan(folder)
    assert (plan.schedule, plan.cache) == (best.settings.schedule, best.settings.cache)
    before, after = snapshot(searched.folder), snapshot(folder)
    assert {name for name in before if before[name] != after[name]} <= {PLAN, "tables.safetensors"}


@pytest.mark.slow
def test_a_plan_that_keeps_tokens_is_compared_with_as_many_random_ones(tiny_dit_folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.format(model=tiny_dit_folder).replace("[0.0]", "[0.5]"), encoding="utf-8")
    answer = run_cli(
        *("plan", recipe, "-o", tmp_path / "plan", "--from-flops", "--target-psnr", 0, "--baselines", "static"),
        "--json",
    )
    assert answer.code == 0, answer.err
    record = SearchRecord.model_validate_json(answer.out)
    (ours,) = (point for point in record.points if point.kind is Kind.TOKEN_CACHE and "keep" in point.name)
    (random,) = (point for point in record.points if point.kind is Kind.RANDOM_TOKENS)
    assert random.name == f"{ours.name}, random tokens"
    assert random.cost_in_full_steps == ours.cost_in_full_steps
    assert random.settings == ours.settings
    assert random.plan_sha256 != ours.plan_sha256
    assert random.quality.psnr_db != ours.quality.psnr_db  # the same engines run by each plan's own tables
    assert any(ours.name in remark for remark in record.remarks)


@pytest.mark.slow
def test_time_that_is_over_leaves_out_baselines_and_nothing_of_ours(searched: Searched, tmp_path: Path) -> None:
    answer = run_cli(
        *("plan", searched.recipe, "-o", tmp_path / "plan", "--from-flops", "--target-psnr", 0),
        *("--budget", 0, "--baselines", "static"),
    )
    assert answer.code == 0, answer.err
    record = read_search(tmp_path / "plan")
    assert {point.kind for point in record.points} == {Kind.FULL, Kind.TOKEN_CACHE}
    assert any("The time was over before" in remark and "3 steps" in remark for remark in record.remarks)


@pytest.mark.slow
def test_a_search_goes_on_where_it_was_killed_and_ends_in_the_same_bytes(
    searched: Searched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = read_recipe(searched.recipe, {})
    destination = tmp_path / "plan"
    monkeypatch.setattr("tc_deploy.search.baselines.TAYLOR_ORDERS", (2,))
    exported: list[str] = []

    def export(folder: Path, bundle: Path, options: ExportOptions, *more: Any) -> Any:
        exported.append(bundle.name)
        return export_bundle(folder, bundle, options, *more)

    def interrupted(what: str, done: int, total: int) -> None:
        if what.startswith("making pictures with") and done == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr("tc_deploy.search.built_points.export_bundle", export)
    with pytest.raises(KeyboardInterrupt):
        search_plan(recipe, destination, Wish(target_psnr_db=0), from_flops=True, report=interrupted)
    assert not destination.exists()
    before = exported.copy()
    search_plan(recipe, destination, Wish(target_psnr_db=0), from_flops=True)
    assert len(before) >= 2
    assert len(exported) > len(before)
    assert len(set(exported)) == len(exported)  # nothing that was made is made again
    mine, theirs = snapshot(destination), snapshot(searched.folder)
    for files in (mine, theirs):
        document = json.loads(files.pop(SEARCH))
        document.pop("date")
        files["document"] = json.dumps(document, sort_keys=True).encode()
    assert mine == theirs


def test_without_a_wish_a_search_is_shown_and_left_as_it_is(searched: Searched) -> None:
    before = snapshot(searched.folder)
    answer = run_cli("plan", searched.folder, "--pareto")
    assert answer.code == 0, answer.err
    assert answer.out == searched.answer.out
    assert snapshot(searched.folder) == before
    refused = run_cli("plan", searched.folder, "--seed", 1)
    assert refused.code == UsageError.exit_code
    assert "is a finished search" in refused.error


def test_a_wish_that_nothing_fulfils_names_what_there_is(searched: Searched, tmp_path: Path) -> None:
    before = snapshot(searched.folder)
    answer = run_cli("plan", searched.folder, "--target-psnr", 200)
    assert answer.code == UsageError.exit_code
    assert "no plan fulfils it: the fastest takes 0." in answer.error
    assert snapshot(searched.folder) == before


def test_what_is_chosen_is_beaten_by_no_plan(searched: Searched) -> None:
    record = searched.record
    for wish in (Wish(target_psnr_db=0), Wish(target_psnr_db=15), Wish()):
        try:
            chosen = chosen_point(record, wish)
        except UsageError:
            continue
        assert all(
            other.quality.psnr_db <= chosen.quality.psnr_db or other.latency_ratio > chosen.latency_ratio
            for other in record.points
            if other.settings is not None and other != chosen
        )


@pytest.mark.slow
def test_latencies_are_measured_on_engines(tiny_dit_folder: Path, tmp_path: Path) -> None:
    """Without tokens and baselines, to be quick; every point runs in turn with the full run."""
    recipe = tmp_path / "recipe.toml"
    text = RECIPE.format(model=tiny_dit_folder).replace('"all"', '"none"')
    recipe.write_text(text, encoding="utf-8")
    answer = run_cli("plan", recipe, "-o", tmp_path / "plan", "--max-latency-ms", 1e6, "--json")
    assert answer.code == 0, answer.err
    record = SearchRecord.model_validate_json(answer.out)
    assert record.latency_source == "measured"
    assert {point.kind for point in record.points} == {Kind.FULL, Kind.TOKEN_CACHE}
    assert all((point.latency_ms is None) == (point.settings is None) for point in record.points)
    assert "No plan that keeps tokens was built." in record.remarks


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--target-psnr", 30, "--max-latency-ms", 5), "exclude each other"),
        (("-o", "x", "--from-flops", "--max-latency-ms", 5), "needs measured latencies"),
        ((), "missing option -o"),
        (("-o", "x", "--backend", "nonsense"), "unknown backend 'nonsense'"),
        (("-o", "x", "--budget", -1), "--budget"),
        (("-o", "x", "--baselines", "some"), "--baselines"),
    ],
)
def test_bad_arguments(searched: Searched, tmp_path: Path, words: tuple[object, ...], said: str) -> None:
    words = tuple(tmp_path / word if word == "x" else word for word in words)
    answer = run_cli("plan", searched.recipe, *words)
    assert answer.code == UsageError.exit_code
    assert said in answer.error
    assert not list(tmp_path.iterdir())


def test_too_few_steps_are_refused_before_any_work(searched: Searched, tmp_path: Path) -> None:
    answer = run_cli("plan", searched.recipe, "-o", tmp_path / "plan", "--steps", 1)
    assert answer.code == PlanError.exit_code
    assert "expected 2 steps or more, a full and a cached one, found 1" in answer.error
    assert not list(tmp_path.iterdir())


def test_a_finished_search_is_not_searched_again_into_another_folder(searched: Searched, tmp_path: Path) -> None:
    answer = run_cli("plan", searched.folder, "-o", tmp_path / "other")
    assert answer.code == UsageError.exit_code
    assert "is a finished search" in answer.error


def test_a_classifier_of_other_pictures_is_refused_before_any_work(searched: Searched, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    classifier = Path(__file__).parents[2] / "examples" / "digits-classifier.onnx"
    recipe.write_text(searched.recipe.read_text() + f'\n[quality]\nclassifier = "{classifier}"\n', encoding="utf-8")
    answer = run_cli("plan", recipe, "-o", tmp_path / "plan")
    assert answer.code == 3
    assert "the classifier reads images (1, 16, 16), the model makes (4, 8, 8)" in answer.error
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.toml"]
