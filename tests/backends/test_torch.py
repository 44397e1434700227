"""PyTorch as a backend: the same pictures as ONNX Runtime's, from the checkpoint that the plan names."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from backends.buffers import buffer_of
from bundles import Made, MadeByCommands, run_cli, snapshot
from kept import Keep
from tolerances import tolerance

import tc_deploy
from tc_deploy.backends import registry
from tc_deploy.backends.build import build_target
from tc_deploy.errors import BackendError, ModelError, PlanError
from tc_deploy.export.bundle_export import export_bundle
from tc_deploy.export.options import ExportOptions
from tc_deploy.manifest import read_target
from tc_deploy.types import FloatArray

LABELS = [3, 9]


def latents(bundle: Path, backend: str, *, full: bool) -> FloatArray:
    with tc_deploy.load(bundle, backend, batch_size=2) as pipeline:
        return pipeline(class_labels=LABELS, seed=5, full=full).latents


@pytest.fixture(scope="module")
def built(
    tmp_path_factory: pytest.TempPathFactory, mixed: Made, multistep: Made, pixel: MadeByCommands
) -> dict[str, Path]:
    """A copy of each bundle with targets of both kinds, the first built by the command line."""
    folder = tmp_path_factory.mktemp("torch")
    made = {"mixed": mixed, "multistep": multistep, "pixel": pixel}
    copies = {name: bundle.copy(folder / name) for name, bundle in made.items()}
    answer = run_cli("build", copies["mixed"], "--backend", "torch", "--model", mixed.model)
    assert answer.code == 0, answer.err
    chosen = f"compile False, device cpu, model {mixed.model}"
    assert (
        answer.out == f"{copies['mixed'] / 'torch'}: built with torch {torch.__version__}, computes in fp32, {chosen}\n"
    )
    build_target(copies["multistep"], "torch")
    build_target(copies["pixel"], "torch")
    return copies


@pytest.mark.parametrize("bundle", ["mixed", "multistep", "pixel"])
def test_a_trajectory_is_onnx_runtime_s(built: dict[str, Path], bundle: str) -> None:
    for full in (False, True):
        found, expected, other = (
            latents(built[bundle], "torch", full=full),
            latents(built[bundle], "onnxruntime", full=full),
            latents(built[bundle], "onnxruntime", full=not full),
        )
        allowed = tolerance("torch", "fp32", "trajectory_max_rel")
        assert np.abs(found - expected).max() <= allowed * np.abs(expected).max()
        # The comparison can tell a cached run from a full one.
        assert np.abs(found - other).max() > 100 * allowed * np.abs(other).max()


@pytest.fixture(scope="module")
def exact(kept: Keep, fp16: Made, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, FloatArray]:
    """Pictures of the half bundles' plan in fp32, by whether all steps are full."""

    def make(folder: Path) -> None:
        export_bundle(fp16.plan, folder / "bundle", ExportOptions(check=False, samples=False))

    entry = kept("half-as-fp32", make, file=__file__)
    bundle = Path(shutil.copytree(entry / "bundle", tmp_path_factory.mktemp("exact") / "bundle"))
    assert build_target(bundle, "torch").computes_in == "fp32"
    return {full: latents(bundle, "torch", full=full) for full in (False, True)}


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_half_bundle_runs_in_its_precision(
    request: pytest.FixtureRequest, exact: dict[bool, FloatArray], tmp_path: Path, precision: str
) -> None:
    """Half a unit in the last place apart from the fp32 run, and no further: products are rounded, the rest is not."""
    made: Made = request.getfixturevalue(precision)
    bundle = made.copy(tmp_path / "half")
    assert build_target(bundle, "torch").computes_in == precision
    for full in (False, True):
        error = np.linalg.norm(latents(bundle, "torch", full=full) - exact[full]) / np.linalg.norm(exact[full])
        assert 1e-6 < error <= tolerance("torch", precision, "drift_rel_l2")


def test_a_bfloat16_buffer_keeps_every_bit() -> None:
    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    buffer = buffer_of(registry.backend("torch").open({}), bfloat16, (2, 2))
    values = np.array([[1.0, -2.5], [3.140625, np.inf]], bfloat16)
    buffer.write(values)
    assert buffer.read().dtype == bfloat16
    assert buffer.read().tobytes() == values.tobytes()
    with pytest.raises(ValueError, match=r"expected bfloat16 \(2, 2\), found float32 \(2, 2\)"):
        buffer.write(np.zeros((2, 2), np.float32))


def test_a_buffer_keeps_a_copy_of_what_is_written() -> None:
    buffer = buffer_of(registry.backend("torch").open({}), np.dtype("int32"), (2, 3))
    assert not buffer.read().any()
    values = np.arange(6, dtype=np.int32).reshape(2, 3)
    buffer.write(values)
    values[...] = 0
    buffer.read()[...] = 0
    assert buffer.read().tolist() == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(ValueError, match=r"expected int32 \(2, 3\), found float32 \(2, 3\)"):
        buffer.write(np.zeros((2, 3), np.float32))


def test_the_checkpoint_must_be_there_and_be_the_plan_s(mixed: Made, multistep: Made, tmp_path: Path) -> None:
    bundle = mixed.copy(tmp_path / "bundle")
    before = snapshot(bundle)
    with pytest.raises(ModelError):
        build_target(bundle, "torch", {"model": str(tmp_path / "nowhere")})
    with pytest.raises(PlanError, match="the plan was made for another model"):
        build_target(bundle, "torch", {"model": str(multistep.model)})
    assert snapshot(bundle) == before


@pytest.mark.parametrize("options", [{"compile": 1}, {"model": 3}, {"threads": 1}, {"device": "abacus"}])
def test_an_option_that_it_does_not_know_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(BackendError, match=r"torch takes the options compile.*model.*found"):
        registry.backend("torch").open(options)


def test_a_target_runs_where_it_was_built_for(mixed: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device that was chosen stands in the target, and no other takes its place unasked."""
    bundle = mixed.copy(tmp_path / "bundle")
    assert build_target(bundle, "torch").options == {"device": "cpu", "compile": False}
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert registry.backend("torch").settled({})["device"] == "cuda"
    assert registry.backend("torch").open(read_target(bundle, "torch").options).place.type == "cpu"
    monkeypatch.undo()
    with pytest.raises(BackendError, match=r"sees no GPU here, and these engines are for cuda; build again with.*cpu"):
        registry.backend("torch").open({"device": "cuda"})


def test_a_machine_without_pytorch_is_told_the_extra(mixed: Made) -> None:
    program = "import sys; sys.modules['torch'] = None; from tc_deploy.cli import main; sys.exit(main(sys.argv[1:]))"
    words = ["-q", "build", str(mixed.bundle), "--backend", "torch"]
    answer = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=False)
    assert answer.returncode == BackendError.exit_code
    assert answer.stderr.startswith("error: torch is not installed: pip install ")
