"""A plan whose schedule is a list that no intervals make, from calibration to pictures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bundles import Made, make_plan, run_cli
from tolerances import tolerance

import tc_deploy
from tc_deploy.backends.build import build_target
from tc_deploy.export.bundle_export import export_bundle
from tc_deploy.models.loading import load_model
from tc_deploy.plan import PLAN, ListedScheduleRecord, load_plan
from tc_deploy.planned.model import sampling_from_plan
from tc_deploy.tokencache.sampler import TokenCachedSteps, denoise
from tc_deploy.validate.validation import validate_bundle

# Both kinds of cached step in turn, full steps side by side, and no full step where the kind changes.
LINE = "F F c2 F c1 c2 c1 F F c1"
SETTINGS: dict[str, Any] = {
    "seed": 5,
    "sampling": {"num_inference_steps": 10, "guidance_scale": 2.0},
    "schedule": {"variants": LINE},
    "cache": {"keep_counts": ((0,), (8,)), "forecast_order": 1},
}
LABELS = [3, 9]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, save_dit: Callable[..., Path]) -> Made:
    folder = tmp_path_factory.mktemp("listed")
    model = save_dit(folder / "model", num_layers=1)
    plan = make_plan(model, folder / "plan", **SETTINGS)
    export_bundle(plan, folder / "bundle")
    build_target(folder / "bundle", options={"threads": 1})
    return Made(model=model, plan=plan, bundle=folder / "bundle")


def test_a_plan_stores_the_list_as_it_is_drawn(made: Made) -> None:
    plan, _ = load_plan(made.plan)
    assert plan.schedule == ListedScheduleRecord(variants=LINE)
    assert plan.schedule.steps == 10
    assert plan.run_schedule().variants == (0, 0, 2, 0, 1, 2, 1, 0, 0, 1)
    document = json.loads((made.plan / PLAN).read_text(encoding="utf-8"))
    assert document["schedule"] == {"variants": LINE}


def test_engines_make_what_pytorch_makes(made: Made) -> None:
    plan, tables = load_plan(made.plan)
    model = load_model(made.model)
    with tc_deploy.load(made.bundle, batch_size=2) as pipeline:
        noise = torch.from_numpy(pipeline.noise(40, 2))
        result = pipeline(class_labels=LABELS, seed=40)
        full = pipeline(class_labels=LABELS, seed=40, full=True).latents
    assert (result.steps_full, result.steps_cached) == (5, 5)
    conditions = {"class_labels": torch.tensor(LABELS, dtype=torch.int32)}
    steps = TokenCachedSteps(model, plan.cache, plan.run_schedule(), plan.step_tables(tables))
    expected = denoise(model, sampling_from_plan(plan), noise, conditions, steps).numpy()
    error = np.abs(result.latents - expected).max() / np.abs(expected).max()
    allowed = tolerance("onnxruntime", "fp32", "trajectory_max_rel")
    assert error <= allowed
    assert np.abs(full - expected).max() / np.abs(expected).max() > 100 * allowed
    assert validate_bundle(made.bundle, "onnxruntime").passed


def test_it_is_shown_without_intervals(made: Made, tmp_path: Path) -> None:
    assert f"schedule  {LINE}" in run_cli("inspect", made.plan).out.splitlines()
    shown = json.loads(run_cli("inspect", made.plan, "--json").out)
    assert (shown["schedule"], shown["steps"], shown["steps_full"]) == (LINE, 10, 5)
    assert not {"phase_start", "cache_interval_early", "cache_interval_late"} & shown.keys()
    assert run_cli("report", made.plan, "-o", tmp_path / "report.html").code == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "5 full and 5 cached steps" in page
    assert "phase_start" not in page.partition("</style>")[2]
    assert "variants" in page


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"variants": "c1 F"}, "schedule.variants: step 0 must be a full step"),
        ({"variants": "F c3"}, "schedule.variants: step 1: expected F, c1, c2, found 'c3'"),
        (
            {"variants": "F c1"},
            "schedule.variants: expected 10 marks (sampling.num_inference_steps), found 2; .* --steps 2",
        ),
        (
            {"variants": LINE, "cache_interval_early": 3},
            "schedule: variants and cache_interval_early exclude each other; give one",
        ),
    ],
)
def test_a_recipe_s_list_that_does_not_fit_is_one_line(
    made: Made, tmp_path: Path, schedule: dict[str, Any], message: str
) -> None:
    lines = [f'model = "{made.model}"', "[sampling]", "num_inference_steps = 10", "[schedule]"]
    lines += [f"{key} = {json.dumps(value)}" for key, value in schedule.items()]
    (tmp_path / "recipe.toml").write_text("\n".join(lines), encoding="utf-8")
    answer = run_cli("calibrate", tmp_path / "recipe.toml", "-o", tmp_path / "plan")
    assert answer.code == 2
    assert_in_order(answer.error, message.split(".* "))
    assert not (tmp_path / "plan").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("c2" + LINE[1:], "step 0 must be a full step"),
        (LINE.replace("c1", "c7"), "step 4: expected F, c1, c2, found 'c7'"),
        (LINE + " F", "10 timesteps for 11 steps"),
        ("", "steps must be at least 1"),
    ],
)
def test_a_hand_edited_list_is_refused_in_one_line(made: Made, tmp_path: Path, line: str, message: str) -> None:
    plan = tmp_path / "plan"
    plan.mkdir()
    for file in made.plan.iterdir():
        (plan / file.name).write_bytes(file.read_bytes())
    document = json.loads((plan / PLAN).read_text(encoding="utf-8"))
    document["schedule"]["variants"] = line
    (plan / PLAN).write_text(json.dumps(document), encoding="utf-8")
    answer = run_cli("export", plan, "-o", tmp_path / "bundle")
    assert answer.code == 4
    assert message in answer.error


def assert_in_order(text: str, parts: list[str]) -> None:
    place = 0
    for part in parts:
        assert part in text[place:], text
        place = text.index(part, place) + len(part)
