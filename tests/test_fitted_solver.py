"""A plan that was fitted towards a converged run, from calibration to pictures: its solver's table wherever it runs,
and the scheduler's own wherever every step is full."""

from __future__ import annotations

import html
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bundles import Made, make_plan, relative_error, run_cli
from runtime.test_slots import Asked, Bench
from tolerances import tolerance
from torch import Tensor
from validate import faults

import tc_deploy
from tc_deploy.backends.build import build_target
from tc_deploy.diffusers import EngineTransformer
from tc_deploy.errors import BundleError, PlanError, UsageError
from tc_deploy.export.bundle_export import export_bundle
from tc_deploy.models.loading import load_model
from tc_deploy.plan import PLAN, TABLES, MeasuredRecord, check_plan, content_sha256, load_plan
from tc_deploy.planned.model import sampling_from_plan
from tc_deploy.runtime.course import HD
from tc_deploy.tables import SOLVER_COEFFICIENTS
from tc_deploy.tokencache.sampler import TokenCachedSteps, denoise
from tc_deploy.validate.validation import validate_bundle

SETTINGS: dict[str, Any] = {
    # F c1 c1 F c1 c1 | F c2 F c2
    "sampling": {"num_inference_steps": 10, "guidance_scale": 2.0},
    "schedule": {"phase_start": 6, "cache_interval_early": 3, "cache_interval_late": 2},
    "cache": {"forecast_order": 1},
    "forecast": {"fit_samples": 8, "target": "converged"},
}
LABELS = [3, 207]
EQUAL = tolerance("onnxruntime", "fp32", "trajectory_max_rel")
VISIBLE = 100 * EQUAL


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, save_dit: Callable[..., Path]) -> Made:
    folder = tmp_path_factory.mktemp("converged")
    model = save_dit(folder / "model", num_layers=2, num_embeds_ada_norm=1000)
    plan = make_plan(model, folder / "plan", **SETTINGS)
    export_bundle(plan, folder / "bundle")
    build_target(folder / "bundle", options={"threads": 1})
    return Made(model=model, plan=plan, bundle=folder / "bundle")


@torch.no_grad()
def by_hand(made: Made, noise: Tensor) -> Tensor:
    """The plan's run, from its tables alone: no scheduler, no code of the package but the model's call."""
    plan, tables = load_plan(made.plan)
    model, weights, coefficients = load_model(made.model), tables["forecast_weights"], tables[SOLVER_COEFFICIENTS]
    labels = torch.tensor([*LABELS, 1000, 1000], dtype=torch.int32)
    latents, outputs, cached = [noise], list[Tensor](), list[Tensor]()
    for step, mark in enumerate("FccFccFcFc"):
        if mark == "F":
            inputs = {"hidden_states": torch.cat([latents[0]] * 2), "timestep": torch.full((4,), t(plan, step))}
            conditional, unconditional = model.forward(inputs | {"class_labels": labels})[:, :4].chunk(2)
            cached.insert(0, unconditional + 2.0 * (conditional - unconditional))
            output = cached[0]
        else:
            output = sum(float(w) * value for w, value in zip(weights[step], cached, strict=False))
        outputs.insert(0, output)
        of_latents, of_outputs = np.split(coefficients[step], 2)
        terms = [*zip(of_latents, latents, strict=False), *zip(of_outputs, outputs, strict=False)]
        latents.insert(0, torch.stack([float(factor) * value for factor, value in terms]).sum(0))
    return latents[0]


def t(plan: Any, step: int) -> float:
    return float(plan.sampling.timesteps[step])


def own_full_run(made: Made, noise: Tensor) -> Tensor:
    """diffusers' scheduler, every step full."""
    plan, _ = load_plan(made.plan)
    labels = {"class_labels": torch.tensor(LABELS, dtype=torch.int32)}
    model = load_model(made.model)
    return denoise(model, sampling_from_plan(plan), noise, labels, lambda _, inputs: model.forward(inputs))


# ------------------------------------------------------------------------------------------------------------ calibrate
def test_the_plan_says_what_it_is_fitted_towards_and_has_a_solver_of_its_own(made: Made) -> None:
    plan, tables = load_plan(made.plan)
    assert plan.forecast is not None
    assert (plan.forecast.target, plan.forecast.converged_steps, plan.forecast.solver_fitted) == ("converged", 40, True)
    assert tables[SOLVER_COEFFICIENTS].shape == (10, 4)


