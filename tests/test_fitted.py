"""A plan with fitted forecasts from calibration to pictures: every stage takes the weights that the plan holds."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from bundles import Made, make_plan, relative_error, run_cli
from diffusers_pipelines import CachedTransformer, tiny_autoencoder
from tolerances import tolerance
from validate import faults

import tc_deploy
from tc_deploy.backends.build import build_target
from tc_deploy.calibrate.calibration import calibrate
from tc_deploy.calibrate.recipe import Recipe
from tc_deploy.diffusers import EngineTransformer
from tc_deploy.export.bundle_export import export_bundle
from tc_deploy.models.loading import load_model
from tc_deploy.plan import PLAN, TABLES, load_plan
from tc_deploy.planned.model import sampling_from_plan
from tc_deploy.tables import FORECAST_WEIGHTS, StepTables
from tc_deploy.tokencache.sampler import TokenCachedSteps, denoise
from tc_deploy.validate.validation import validate_bundle

SETTINGS: dict[str, Any] = {
    # F c1 c1 F c1 c1 | F c2 F c2
    "seed": 5,
    "sampling": {"num_inference_steps": 10, "guidance_scale": 2.0},
    "schedule": {"phase_start": 6, "cache_interval_early": 3, "cache_interval_late": 2},
    "cache": {"forecast_order": 1},
    "forecast": {"fit_samples": 8},
}
FITTED_STEPS = {1, 2, 4, 5, 7, 9}
LABELS = [3, 207]
EQUAL = tolerance("onnxruntime", "fp32", "trajectory_max_rel")
VISIBLE = 100 * EQUAL
"""A difference that no rounding makes."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, save_dit: Callable[..., Path]) -> Made:
    """A plan that was fitted, and its engines."""
    folder = tmp_path_factory.mktemp("fitted")
    model = save_dit(folder / "model", num_layers=2, num_embeds_ada_norm=1000)
    plan = make_plan(model, folder / "plan", **SETTINGS)
    export_bundle(plan, folder / "bundle")
    build_target(folder / "bundle", options={"threads": 1})
    return Made(model=model, plan=plan, bundle=folder / "bundle")


# ------------------------------------------------------------------------------------------------------------ calibrate
def test_calibrate_fits_what_skips_the_model_and_says_on_what(made: Made) -> None:
    plan, tables = load_plan(made.plan)
    assert plan.forecast is not None
    assert (plan.forecast.first_seed, plan.forecast.samples) == (5, 8)
    usual = plan.run_schedule().polynomial_weights(1)
    changed = set(np.flatnonzero((tables[FORECAST_WEIGHTS] != usual).any(axis=1)))
    assert changed
    assert changed <= FITTED_STEPS


def test_the_same_recipe_gives_the_same_bytes_in_a_plan_and_in_its_bundle(made: Made, tmp_path: Path) -> None:
    again = make_plan(made.model, tmp_path / "plan", **SETTINGS)
    assert (again / TABLES).read_bytes() == (made.plan / TABLES).read_bytes()
    assert (made.bundle / TABLES).read_bytes() == (made.plan / TABLES).read_bytes()
    other = make_plan(made.model, tmp_path / "other", **SETTINGS | {"seed": 6})
    assert (other / TABLES).read_bytes() != (made.plan / TABLES).read_bytes()


@pytest.mark.parametrize("seed", [0, 500_000])
def test_a_plan_is_measured_with_its_weights_and_on_other_seeds_than_the_fit_s(
    made: Made, tmp_path: Path, seed: int
) -> None:
    recipe = {"model": str(made.model), **SETTINGS, "seed": seed, "measure": {"samples": 3}}
    plan = calibrate(Recipe.model_validate(recipe), tmp_path / "plan")
    assert plan.forecast is not None
    assert plan.measured is not None
    fitted = range(plan.forecast.first_seed, plan.forecast.first_seed + plan.forecast.samples)
    assert not set(plan.measured.seeds) & set(fitted)
    without = calibrate(Recipe.model_validate(recipe | {"forecast": {}}), tmp_path / "without")
    assert without.forecast is None
    assert without.measured is not None
    assert plan.measured.psnr_db > without.measured.psnr_db


def test_the_command_line_fits_shows_it_and_prints_a_recipe_that_does_it_again(made: Made, tmp_path: Path) -> None:
    words = (
        "--steps",
        10,
        "--guidance-scale",
        2,
        "--phase-start",
        6,
        "--cache-interval-early",
        3,
        "--cache-interval-late",
        2,
        "--forecast-order",
        1,
    )
    others = ("--samples", 0, "--seed", 5, "--fit-samples", 8)
    answer = run_cli("calibrate", made.model, "-o", tmp_path / "plan", *words, *others)
    assert answer.code == 0, answer.err
    assert (tmp_path / "plan" / TABLES).read_bytes() == (made.plan / TABLES).read_bytes()
    assert "forecast weights fitted on 8 samples" in run_cli("inspect", tmp_path / "plan").out
    assert json.loads(run_cli("inspect", tmp_path / "plan", "--json").out)["forecast_fitted_on"] == 8
    assert run_cli("report", tmp_path / "plan", "-o", tmp_path / "report.html").code == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "fitted on 8 seeds, 5 to 12" in page
    assert "fit_samples = 8" in page


