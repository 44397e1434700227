"""Placed full steps: no move of one helps, nearer on unseen seeds than round-robins, the same every time."""

import itertools
from collections.abc import Callable
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from bundles import run_cli

from tc_deploy.calibrate.calibration import calibrate
from tc_deploy.calibrate.fits import Fits
from tc_deploy.calibrate.fitting import Fitter, own_runs
from tc_deploy.calibrate.placing import LOST_DB, MOVES, Placed, Placement, Scores, placed_schedule, starts_of
from tc_deploy.calibrate.recipe import Recipe, ScheduleRecipe, read_recipe
from tc_deploy.errors import UsageError
from tc_deploy.models.family import DiffusionTransformer
from tc_deploy.models.loading import load_model
from tc_deploy.models.solver import read_solver
from tc_deploy.plan import CacheRecord, load_plan
from tc_deploy.planned.prompts import draw_batch
from tc_deploy.quality.metrics import image_psnr_db
from tc_deploy.schedule import tprr
from tc_deploy.tokencache.sampler import Sampling, TokenCachedSteps, denoise
from tc_deploy.types import Attention, Reuse, Skip

STEPS, FULL_STEPS = 12, 4
CACHE = CacheRecord(
    reuse=Reuse.BRANCH, attention=Attention.ALL, forecast_order=2, keep_counts=((0,) * 3, (0,) * 3), skip=Skip.MODEL
)


def make_sampling(steps: int) -> Sampling:
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    return Sampling(scheduler=scheduler, steps=steps, guidance_scale=None, set_timesteps_kwargs={})


@pytest.fixture(scope="module")
def sampling() -> Sampling:
    return make_sampling(STEPS)


@pytest.fixture(scope="module")
def fitter(tiny_dit: DiffusionTransformer, sampling: Sampling) -> Fitter:
    return Fitter(
        tiny_dit, sampling, read_solver(sampling.scheduler, STEPS), 2, own_runs(tiny_dit, sampling, range(8)), judges=2
    )


def placement(fitter: Fitter, scores: Scores | None = None, deadline: float | None = None) -> Placement:
    few = Fitter(fitter.model, fitter.sampling, fitter.solver, fitter.order, fitter.own.first(4), judges=2)
    return Placement(
        fitter, few, pixels=False, scores={} if scores is None else scores, few_scores={}, deadline=deadline
    )


def full_of(placed: Placed) -> tuple[int, ...]:
    return tuple(step for step, variant in enumerate(placed.schedule.variants) if variant == 0)


def db_of(fitter: Fitter, full: tuple[int, ...]) -> float:
    """Of the samples that judge, from a whole run of its own."""
    latents = fitter(placed_schedule(STEPS, full)).latents[fitter.judge]
    return image_psnr_db(latents, fitter.own.latents[-1][fitter.judge], pixels=False)


# ---------------------------------------------------------------------------------------------------------- the search
def test_no_full_step_is_better_a_step_or_two_away(fitter: Fitter) -> None:
    placed = placement(fitter)(FULL_STEPS)
    best = full_of(placed)
    assert placed.finished
    assert (len(best), best[0], placed.schedule.steps) == (FULL_STEPS, 0, STEPS)
    assert placed.psnr_db == pytest.approx(db_of(fitter, best), abs=1e-3)
    for place, move in itertools.product(range(1, FULL_STEPS), MOVES):
        other = (*best[:place], best[place] + move, *best[place + 1 :])
        if list(other) == sorted(set(other)) and other[-1] < STEPS:
            assert db_of(fitter, other) <= placed.psnr_db + 1e-3


def test_it_is_among_the_best_of_all(fitter: Fitter) -> None:
    found = placement(fitter)(3).psnr_db
    every = [db_of(fitter, (0, *rest)) for rest in itertools.combinations(range(1, STEPS), 2)]
    assert len(every) == 55
    assert sum(score > found + 1e-3 for score in every) <= 3