def test_the_command_line_says_what_its_figures_are_measured_to(made: Made, tmp_path: Path) -> None:
    words = ("--steps", 10, "--guidance-scale", 2, "--phase-start", 6, "--cache-interval-early", 3)
    more = ("--cache-interval-late", 2, "--forecast-order", 1, "--fit-samples", 8, "--samples", 2)
    answer = run_cli("calibrate", made.model, "-o", tmp_path / "plan", *words, *more, "--target", "converged")
    assert answer.code == 0, answer.err
    assert (tmp_path / "plan" / TABLES).read_bytes() == (made.plan / TABLES).read_bytes()
    measured = load_plan(tmp_path / "plan")[0].measured
    assert measured is not None
    exact = measured.converged
    assert exact is not None
    said = (
        f"{exact.psnr_db:.1f} dB to the converged run of 40 steps in PyTorch, on 2 unseen seeds, where the full run has"
        f" {exact.full_psnr_db:.1f} dB; {measured.psnr_db:.1f} dB to the full run; "
    )
    assert said in answer.out
    assert said in run_cli("inspect", tmp_path / "plan").out
    assert "towards a converged run of 40 steps, with a solver of its own" in run_cli("inspect", tmp_path / "plan").out
    facts = json.loads(run_cli("inspect", tmp_path / "plan", "--json").out)
    assert (facts["fit_target"], facts["solver_fitted"]) == ("converged", True)
    assert run_cli("report", tmp_path / "plan", "-o", tmp_path / "report.html").code == 0
    page = html.unescape((tmp_path / "report.html").read_text(encoding="utf-8")).replace("\N{NO-BREAK SPACE}", " ")
    assert f"converged run of 40 steps: to that its pictures have {exact.psnr_db:.1f} dB, the full run's" in page
    assert 'target = "converged"' in page


def test_a_search_refuses_another_target_than_the_full_run(made: Made, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'model = "{made.model}"\n[forecast]\ntarget = "converged"\n', encoding="utf-8")
    answer = run_cli("plan", recipe, "-o", tmp_path / "plan")
    assert answer.code == 2
    assert "forecast.target = converged: a search compares with the full run" in answer.error


def test_polynomials_have_no_target(made: Made, tmp_path: Path) -> None:
    words = ("calibrate", made.model, "-o", tmp_path / "plan", "--fit-samples", 0, "--target", "converged")
    answer = run_cli(*words)
    assert answer.code == 2
    assert "fit_samples = 0 fits nothing" in answer.error


# -------------------------------------------------------------------------------------------------------------- engines
def test_engines_and_pytorch_run_by_the_plan_s_tables(made: Made) -> None:
    plan, tables = load_plan(made.plan)
    model, steps = load_model(made.model), plan.step_tables(tables)
    with tc_deploy.load(made.bundle, batch_size=2) as pipeline:
        noise = torch.from_numpy(pipeline.noise(40, 2))
        found = pipeline(class_labels=LABELS, seed=40).latents
    expected = by_hand(made, noise)
    assert relative_error(found, expected) <= EQUAL
    labels = {"class_labels": torch.tensor(LABELS, dtype=torch.int32)}
    planned, own = (
        denoise(model, sampling, noise, labels, TokenCachedSteps(model, plan.cache, plan.run_schedule(), steps))
        for sampling in (sampling_from_plan(plan).under(steps), sampling_from_plan(plan))
    )
    assert relative_error(planned, expected) <= EQUAL
    assert relative_error(own, expected) > VISIBLE


def test_every_step_full_is_solved_as_the_scheduler_does(made: Made) -> None:
    with tc_deploy.load(made.bundle, batch_size=2) as pipeline:
        noise = torch.from_numpy(pipeline.noise(40, 2))
        before = pipeline(class_labels=LABELS, seed=40, full=True).latents
        pipeline(class_labels=LABELS, seed=40)
        after = pipeline(class_labels=LABELS, seed=40, full=True).latents
    assert relative_error(before, own_full_run(made, noise)) <= EQUAL
    np.testing.assert_array_equal(before, after)


def test_slots_serve_both_each_by_its_own_solver(made: Made) -> None:
    bench = Bench(made.bundle)
    asked = [Asked(seed=1), Asked(seed=1, course=HD)]
    for each in asked:
        assert relative_error(bench.alone(each), bench.by_pipeline(each)) <= EQUAL
    planned, full = (bench.alone(each) for each in asked[:2])
    assert relative_error(planned, full) > VISIBLE