@pytest.mark.parametrize(
    ("samples", "message"), [(7, "must be 0, which takes polynomials, or at least 8, found 7"), (-1, "--fit-samples")]
)
def test_a_number_of_samples_that_cannot_be_is_one_line(made: Made, tmp_path: Path, samples: int, message: str) -> None:
    answer = run_cli("calibrate", made.model, "-o", tmp_path / "plan", "--steps", 6, "--fit-samples", samples)
    assert answer.code == 2
    assert message in answer.error
    assert not (tmp_path / "plan").exists()


# -------------------------------------------------------------------------------------------------------------- engines
def test_engines_make_what_pytorch_makes_with_the_plan_s_weights_and_no_others(made: Made) -> None:
    plan, tables = load_plan(made.plan)
    model, steps = load_model(made.model), plan.step_tables(tables)
    with tc_deploy.load(made.bundle, batch_size=2) as pipeline:
        noise = torch.from_numpy(pipeline.noise(40, 2))
        found = pipeline(class_labels=LABELS, seed=40).latents
    usual = StepTables.polynomial(plan.run_schedule(), 1, steps.token_index)
    fitted, polynomial = (
        denoise(
            model,
            sampling_from_plan(plan),
            noise,
            {"class_labels": torch.tensor(LABELS, dtype=torch.int32)},
            TokenCachedSteps(model, plan.cache, plan.run_schedule(), each),
        )
        for each in (steps, usual)
    )
    assert relative_error(found, fitted) <= EQUAL
    assert relative_error(polynomial, fitted) > VISIBLE


def test_validation_passes_and_finds_other_weights_than_the_plan_was_exported_with(made: Made, tmp_path: Path) -> None:
    assert validate_bundle(made.bundle, "onnxruntime").passed
    bundle = made.copy(tmp_path / "bundle")
    plan, tables = load_plan(bundle)
    tables[FORECAST_WEIGHTS][4] += np.float32(0.25)
    faults.put_plan(bundle, plan, tables)
    shutil.rmtree(bundle / "onnxruntime")
    build_target(bundle, options={"threads": 1})
    record = validate_bundle(bundle, "onnxruntime")
    assert [(fault.step, fault.tensor) for fault in record.wiring] == [(4, FORECAST_WEIGHTS)]
    assert not record.passed


# ------------------------------------------------------------------------------------------------------------ diffusers
@pytest.fixture(scope="module")
def pipe(made: Made) -> diffusers.DiTPipeline:
    transformer = diffusers.DiTTransformer2DModel.from_pretrained(made.model / "transformer")
    scheduler = diffusers.DDIMScheduler.from_pretrained(made.model / "scheduler")
    pipe = diffusers.DiTPipeline(transformer, tiny_autoencoder(4), scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(pipe: diffusers.DiTPipeline, transformer: Any, guidance_scale: float = 2.0) -> Any:
    pipe.transformer = transformer
    generator = torch.Generator().manual_seed(7)
    return pipe(
        class_labels=LABELS,
        guidance_scale=guidance_scale,
        num_inference_steps=10,
        generator=generator,
        output_type="np",
    ).images


def test_a_diffusers_pipeline_runs_with_the_plan_s_weights(made: Made, pipe: diffusers.DiTPipeline) -> None:
    expected = images(pipe, CachedTransformer(made.plan, made.model))
    assert relative_error(images(pipe, EngineTransformer(made.bundle)), expected) <= EQUAL
    without = CachedTransformer(made.plan, made.model)
    without.tables = StepTables.polynomial(without.plan.run_schedule(), 1, without.tables.token_index)
    assert relative_error(images(pipe, without), expected) > VISIBLE


def test_another_guidance_scale_is_a_warning_that_names_the_fit(
    made: Made, pipe: diffusers.DiTPipeline, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    warning = "calibrated at guidance scale 2, and is not measured at 4; nor are its forecast weights fitted for that"
    engine = EngineTransformer(made.copy(tmp_path / "bundle"))
    with caplog.at_level(logging.WARNING):
        images(pipe, engine)
        assert "guidance scale" not in caplog.text
        for _ in range(2):
            images(pipe, engine, guidance_scale=4.0)
    assert caplog.text.count(warning) == 1
    words = ("generate", made.bundle, "--class-label", 3, "-o", tmp_path / "x.npy", "--guidance-scale", 4)
    assert warning in run_cli(*words).err


def test_an_edited_plan_is_refused_by_name(made: Made, tmp_path: Path) -> None:
    plan = Path(shutil.copytree(made.plan, tmp_path / "plan"))
    document = json.loads((plan / PLAN).read_text(encoding="utf-8"))
    document["sampling"]["guidance_scale"] = 4.0
    (plan / PLAN).write_text(json.dumps(document), encoding="utf-8")
    answer = run_cli("export", plan, "-o", tmp_path / "bundle")
    assert answer.code == 4
    assert "its forecast weights were fitted for another model, sampler, schedule or cache" in answer.error
