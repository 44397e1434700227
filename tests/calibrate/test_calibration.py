"""Calibration end to end: the same bytes every time, killed or not, and every mistake refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest

from tc_deploy.calibrate.calibration import calibrate
from tc_deploy.calibrate.recipe import Recipe
from tc_deploy.calibrate.training import SAVE_EVERY
from tc_deploy.errors import ExportError, ModelError, StorageError, TcDeployError, UsageError
from tc_deploy.models.family import DiffusionTransformer
from tc_deploy.plan import PLAN, TABLES, load_plan
from tc_deploy.quality.metrics import LARGEST_PSNR_DB

STEPS, BLOCKS, TOKENS = 7, 3, 16
ITERATIONS = SAVE_EVERY + 4
SAMPLING, TRAINING = "sampling trajectories", "training the Cache Predictor"
SETTINGS: dict[str, Any] = {
    "seed": 3,
    "sampling": {"num_inference_steps": STEPS},
    "schedule": {"phase_start": 4, "cache_interval_early": 2, "cache_interval_late": 3},
    "cache": {"keep_ratio": [0.25, 0.5], "multiple": 4},
    "predictor": {"iterations": ITERATIONS, "batch_size": 2},
    "measure": {"samples": 2},
}
MANUAL: dict[str, Any] = {"cache": {"keep_counts": [[0, 5, 16], [8]]}, "measure": {"samples": 0}}


def make_recipe(model: Path, *changes: dict[str, Any]) -> Recipe:
    values: dict[str, Any] = {"model": str(model), **SETTINGS}
    for change in changes:
        for key, value in change.items():
            values[key] = values[key] | value if isinstance(value, dict) else value
    if "keep_counts" in values["cache"]:
        values["cache"] = {key: value for key, value in values["cache"].items() if key != "keep_ratio"}
    return Recipe.model_validate(values)


class Reports:
    """Notes what calibration reports; raises KeyboardInterrupt at one of its reports."""

    def __init__(self, kill_at: tuple[str, int] | None = None) -> None:
        self.kill_at = kill_at
        self.seen: list[tuple[str, int]] = []

    def __call__(self, what: str, done: int, total: int) -> None:
        assert 0 <= done <= total
        self.seen.append((what, done))
        if (what, done) == self.kill_at:
            raise KeyboardInterrupt

    def counts(self, what: str) -> list[int]:
        return [done for seen, done in self.seen if seen == what]


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="module")
def finished(tiny_dit_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Reports]:
    """A plan made without interruption, and what was reported on the way."""
    destination, reports = tmp_path_factory.mktemp("calibration") / "plan", Reports()
    calibrate(make_recipe(tiny_dit_folder), destination, reports)
    return destination, reports


# ------------------------------------------------------------------------------------------------------------- the plan
def test_a_plan_says_what_was_asked_for(
    finished: tuple[Path, Reports], tiny_dit: DiffusionTransformer, tiny_dit_folder: Path
) -> None:
    plan, tables = load_plan(finished[0])
    assert plan.model == tiny_dit.record()
    assert plan.run_schedule().line() == "F c1 F c1 | F c2 c2"
    assert plan.sampling.scheduler_class == "DDIMScheduler"
    assert plan.sampling.scheduler_config["clip_sample"] is False
    assert not any(key.startswith("_") for key in plan.sampling.scheduler_config)
    scheduler = diffusers.DDIMScheduler.from_pretrained(tiny_dit_folder / "scheduler")
    scheduler.set_timesteps(STEPS)
    assert plan.sampling.timesteps == tuple(scheduler.timesteps.tolist())
    assert (plan.origin.method, plan.origin.seed) == ("predictor", 3)
    assert plan.origin.settings["predictor"]["iterations"] == ITERATIONS
    assert plan.measured is not None
    assert 0 < plan.measured.psnr_db < LARGEST_PSNR_DB
    assert set(tables) == {"token_index_1", "token_index_2", "importance_1", "importance_2"}
    assert tables["importance_1"].shape == (BLOCKS, TOKENS)


def test_the_keep_ratio_is_the_budget(finished: tuple[Path, Reports]) -> None:
    plan, tables = load_plan(finished[0])
    for phase, ratio, steps in ((1, 0.25, 2), (2, 0.5, 2)):
        counts, budget = plan.keep_counts(phase), ratio * BLOCKS * TOKENS
        assert budget - 4 < sum(counts) <= budget
        assert all(count % 4 == 0 for count in counts)
        assert tables[f"token_index_{phase}"].shape == (steps, sum(count for count in counts if count < TOKENS))


def test_tokens_and_blocks_are_chosen_by_importance(finished: tuple[Path, Reports]) -> None:
    plan, tables = load_plan(finished[0])
    importance = tables["importance_2"].mean(axis=1)
    by_importance = [plan.keep_counts(2)[block] for block in np.argsort(-importance)]
    assert by_importance == sorted(by_importance, reverse=True)


def test_progress_is_reported_to_the_end(finished: tuple[Path, Reports]) -> None:
    _, reports = finished
    assert reports.counts(SAMPLING) == list(range(1, STEPS + 1))
    assert reports.counts(TRAINING) == list(range(ITERATIONS + 1))
    assert reports.seen[-1] == ("measuring against the full run", 0)


# ----------------------------------------------------------------------------------------------------------- same bytes
def test_the_same_recipe_gives_the_same_bytes(
    finished: tuple[Path, Reports], tiny_dit_folder: Path, tmp_path: Path
) -> None:
    calibrate(make_recipe(tiny_dit_folder), tmp_path / "plan")
    assert bytes_of(tmp_path / "plan") == bytes_of(finished[0])
    assert set(bytes_of(finished[0])) == {PLAN, TABLES}
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan"]


def test_another_seed_gives_other_tables(finished: tuple[Path, Reports], tiny_dit_folder: Path, tmp_path: Path) -> None:
    calibrate(make_recipe(tiny_dit_folder, {"seed": 4}), tmp_path / "plan")
    assert bytes_of(tmp_path / "plan")[TABLES] != bytes_of(finished[0])[TABLES]


@pytest.mark.parametrize(
    ("kill_at", "sampled_again", "trained_from"),
    [
        ((SAMPLING, 3), True, 0),
        ((TRAINING, 0), False, 0),
        ((TRAINING, SAVE_EVERY - 1), False, 0),
        ((TRAINING, SAVE_EVERY + 2), False, SAVE_EVERY),
        (("measuring against the full run", 0), False, ITERATIONS),
    ],
    ids=str,
)
def test_a_killed_run_goes_on_where_it_stood(
    finished: tuple[Path, Reports],
    tiny_dit_folder: Path,
    tmp_path: Path,
    kill_at: tuple[str, int],
    sampled_again: bool,
    trained_from: int,
) -> None:
    recipe, destination = make_recipe(tiny_dit_folder), tmp_path / "plan"
    with pytest.raises(KeyboardInterrupt):
        calibrate(recipe, destination, Reports(kill_at))
    assert not destination.exists()
    again = Reports()
    calibrate(recipe, destination, again)
    assert bytes_of(destination) == bytes_of(finished[0])
    assert bool(again.counts(SAMPLING)) == sampled_again
    assert again.counts(TRAINING) == list(range(trained_from, ITERATIONS + 1))
    assert [entry.name for entry in tmp_path.iterdir()] == ["plan"]


def test_a_damaged_state_is_made_again(finished: tuple[Path, Reports], tiny_dit_folder: Path, tmp_path: Path) -> None:
    recipe, destination = make_recipe(tiny_dit_folder), tmp_path / "plan"
    with pytest.raises(KeyboardInterrupt):
        calibrate(recipe, destination, Reports((TRAINING, SAVE_EVERY)))
    states = sorted(tmp_path.rglob("*.safetensors"))
    assert [state.name for state in states] == ["predictor.safetensors", "trajectories.safetensors"]
    for state in states:
        state.write_bytes(state.read_bytes()[:-5])
    again = Reports()
    calibrate(recipe, destination, again)
    assert again.counts(SAMPLING)
    assert again.counts(TRAINING)[0] == 0
    assert bytes_of(destination) == bytes_of(finished[0])


@pytest.mark.parametrize("change", ["recipe", "scheduler", "weights"])
def test_the_state_of_another_calibration_is_not_continued(
    save_dit: Callable[..., Path], tmp_path: Path, change: str
) -> None:
    model, destination = save_dit(tmp_path / "model"), tmp_path / "plan"
    recipe = make_recipe(model)
    with pytest.raises(KeyboardInterrupt):
        calibrate(recipe, destination, Reports((TRAINING, SAVE_EVERY)))
    if change == "recipe":
        recipe = make_recipe(model, {"sampling": {"guidance_scale": 2.0}})
    elif change == "scheduler":
        path = model / "scheduler" / "scheduler_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"beta_end": 0.01}))
    else:
        shutil.rmtree(model)
        save_dit(model, seed=1)
    again = Reports()
    calibrate(recipe, destination, again)
    assert again.counts(SAMPLING)
    assert again.counts(TRAINING)[0] == 0
    calibrate(recipe, tmp_path / "fresh")
    assert bytes_of(destination) == bytes_of(tmp_path / "fresh")


def test_a_plan_that_exists_is_replaced(tiny_dit_folder: Path, tmp_path: Path) -> None:
    calibrate(make_recipe(tiny_dit_folder, MANUAL), tmp_path / "plan")
    calibrate(make_recipe(tiny_dit_folder, MANUAL, {"schedule": {"cache_interval_early": 4}}), tmp_path / "plan")
    assert load_plan(tmp_path / "plan")[0].schedule.cache_interval_early == 4


# ----------------------------------------------------------------------------------------------------- without training
def test_keep_counts_by_hand_train_nothing(tiny_dit_folder: Path, tmp_path: Path) -> None:
    reports = Reports()
    plan = calibrate(make_recipe(tiny_dit_folder, MANUAL), tmp_path / "plan", reports)
    assert not reports.counts(SAMPLING)
    assert not reports.counts(TRAINING)
    assert plan.origin.method == "manual"
    assert plan.measured is None
    assert plan.cache.keep_counts == ((0, 5, 16), (8, 8, 8))
    stored, tables = load_plan(tmp_path / "plan")
    assert stored == plan
    assert set(tables) == {"token_index_1", "token_index_2"}
    assert tables["token_index_1"].shape == (2, 5)
    assert tables["token_index_2"].shape == (2, 24)
    # Neighbouring steps compute different tokens, so that none grows old.
    assert (tables["token_index_2"][0] != tables["token_index_2"][1]).any()


@pytest.mark.parametrize(
    ("keep_ratio", "expected"),
    [([0.0, 0.0], ((0,) * BLOCKS,) * 2), ([0.0, 1.0], ((0,) * BLOCKS, (TOKENS,) * BLOCKS))],
    ids=str,
)
def test_ratios_that_leave_nothing_to_choose_train_nothing(
    tiny_dit_folder: Path, tmp_path: Path, keep_ratio: list[float], expected: tuple[tuple[int, ...], ...]
) -> None:
    reports = Reports()
    plan = calibrate(
        make_recipe(tiny_dit_folder, {"cache": {"keep_ratio": keep_ratio}, "measure": {"samples": 0}}),
        tmp_path / "plan",
        reports,
    )
    assert not reports.counts(TRAINING)
    assert plan.cache.keep_counts == expected
    assert load_plan(tmp_path / "plan")[1] == {}


@pytest.mark.parametrize(
    "change",
    [
        {"schedule": {"cache_interval_early": 1, "cache_interval_late": 1}, "cache": {"keep_counts": [[0], [0]]}},
        {"cache": {"keep_counts": [[TOKENS], [TOKENS]]}},
    ],
    ids=["full steps only", "all tokens kept"],
)
def test_a_plan_that_saves_nothing_loses_nothing(tiny_dit_folder: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    plan = calibrate(make_recipe(tiny_dit_folder, change), tmp_path / "plan")
    assert plan.cost_ratio() == 1
    assert plan.measured is not None
    assert plan.measured.psnr_db == LARGEST_PSNR_DB
    assert plan.measured.fewer_steps == STEPS


def test_the_boundary_is_half_of_the_steps_unless_given(tiny_dit_folder: Path, tmp_path: Path) -> None:
    plan = calibrate(make_recipe(tiny_dit_folder, MANUAL, {"schedule": {"phase_start": None}}), tmp_path / "plan")
    assert plan.schedule.phase_start == round(STEPS / 2)


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.EulerDiscreteScheduler(),
        diffusers.DPMSolverMultistepScheduler(),
        diffusers.FlowMatchEulerDiscreteScheduler(),
        diffusers.UniPCMultistepScheduler(),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_any_sampler_without_noise_of_its_own_will_do(
    save_dit: Callable[..., Path], tmp_path: Path, scheduler: Any
) -> None:
    model = save_dit(tmp_path / "model")
    scheduler.save_pretrained(model / "scheduler")
    calibrate(make_recipe(model, MANUAL, {"measure": {"samples": 1}}), tmp_path / "plan")
    plan, _ = load_plan(tmp_path / "plan")
    assert plan.sampling.scheduler_class == type(scheduler).__name__
    rebuilt = type(scheduler).from_config(plan.sampling.scheduler_config)
    rebuilt.set_timesteps(STEPS)
    assert plan.sampling.timesteps == tuple(float(timestep) for timestep in rebuilt.timesteps)


# ------------------------------------------------------------------------------------------------------------- mistakes
@pytest.mark.parametrize(
    ("change", "kind", "parts"),
    [
        ({"schedule": {"phase_start": STEPS + 1}}, UsageError, ["schedule.phase_start", "must lie in 0..7", "found 8"]),
        (
            {"cache": {"keep_counts": [[0, 0], [0]]}},
            UsageError,
            ["cache.keep_counts", "phase 1", "found 2"],
        ),
        ({"cache": {"keep_counts": [[0], [0, 0, 0, 0]]}}, UsageError, ["phase 2", "3 blocks", "found 4"]),
        ({"cache": {"keep_counts": [[0], [17]]}}, UsageError, ["phase 2", "block 0", "0..16", "found 17"]),
        ({"cache": {"keep_counts": [[], [0]]}}, UsageError, ["phase 1", "found 0"]),
        (
            {"sampling": {"num_inference_steps": 1001}},
            UsageError,
            ["DDIMScheduler takes at most 1000 steps", "found 1001"],
        ),
        ({"sampling": {"set_timesteps_kwargs": {"mu": 1.0}}}, ExportError, ["DDIMScheduler", "mu"]),
        ({"model": "nowhere"}, ModelError, ["nowhere", "no such folder"]),
    ],
    ids=str,
)
def test_a_recipe_that_does_not_fit(
    tiny_dit_folder: Path, tmp_path: Path, change: dict[str, Any], kind: type[TcDeployError], parts: list[str]
) -> None:
    with pytest.raises(kind) as raised:
        calibrate(make_recipe(tiny_dit_folder, change), tmp_path / "plan")
    for part in parts:
        assert part in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("scheduler", "reason"),
    [
        (diffusers.DDPMScheduler(), "different seeds differ"),
        (diffusers.EulerAncestralDiscreteScheduler(), "different seeds differ"),
        (diffusers.HeunDiscreteScheduler(), "one model call per step"),
        (diffusers.DDIMScheduler(clip_sample=True), "clip_sample"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_sampler_that_no_plan_can_be_made_for(
    save_dit: Callable[..., Path], tmp_path: Path, scheduler: Any, reason: str
) -> None:
    model = save_dit(tmp_path / "model")
    scheduler.save_pretrained(model / "scheduler")
    with pytest.raises(ExportError, match=f"{type(scheduler).__name__}.*{reason}"):
        calibrate(make_recipe(model, MANUAL), tmp_path / "plan")


@pytest.mark.parametrize("change", [{}, MANUAL], ids=["trained", "by hand"])
def test_an_output_that_cannot_be_written(tiny_dit_folder: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StorageError, match="cannot be"):
        calibrate(make_recipe(tiny_dit_folder, change), tmp_path / "file" / "plan")
    assert (tmp_path / "file").read_text() == "mine"


def test_an_output_that_is_something_else_is_left_alone(tiny_dit_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "plan").mkdir()
    (tmp_path / "plan" / "letter.txt").write_text("mine")
    with pytest.raises(StorageError, match=r"holds no plan\.json"):
        calibrate(make_recipe(tiny_dit_folder, MANUAL), tmp_path / "plan")
    assert (tmp_path / "plan" / "letter.txt").read_text() == "mine"