# ------------------------------------------------------------------------------------------------------------- validate
def test_validation_passes_and_finds_another_solver_than_the_plan_was_exported_with(made: Made, tmp_path: Path) -> None:
    assert validate_bundle(made.bundle, "onnxruntime").passed
    bundle = made.copy(tmp_path / "bundle")
    plan, tables = load_plan(bundle)
    tables[SOLVER_COEFFICIENTS][4, 0] += np.float32(0.25)
    faults.put_plan(bundle, plan, tables)
    shutil.rmtree(bundle / "onnxruntime")
    build_target(bundle, options={"threads": 1})
    record = validate_bundle(bundle, "onnxruntime")
    assert [(fault.step, fault.tensor) for fault in record.wiring] == [(4, "coefficients")]
    assert not record.passed


# ------------------------------------------------------------------------------------------------------------- refused
def test_a_diffusers_pipeline_whose_scheduler_is_its_own_is_refused_with_what_to_do(made: Made) -> None:
    with pytest.raises(UsageError, match=r"solver is fitted.*tc_deploy\.load, or calibrate with --target full"):
        EngineTransformer(made.bundle)


def test_generate_warns_at_another_guidance_scale_of_weights_and_solver(made: Made, tmp_path: Path) -> None:
    words = ("generate", made.bundle, "--class-label", 3, "-o", tmp_path / "x.npy", "--guidance-scale", 4)
    said = "is not measured at 4; nor are its forecast weights and its solver fitted for that"
    assert said in run_cli(*words).err


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["sampling"].update(guidance_scale=4.0),
        lambda d: d["sampling"].update(scheduler_class="EulerDiscreteScheduler"),
        lambda d: d["schedule"].update(phase_start=4),
    ],
)
def test_a_plan_that_was_edited_is_refused(
    made: Made, tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    plan = Path(shutil.copytree(made.plan, tmp_path / "plan"))
    document = json.loads((plan / PLAN).read_text(encoding="utf-8"))
    change(document)
    (plan / PLAN).write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(PlanError, match="fitted for another model, sampler, schedule or cache"):
        load_plan(plan)


def test_a_solver_and_what_is_said_of_it_come_together(made: Made, tmp_path: Path) -> None:
    plan = Path(shutil.copytree(made.plan, tmp_path / "plan"))
    document = json.loads((plan / PLAN).read_text(encoding="utf-8"))
    document["forecast"]["solver_fitted"] = False
    (plan / PLAN).write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(PlanError, match="says no fitted solver under forecast, and has a table solver_coefficients"):
        load_plan(plan)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table[:-1], r"expected finite float32 \(10, 4\)"),
        (lambda table: table[:, :3], r"expected finite float32 \(10, 2\), found float32 \(10, 3\)"),
        (lambda table: table * np.float32(np.nan), "found values that are not"),
        (lambda table: np.roll(table, -3, axis=0), "a step reads from before step 0"),
    ],
)
def test_a_bad_table_is_refused(made: Made, change: Callable[[Any], Any], message: str) -> None:
    plan, tables = load_plan(made.plan)
    with pytest.raises(PlanError, match=f"plan: table solver_coefficients: .*{message}.*; calibrate again"):
        check_plan(plan, tables | {SOLVER_COEFFICIENTS: change(tables[SOLVER_COEFFICIENTS])}, "plan")


def test_a_measurement_by_another_run_than_the_fit_s_target_is_refused(made: Made) -> None:
    plan, tables = load_plan(made.plan)
    measured = MeasuredRecord(
        plan_sha256=content_sha256(plan), seeds=(1_000_000,), psnr_db=1.0, fewer_steps=6, fewer_steps_psnr_db=1.0
    )
    with pytest.raises(PlanError, match="fitted towards a run of 40 steps, and measured by the full run"):
        check_plan(plan.model_copy(update={"measured": measured}), tables, "plan")


def test_a_table_of_another_history_than_the_graph_s_is_refused(made: Made, tmp_path: Path) -> None:
    bundle = made.copy(tmp_path / "bundle")
    plan, tables = load_plan(bundle)
    faults.put_plan(bundle, plan, tables | {SOLVER_COEFFICIENTS: tables[SOLVER_COEFFICIENTS][:, [0, 2]].copy()})
    with pytest.raises(BundleError, match=r"solver_coefficients: expected \(10, 4\), .*found \(10, 2\)"):
        tc_deploy.load(bundle)