def test_on_unseen_seeds_it_lies_nearer_than_a_round_robin_of_as_many_full_steps(
    tiny_dit: DiffusionTransformer, sampling: Sampling, tmp_path: Path
) -> None:
    fits = Fits(tiny_dit, sampling, range(16), lambda: tmp_path, lambda what, done, total: None)
    placed = fits.place(ScheduleRecipe(full_steps=FULL_STEPS), 2).schedule
    robin = tprr(steps=STEPS, phase_start=STEPS, cache_interval_early=3, cache_interval_late=1)
    assert placed.full_steps == robin.full_steps
    noise, conditions = draw_batch(tiny_dit, sampling, range(1_000_000, 1_000_012))
    own = denoise(tiny_dit, sampling, noise, conditions, lambda _, inputs: tiny_dit.forward(inputs))
    better, usual = (
        image_psnr_db(
            denoise(
                tiny_dit,
                sampling,
                noise,
                conditions,
                TokenCachedSteps(tiny_dit, CACHE, each, fits.tables(each, CACHE)),
            ),
            own,
            pixels=False,
        )
        for each in (placed, robin)
    )
    assert better > usual + 0.5


def test_the_same_samples_give_the_same_places(fitter: Fitter) -> None:
    assert full_of(placement(fitter)(FULL_STEPS)) == full_of(placement(fitter)(FULL_STEPS))


def test_what_was_tried_is_not_tried_again(fitter: Fitter) -> None:
    scores: Scores = {}
    first = placement(fitter, scores)(FULL_STEPS)
    kept, calls = dict(scores), fitter.calls
    assert full_of(placement(fitter, scores)(FULL_STEPS)) == full_of(first)
    assert fitter.calls == calls
    assert scores == kept


def test_time_that_is_over_gives_the_best_start(fitter: Fitter) -> None:
    scores: Scores = {}
    placed = placement(fitter, scores, deadline=0.0)(FULL_STEPS)
    assert not placed.finished
    assert list(scores) == [full_of(placed)]
    assert full_of(placed) in set(starts_of(FULL_STEPS, fitter.solver, fitter.order, fitter.own.first(4)))


def test_time_that_is_over_again_gives_the_best_that_was_found_before(fitter: Fitter) -> None:
    scores: Scores = {}
    best = full_of(placement(fitter, scores)(FULL_STEPS))
    assert full_of(placement(fitter, scores, deadline=0.0)(FULL_STEPS)) == best


@pytest.mark.parametrize("full_steps", range(1, STEPS))
def test_every_start_is_a_schedule_of_so_many_full_steps(fitter: Fitter, full_steps: int) -> None:
    starts = list(starts_of(full_steps, fitter.solver, fitter.order, fitter.own))
    assert starts
    for full in starts:
        assert full[0] == 0
        assert list(full) == sorted(set(full))
        assert len(full) == full_steps
        assert full[-1] < STEPS


