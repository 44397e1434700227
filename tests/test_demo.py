"""The shipped demo: its plan is good by its own measurement, belongs to the shipped model, and runs as PyTorch does."""

from pathlib import Path

import numpy as np
import pytest
import torch
from bundles import run_cli
from tolerances import tolerance

import tc_deploy
from tc_deploy.models.loading import load_model
from tc_deploy.plan import PLAN, load_plan, load_plan_as_written, plan_bytes
from tc_deploy.planned.model import sampling_from_plan
from tc_deploy.quality.classifier import Classifier
from tc_deploy.quality.compare import compare
from tc_deploy.tokencache.sampler import TokenCachedSteps, denoise

ROOT = Path(__file__).parent.parent
PLAN_FOLDER = ROOT / "calibration" / "digits"
MODEL_FOLDER = ROOT / "examples" / "digits-dit"
CLASSIFIER = ROOT / "examples" / "digits-classifier.onnx"
LARGEST_COST = 0.25
LEAST_PSNR_DB = 45.0
LEAST_GAIN_DB = 12.0
LEAST_CLASS_ACCURACY = 0.95
LEAST_SSIM = 0.99
"""What the project promises of the demo's plan."""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "digits"
    assert run_cli("export", PLAN_FOLDER, "-o", folder, "--model", MODEL_FOLDER).code == 0
    assert run_cli("build", folder).code == 0
    return folder


def test_plan_is_canonical_and_of_the_shipped_model() -> None:
    plan, _ = load_plan_as_written(PLAN_FOLDER)
    assert (PLAN_FOLDER / PLAN).read_bytes() == plan_bytes(plan)
    assert plan.model.weights_sha256 == load_model(MODEL_FOLDER).weights_sha256


def test_plan_keeps_its_promise() -> None:
    plan, _ = load_plan(PLAN_FOLDER)
    assert plan.cost_ratio() <= LARGEST_COST
    assert plan.measured is not None
    assert plan.measured.fewer_steps >= plan.cost_in_full_steps()
    assert plan.measured.psnr_db >= LEAST_PSNR_DB
    assert plan.measured.psnr_db - plan.measured.fewer_steps_psnr_db >= LEAST_GAIN_DB


@pytest.mark.parametrize("full", [False, True])
def test_trajectory_equals_pytorch(bundle: Path, full: bool) -> None:
    labels = [3, 8, 1]
    with tc_deploy.load(bundle, batch_size=3) as pipeline:
        noise = torch.from_numpy(pipeline.noise(40, 3))
        found = pipeline(class_labels=labels, seed=40, full=full).latents
    plan, tables = load_plan(PLAN_FOLDER)
    model = load_model(MODEL_FOLDER)
    cached = TokenCachedSteps(model, plan.cache, plan.run_schedule(), plan.step_tables(tables))
    expected = denoise(
        model,
        sampling_from_plan(plan),
        noise,
        {"class_labels": torch.tensor(labels, dtype=torch.int32)},
        (lambda _, inputs: model.forward(inputs)) if full else cached,
    )
    error = np.abs(found - expected.numpy()).max()
    assert error <= tolerance("onnxruntime", "fp32", "trajectory_max_abs")


def test_the_shipped_classifier_reads_what_was_asked_for(bundle: Path) -> None:
    labels = np.arange(10)
    with tc_deploy.load(bundle, batch_size=len(labels)) as pipeline:
        cached, full = (
            torch.from_numpy(pipeline(class_labels=labels.tolist(), seed=60, full=full).latents)
            for full in (False, True)
        )
    found = compare(cached, full, torch.from_numpy(labels), pixels=True, judge=Classifier(CLASSIFIER))
    assert found.class_accuracy is not None
    assert found.class_accuracy >= LEAST_CLASS_ACCURACY
    assert found.psnr_db >= LEAST_PSNR_DB
    assert found.ssim is not None
    assert found.ssim >= LEAST_SSIM
