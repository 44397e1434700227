"""Recipes: TOML, overrides, defaults, and what every kind of mistake is told."""

from pathlib import Path
from typing import Any

import pytest

from tc_deploy.calibrate.measure import FIRST_SEED
from tc_deploy.calibrate.recipe import MAX_SEED, Recipe, read_recipe
from tc_deploy.errors import UsageError
from tc_deploy.search.candidates import full_step_counts
from tc_deploy.types import Attention, Reuse

RECIPES = Path(__file__).parents[2] / "calibration" / "recipes"
TOML = """
model = "../models/dit"
seed = 7

[sampling]
num_inference_steps = 20
guidance_scale = 2.5
set_timesteps_kwargs = {mu = 1.15}

[schedule]
phase_start = 8
cache_interval_early = 4
cache_interval_late = 2

[cache]
keep_ratio = [0.0, 0.25]
multiple = 16
reuse = "residual"
attention = "kept"
forecast_order = 2

[predictor]
iterations = 30

[measure]
samples = 4
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return path


def error_of(path: Path, overrides: dict[str, Any], *parts: str) -> None:
    with pytest.raises(UsageError) as raised:
        read_recipe(path, overrides)
    message = str(raised.value)
    assert "\n" not in message
    assert message.startswith(
        tuple(f"--{key.rpartition('.')[2].replace('_', '-')}: " for key in overrides) or f"{path}: "
    )
    for part in parts:
        assert part in message


def test_every_key_is_read(tmp_path: Path) -> None:
    recipe = read_recipe(write(tmp_path, TOML), {})
    assert recipe.seed == 7
    assert (recipe.sampling.num_inference_steps, recipe.sampling.guidance_scale) == (20, 2.5)
    assert recipe.sampling.set_timesteps_kwargs == {"mu": 1.15}
    assert (recipe.schedule.phase_start, recipe.schedule.cache_interval_early, recipe.schedule.cache_interval_late) == (
        8,
        4,
        2,
    )
    assert recipe.cache.keep_ratio == (0.0, 0.25)
    assert recipe.cache.multiple == 16
    assert (recipe.cache.reuse, recipe.cache.attention) == (Reuse.RESIDUAL, Attention.KEPT)
    assert recipe.cache.forecast_order == 2
    assert recipe.cache.keep_counts is None
    assert recipe.predictor.iterations == 30
    assert recipe.predictor.batch_size == Recipe(model="").predictor.batch_size
    assert recipe.measure.samples == 4


def test_a_models_path_is_relative_to_the_recipe_and_not_to_the_caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "calibration" / "recipes"
    folder.mkdir(parents=True)
    path = write(folder, 'model = "../../models/dit"')
    monkeypatch.chdir(tmp_path)
    for given in (path, path.relative_to(tmp_path)):
        # What is not there must not read like a hub's id, owner/name.
        assert read_recipe(given, {}).model == str(tmp_path / "models" / "dit")
    (tmp_path / "models" / "dit").mkdir(parents=True)
    for given in (path, path.relative_to(tmp_path)):
        assert read_recipe(given, {}).model == "models/dit"
    monkeypatch.chdir(folder)
    assert read_recipe(path, {}).model == str(tmp_path / "models" / "dit")


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_recipes_are_read_and_their_search_has_candidates(path: Path) -> None:
    recipe = read_recipe(path, {})
    assert full_step_counts(recipe.search.full_steps, recipe.sampling.num_inference_steps)
    # One whose checkpoint is not shipped says so, and where to put it.
    assert Path(recipe.model).exists() or "Needs your own checkpoint" in path.read_text(encoding="utf-8")


def test_a_classifiers_path_is_relative_to_the_recipe(tmp_path: Path) -> None:
    path = write(tmp_path, 'model = "m"\n[quality]\nclassifier = "c.onnx"')
    assert read_recipe(path, {}).quality.classifier == str(tmp_path / "c.onnx")


def test_an_empty_list_leaves_nothing_to_search(tmp_path: Path) -> None:
    error_of(
        write(tmp_path, 'model = "m"\n[search]\nfull_steps = []'),
        {},
        "search",
        "full_steps must list at least one value",
    )


def test_an_absolute_path_stays_as_it_is(tmp_path: Path) -> None:
    assert read_recipe(write(tmp_path, 'model = "/models/dit"'), {}).model == "/models/dit"


def test_a_model_folder_is_a_recipe_of_defaults() -> None:
    assert read_recipe(Path("models/dit"), {}) == Recipe(model="models/dit")


def test_overrides_win_and_none_is_passed_over(tmp_path: Path) -> None:
    overrides = {
        "schedule.cache_interval_early": 6,
        "schedule.cache_interval_late": None,
        "predictor.learning_rate": 0.5,
        "seed": 1,
        "sampling.num_inference_steps": None,
    }
    recipe = read_recipe(write(tmp_path, TOML), overrides)
    assert (recipe.schedule.cache_interval_early, recipe.schedule.cache_interval_late, recipe.schedule.phase_start) == (
        6,
        2,
        8,
    )
    assert (recipe.predictor.learning_rate, recipe.predictor.iterations) == (0.5, 30)
    assert (recipe.seed, recipe.sampling.num_inference_steps) == (1, 20)


def test_overrides_make_the_tables_that_a_model_folder_lacks() -> None:
    recipe = read_recipe(Path("models/dit"), {"cache.keep_counts": [[0], [4, 8]], "cache.reuse": "residual"})
    assert recipe.cache.keep_counts == ((0,), (4, 8))
    assert recipe.cache.reuse is Reuse.RESIDUAL


def test_a_missing_recipe(tmp_path: Path) -> None:
    error_of(tmp_path / "nothing.toml", {}, "no such recipe")


def test_a_folder_named_like_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "folder.toml").mkdir()
    error_of(tmp_path / "folder.toml", {}, "not a TOML file")


@pytest.mark.parametrize("text", ["model = ", "[sampling", "model = 'a'\nmodel = 'b'"])
def test_what_is_no_toml(tmp_path: Path, text: str) -> None:
    error_of(write(tmp_path, text), {}, "not a TOML file")


def test_what_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_bytes(b"\xff\xfe\x00")
    error_of(path, {}, "not a TOML file")


def test_a_recipe_without_a_model(tmp_path: Path) -> None:
    error_of(write(tmp_path, "seed = 1"), {}, "model", "required")


@pytest.mark.parametrize(
    "key", ["modle", "sampling.step", "schedule.k3", "cache.keep", "predictor.lr", "measure.seeds"]
)
def test_an_unknown_key(tmp_path: Path, key: str) -> None:
    error_of(write(tmp_path, TOML), {key: 3}, "unknown key; known here: ")


def test_an_unknown_table(tmp_path: Path) -> None:
    error_of(write(tmp_path, TOML + "[training]\nsteps = 3\n"), {}, "training: ")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", -1),
        ("seed", MAX_SEED + 1),
        ("seed", 1.5),
        ("sampling.num_inference_steps", 0),
        ("sampling.num_inference_steps", "many"),
        ("sampling.guidance_scale", float("inf")),
        ("sampling.guidance_scale", -0.5),
        ("schedule.phase_start", -1),
        ("schedule.cache_interval_early", 0),
        ("schedule.cache_interval_late", -2),
        ("cache.keep_ratio", [0.5]),
        ("cache.keep_ratio", [0.0, 1.01]),
        ("cache.keep_ratio", [-0.1, 0.0]),
        ("cache.keep_ratio", [float("nan"), 0.0]),
        ("cache.keep_counts", [[1, -1], [0]]),
        ("cache.keep_counts", [[1]]),
        ("cache.multiple", 0),
        ("cache.reuse", "output"),
        ("cache.attention", "none"),
        ("cache.forecast_order", 3),
        ("predictor.iterations", 0),
        ("predictor.batch_size", 0),
        ("predictor.learning_rate", 0.0),
        ("predictor.budget_weight", -1.0),
        ("measure.samples", -1),
    ],
)
def test_a_value_out_of_range(tmp_path: Path, key: str, value: Any) -> None:
    error_of(write(tmp_path, TOML), {key: value}, "found ")


def test_a_value_where_a_table_belongs(tmp_path: Path) -> None:
    path = write(tmp_path, "model = 'a'\nschedule = 4")
    error_of(path, {}, "schedule: ", "found 4")
    with pytest.raises(UsageError, match=r"recipe\.toml: schedule: expected a table \[schedule\], found 4"):
        read_recipe(path, {"schedule.cache_interval_early": 3})


def test_training_and_measurement_never_share_a_seed() -> None:
    assert MAX_SEED + Recipe(model="").predictor.batch_size < FIRST_SEED


def test_keep_counts_and_keep_ratio_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="keep_counts and keep_ratio exclude each other"):
        read_recipe(tmp_path, {"cache.keep_counts": [[0], [0]], "cache.keep_ratio": (0.0, 0.5)})


def test_one_way_on_the_command_line_replaces_the_other_in_the_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('model = "model"\n[cache]\nkeep_ratio = [0.0, 0.5]\n')
    cache = read_recipe(recipe, {"cache.keep_counts": [[0], [8]]}).cache
    assert cache.keep_counts == ((0,), (8,))
    assert cache.keep_ratio == (0.0, 0.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "model = 'm'\n[predictor]\nlearning_rate = 1e30",
            "predictor.learning_rate: must be less than or equal to 100",
        ),
        ("model = 'm'\n[predictor]\nlearning_rate = inf", "predictor.learning_rate: must be a finite number"),
        ("model = 'm'\n[predictor]\nlearning_rate = nan", "predictor.learning_rate: must be a finite number"),
        ("model = 'm'\n[predictor]\nbudget_weight = 1e300", "predictor.budget_weight: must be less than"),
        (
            "model = 'm'\n[sampling]\nnum_inference_steps = 1000000",
            "sampling.num_inference_steps: must be less than or equal to 10000",
        ),
        (
            "model = 'm'\n[sampling]\nnum_inference_steps = true",
            "sampling.num_inference_steps: must be a valid integer, found True",
        ),
        (
            "model = 'm'\n[sampling]\nnum_inference_steps = '50'",
            "sampling.num_inference_steps: must be a valid integer, found '50'",
        ),
        ("model = 'm'\n[sampling]\nguidance_scale = 1e39", "sampling.guidance_scale: must be less than"),
        ("model = 'm'\n[sampling]\nguidance_scale = '2'", "sampling.guidance_scale: must be a valid number"),
        (
            "model = 'm'\n[sampling.set_timesteps_kwargs]\nmu = inf",
            "sampling.set_timesteps_kwargs.mu: must be a finite",
        ),
        (
            "model = 'm'\n[sampling.set_timesteps_kwargs]\nmu = 2026-11-28",
            "set_timesteps_kwargs.mu: expected text, a num",
        ),
        (
            "model = 'm'\n[sampling.set_timesteps_kwargs]\nsigmas = [1.0, nan]",
            "set_timesteps_kwargs.sigmas: must be a fin",
        ),
        ("model = 'm'\nconditions = \"\\u001b[31m\"", "conditions: expected text without control characters"),
        (
            "model = 'm'\n[search]\nfull_steps = " + str([0.5] * 9999),
            r"search: full_steps must list at most 100 values, found 9999",
        ),
        ("model = 'm'\n[search]\nlatency_rounds = 1000000000", "search.latency_rounds: must be less than"),
        ("model = 'm'\n[measure]\nsamples = 10000000000", "measure.samples: must be less than"),
        ("model = " + "[" * 100_000, "not a TOML file"),
        ("a" + ".a" * 100_000 + " = 1", "not a TOML file"),
        ("seed = " + "9" * 10_000, r"not a TOML file|seed"),
        ("model = 'm' # " + "x" * 2**20, "not a TOML file of at most 262144 bytes"),
    ],
)
def test_what_no_calibration_can_use(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as raised:
        read_recipe(write(tmp_path, text), {})
    assert str(raised.value).isprintable()
