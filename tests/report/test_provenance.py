"""The recipe that a report prints is the one that the plan was made by."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report.folders import DIGITS

from tc_deploy.calibrate.recipe import Recipe, read_recipe
from tc_deploy.plan import Plan, PromptsRecord, load_plan
from tc_deploy.report.provenance import toml_from_plan

ROOT = Path(__file__).parents[2]
RECIPE, SHIPPED = ROOT / "calibration" / "recipes" / "digits.toml", ROOT / "calibration" / "digits"
MODEL = ROOT / "examples" / "digits-dit"


def read_back(plan: Plan, folder: Path) -> Recipe:
    (folder / "recipe.toml").write_text(toml_from_plan(plan), encoding="utf-8")
    return read_recipe(folder / "recipe.toml", {})


def test_the_shipped_plan_s_recipe_is_the_shipped_one_with_its_steps_placed(tmp_path: Path) -> None:
    plan = load_plan(SHIPPED)[0]
    here = plan.model_copy(update={"model": plan.model.model_copy(update={"source": str(MODEL)})})
    found, made_by = read_back(here, tmp_path), read_recipe(RECIPE, {})
    for table in ("sampling", "forecast", "measure", "seed"):
        assert getattr(found, table) == getattr(made_by, table)
    assert found.cache.forecast_order == made_by.cache.forecast_order
    assert not any(map(any, found.cache.keep_counts or ((),)))
    assert found.schedule.variants == plan.run_schedule().line()
    assert made_by.schedule.full_steps == plan.run_schedule().full_steps
    assert Path(found.model).resolve() == Path(made_by.model).resolve() == MODEL


@pytest.mark.parametrize("change", [{"batch_size": 3}, {"trajectories": 9}, {"learning_rate": 1e-05}])
def test_settings_without_an_option_are_in_it(tmp_path: Path, change: dict[str, Any]) -> None:
    plan = load_plan(DIGITS)[0]
    settings = plan.origin.settings | {"predictor": plan.origin.settings["predictor"] | change, "multiple": 16}
    changed = plan.model_copy(update={"origin": plan.origin.model_copy(update={"settings": settings})})
    found = read_back(changed, tmp_path)
    assert found.predictor.model_dump() == settings["predictor"]
    assert found.cache.multiple == 16


def test_sizes_and_prompts_are_in_it(tmp_path: Path) -> None:
    plan = load_plan(DIGITS)[0]
    prompts = PromptsRecord(file=str(tmp_path / "prompts.safetensors"), sha256="0" * 64, prompts=3)
    changes: dict[str, Any] = {
        "model": plan.model.model_copy(update={"latent_size": (8, 16), "text_tokens": 7}),
        "origin": plan.origin.model_copy(update={"conditions": prompts}),
    }
    found = read_back(plan.model_copy(update=changes), tmp_path)
    assert (found.latent_size, found.text_tokens, found.conditions) == ((8, 16), 7, prompts.file)


@given(
    arguments=st.dictionaries(
        st.text(max_size=8).filter(lambda text: text.isprintable()),
        st.text().filter(lambda text: text.isprintable())
        | st.booleans()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.lists(st.integers(0, 999)),
        max_size=4,
    )
)
def test_the_scheduler_s_arguments_are_read_back(
    tmp_path_factory: pytest.TempPathFactory, arguments: dict[str, Any]
) -> None:
    plan = load_plan(DIGITS)[0]
    changed = plan.model_copy(update={"sampling": plan.sampling.model_copy(update={"set_timesteps_kwargs": arguments})})
    assert read_back(changed, tmp_path_factory.mktemp("recipe")).sampling.set_timesteps_kwargs == arguments