def test_a_run_that_is_lost_is_not_taken(fitter: Fitter, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the starts comes to NaN, and the others do not."""
    scores: Scores = {}
    start = full_of(placement(fitter, scores, deadline=0.0)(FULL_STEPS))
    run = Fitter._output

    def output(self: Fitter, step: int, latents: torch.Tensor) -> torch.Tensor:
        return torch.full_like(latents, torch.nan) if step == start[-1] else run(self, step, latents)

    monkeypatch.setattr(Fitter, "_output", output)
    scores = {}
    assert start[-1] not in full_of(placement(fitter, scores)(FULL_STEPS))
    assert scores.get(start, LOST_DB) == LOST_DB


# ----------------------------------------------------------------------------------------------------------- calibrate
def settings(model: Path, **schedule: object) -> Recipe:
    return Recipe.model_validate(
        {
            "model": str(model),
            "sampling": {"num_inference_steps": 8},
            "schedule": {"full_steps": 3, **schedule},
            "forecast": {"fit_samples": 8},
            "measure": {"samples": 0},
        }
    )


def test_calibrate_goes_on_after_an_interruption_with_what_it_has(tiny_dit_folder: Path, tmp_path: Path) -> None:
    whole, seen = calibrate(settings(tiny_dit_folder), tmp_path / "whole"), list[str]()

    def interrupt(what: str, done: int, total: int) -> None:
        assert 0 <= done <= total
        if what.startswith("placing") and done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="start it again to go on"):
        calibrate(settings(tiny_dit_folder), tmp_path / "plan", interrupt)
    plan = calibrate(settings(tiny_dit_folder), tmp_path / "plan", lambda what, done, total: seen.append(what))
    assert plan.schedule == whole.schedule
    assert "sampling the model's own runs" not in seen
    np.testing.assert_array_equal(*(next(iter(load_plan(tmp_path / name)[1].values())) for name in ("plan", "whole")))
    assert not list(tmp_path.glob(".*"))


def test_the_command_line_places(tiny_dit_folder: Path, tmp_path: Path) -> None:
    words = ("--full-steps", 3, "--steps", 8, "--fit-samples", 8, "--samples", 2, "--budget", 0)
    answer = run_cli("calibrate", tiny_dit_folder, "-o", tmp_path / "plan", *words)
    assert answer.code == 0, answer.err
    assert "3 full + 5 cached steps" in answer.out
    plan, _ = load_plan(tmp_path / "plan")
    assert plan.forecast is not None
    assert plan.run_schedule().rule is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--full-steps", 0], "--full-steps"),
        (["--full-steps", 8], "must lie in 1..7, below the 8 steps of the run, found 8"),
        (["--full-steps", 3, "--cache-interval-early", 3], "exclude each other"),
        (["--full-steps", 3, "--keep-ratio", 0, 0.5], "leave out cache.keep_ratio"),
        (["--full-steps", 3, "--skip", "blocks"], "leave out cache.skip"),
        (["--full-steps", 3, "--forecast-order", 0], "leave out cache.forecast_order"),
        (["--full-steps", 3, "--fit-samples", 0], "leave out forecast.fit_samples"),
        (["--budget", 3], "say how many with full_steps"),
        (["--full-steps", 3, "--budget", -1], "--budget"),
    ],
)
def test_what_cannot_be_is_one_line(tiny_dit_folder: Path, tmp_path: Path, words: list[object], message: str) -> None:
    answer = run_cli("calibrate", tiny_dit_folder, "-o", tmp_path / "plan", "--steps", 8, *words)
    assert answer.code == 2
    assert message in answer.error
    assert not (tmp_path / "plan").exists()


def test_the_command_line_s_way_replaces_the_recipe_s(tiny_dit_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    text = f'model = "{tiny_dit_folder}"\n[schedule]\n'
    path.write_text(text + "full_steps = 3\nbudget_minutes = 1.0\n", encoding="utf-8")
    robin = read_recipe(path, {"schedule.cache_interval_late": 3}).schedule
    assert (robin.full_steps, robin.budget_minutes, robin.cache_interval_late) == (None, None, 3)
    path.write_text(text + "cache_interval_late = 3\n", encoding="utf-8")
    placed = read_recipe(path, {"schedule.full_steps": 5}).schedule
    assert placed.model_fields_set == {"full_steps"}


def test_a_model_whose_run_is_lost_says_so(save_dit: Callable[..., Path], tmp_path: Path) -> None:
    model = load_model(save_dit(tmp_path / "dit"))
    with torch.no_grad():
        model.module.proj_out_2.bias[0] = torch.nan
    fits = Fits(model, make_sampling(6), range(8), lambda: tmp_path, lambda what, done, total: None)
    with pytest.raises(Exception, match="the model's own run is not finite from step 0 on"):
        fits.place(ScheduleRecipe(full_steps=2), 1)


def test_a_number_that_leaves_no_choice_is_refused(fitter: Fitter) -> None:
    for number in (0, STEPS, STEPS + 1):
        with pytest.raises(UsageError, match=f"must lie in 1..{STEPS - 1}"):
            placement(fitter)(number)
