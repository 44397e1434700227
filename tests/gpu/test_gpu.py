"""What must hold on an NVIDIA GPU: the parts' own findings, judged. ``make gpu`` runs these."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu import calibrate_part, engines_part, large_part, runtime_part
from gpu.parts import ROOT, Kit
from tolerances import tolerance

from tc_deploy.backends.build import build_target
from tc_deploy.errors import TcDeployError
from tc_deploy.export.bundle_export import export_bundle
from tc_deploy.export.options import ExportOptions

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU that PyTorch sees"),
]


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    """The demo, and a model small enough for a test."""
    folder = tmp_path_factory.mktemp("gpu")
    export_bundle(ROOT / "calibration" / "digits", folder / "digits", ExportOptions(samples=False))
    build_target(folder / "digits", "onnxruntime")
    return Kit(bundle=folder / "digits", work=folder, size="S/2", rounds=3)


def test_memory_is_aligned_zero_and_goes_back() -> None:
    found = runtime_part.buffers()
    assert found["aligned"]
    assert found["new_memory_is_zero"]
    assert found["copies_keep_every_bit"]
    assert found["held_bytes"] > 2**28
    assert found["left_bytes"] <= 0


@pytest.mark.parametrize("batch", [1, 8])
def test_captured_runs_are_bit_for_bit_the_launched_ones(kit: Kit, batch: int) -> None:
    found = runtime_part.captured(kit, batch)
    assert all(found["equal_to_launched"].values())
    assert max(found["errors_to_cpu"].values()) <= tolerance("tensorrt", "fp32", "drift_rel_l2")


def test_a_thousand_requests_leave_nothing_behind(kit: Kit) -> None:
    found = runtime_part.many_requests(kit)
    assert found["same_answer"]
    assert found["device_bytes_more"] <= 0
    assert found["host_bytes_more"] <= 2**24


def test_two_pipelines_in_two_threads_are_independent(kit: Kit) -> None:
    found = runtime_part.two_threads(kit)
    assert found["failures"] == []
    assert found["same_as_alone"]


def test_the_torch_backend_computes_what_the_cpu_does(kit: Kit) -> None:
    found = runtime_part.pytorch_backend(kit)
    assert found["same_answer"]
    assert max(found["errors_to_cpu"].values()) <= tolerance("torch", "fp32", "drift_rel_l2")


def test_bf16_steps_lie_near_fp32_and_cached_ones_give_the_full_output() -> None:
    found = large_part.numbers("S/2")
    assert min(found["snr_to_fp32_db"].values()) >= tolerance("torch", "bf16", "output_sqnr_db")
    assert min(found["cached_to_full_snr_db"].values()) >= tolerance("torch", "fp32", "output_sqnr_db")


def test_the_demo_s_plan_made_on_the_gpu_measures_as_the_cpu_s_does(kit: Kit) -> None:
    found = calibrate_part.demo(kit, "first")
    assert abs(found["psnr_db"] - found["committed_psnr_db"]) <= 0.5


@pytest.mark.parametrize("engine", engines_part.ENGINES)
def test_an_engine_computes_what_the_cpu_does_or_says_why_not(kit: Kit, engine: str) -> None:
    shutil.rmtree(Path(kit.work) / "demo", ignore_errors=True)
    try:
        found: dict[str, Any] = engines_part.on_demo(kit, engine)
    except TcDeployError as error:
        pytest.skip(f"{engine}: {error}")
    errors = found["errors_to_cpu"].values()
    assert max(error["max_relative_error"] for error in errors) <= tolerance("tensorrt", "fp32", "drift_rel_l2")
