"""ONNX Runtime as a backend: targets that have worked. test_compiled_at_load.py holds what it shares with OpenVINO."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from bundles import Made, edit_manifest, reseal, run_cli, snapshot
from tolerances import tolerance

import tc_deploy
from tc_deploy.backends import registry
from tc_deploy.backends.build import build_target
from tc_deploy.backends.onnxruntime.backend import OnnxRuntime
from tc_deploy.backends.onnxruntime.providers import PROVIDERS
from tc_deploy.backends.onnxruntime.run import OrtDevice
from tc_deploy.bundle import MANIFEST, sha256_of_file
from tc_deploy.errors import BackendError, BundleError, UsageError
from tc_deploy.golden import POLYGRAPHY
from tc_deploy.manifest import ONNX_FOLDER, WEIGHTS, read_manifest, read_target

ROWS = 2


def test_its_version_is_the_library_s() -> None:
    assert registry.backend("onnxruntime").version() == onnxruntime.__version__


# --------------------------------------------------------------------------------------------------------------- build


def test_a_target_holds_what_it_was_built_with(mixed: Made, tmp_path: Path) -> None:
    bundle = mixed.copy(tmp_path / "bundle")
    told: list[str] = []
    target = build_target(bundle, "onnxruntime", {"threads": 2}, progress=lambda what, done, total: told.append(what))
    assert target == read_target(bundle, "onnxruntime")
    assert target.options == {"provider": "cpu", "threads": 2}
    assert (target.backend, target.backend_version) == ("onnxruntime", onnxruntime.__version__)
    assert target.manifest_sha256 == sha256_of_file(bundle / MANIFEST)
    assert sorted(told) == sorted(f"building {name}" for name in read_manifest(bundle).graphs)
    assert [path.name for path in (bundle / "onnxruntime").iterdir()] == [MANIFEST]


@pytest.mark.parametrize("options", [{"threads": 0}, {"threads": 2}, {"threads": 1, "unfused": True}])
def test_options_change_no_picture(mixed: Made, tmp_path: Path, options: dict[str, Any]) -> None:
    bundle = mixed.copy(tmp_path / "bundle")
    build_target(bundle, options=options)
    made = []
    for folder in (mixed.bundle, bundle):
        with tc_deploy.load(folder, batch_size=ROWS) as pipeline:
            made.append(pipeline(class_labels=[1, 2]).latents)
    error = np.abs(made[0] - made[1]).max() / np.abs(made[0]).max()
    assert error <= tolerance("onnxruntime", "fp32", "trajectory_max_rel")


def test_an_add_and_a_layer_norm_stay_two_operators_on_the_cpu(mixed: Made, tmp_path: Path) -> None:
    def operators(options: Any) -> set[str]:
        options.log_severity_level = 3  # the optimized graph fits this machine only, it warns
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        onnxruntime.InferenceSession(mixed.bundle / ONNX_FOLDER / "full.onnx", options)
        return {node.op_type for node in ir.load(tmp_path / "optimized.onnx").graph.all_nodes()}

    fused = "SkipLayerNormalization"
    assert fused in operators(onnxruntime.SessionOptions()), "a graph that shows nothing"
    assert fused not in operators(OrtDevice()._session_options(None, shared=False))


def test_an_engine_that_computes_nonsense_is_refused_and_leaves_no_target(mixed: Made, tmp_path: Path) -> None:
    bundle = mixed.copy(tmp_path / "bundle")
    weights = bundle / ONNX_FOLDER / WEIGHTS
    values = np.fromfile(weights, np.float32)
    values[-100:] = np.nan
    values.tofile(weights)
    reseal(bundle)
    shutil.rmtree(bundle / "onnxruntime")
    before = snapshot(bundle)
    with pytest.raises(BackendError, match=r"\.onnx: output \S+ is not finite on a first run with numbers"):
        build_target(bundle)
    assert snapshot(bundle) == before
    assert sorted(path.name for path in bundle.iterdir() if path.is_dir()) == [ONNX_FOLDER, POLYGRAPHY]


@pytest.mark.parametrize(
    "damage",
    [
        lambda bundle: (bundle / ONNX_FOLDER / WEIGHTS).write_bytes(b""),
        lambda bundle: (bundle / ONNX_FOLDER / "full.onnx").unlink(),
        lambda bundle: edit_manifest(bundle, lambda document: document.pop("graphs")),
    ],
    ids=["truncated weights", "missing graph", "malformed manifest"],
)
def test_a_damaged_bundle_is_not_built(mixed: Made, tmp_path: Path, damage: Callable[[Path], object]) -> None:
    bundle = mixed.copy(tmp_path / "bundle")
    damage(bundle)
    before = snapshot(bundle)
    with pytest.raises(BundleError):
        build_target(bundle)
    assert snapshot(bundle) == before


def test_an_unknown_backend_names_the_known_ones(mixed: Made) -> None:
    with pytest.raises(UsageError, match=r"unknown backend 'abacus'; known: onnxruntime"):
        build_target(mixed.bundle, "abacus")


def test_a_build_from_the_command_line_records_its_options(mixed: Made, tmp_path: Path) -> None:
    bundle = mixed.copy(tmp_path / "bundle")
    assert run_cli("build", bundle, "--threads", 3, "--unfused").code == 0
    assert json.loads((bundle / "onnxruntime" / MANIFEST).read_text())["options"] == {
        "provider": "cpu",
        "threads": 3,
        "unfused": True,
    }


# ------------------------------------------------------------------------------------------------- execution providers


@pytest.mark.parametrize(
    ("provider", "name", "cure"),
    [
        ("cuda", "CUDAExecutionProvider", "pip uninstall -y onnxruntime; then pip install 'onnxruntime-gpu["),
        ("tensorrt", "TensorrtExecutionProvider", "; and TensorRT"),
        ("nv-tensorrt-rtx", "NvTensorRTRTXExecutionProvider", "install a build of ONNX Runtime with it"),
    ],
)
def test_a_provider_that_is_not_here_is_an_error(
    mixed: Made, tmp_path: Path, provider: str, name: str, cure: str
) -> None:
    if name in onnxruntime.get_available_providers():
        pytest.skip(f"needs an ONNX Runtime without {name}")
    bundle = mixed.copy(tmp_path / "bundle")
    before = snapshot(bundle)
    answer = run_cli("-q", "build", bundle, "--provider", provider)
    assert answer.code == BackendError.exit_code
    assert f"this ONNX Runtime has no {name}, only " in answer.error
    assert cure in answer.error
    assert answer.error.endswith("; or build again for another --provider")
    assert snapshot(bundle) == before
    # Nor does ONNX Runtime's own habit of taking the CPU instead go unnoticed.
    device = OrtDevice(provider=PROVIDERS[provider])
    refusal = rf"would run it with CPUExecutionProvider, not with {name} as it was built|Unknown Provider Type: {name}"
    with pytest.raises(BackendError, match=refusal):
        device.load(bundle / ONNX_FOLDER / "full.onnx")


def test_a_target_for_a_gpu_is_not_run_on_the_cpu(mixed: Made, tmp_path: Path) -> None:
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("needs an ONNX Runtime without CUDA")
    bundle = mixed.copy(tmp_path / "bundle")
    target = bundle / "onnxruntime" / MANIFEST
    document = json.loads(target.read_text(encoding="utf-8"))
    document["options"] = {"provider": "cuda"}
    target.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(BackendError, match="this ONNX Runtime has no CUDAExecutionProvider"):
        tc_deploy.load(bundle)


def test_shared_weights_are_the_cpu_s(mixed: Made) -> None:
    with pytest.raises(BackendError, match="takes the option weights with provider cpu only"):
        OnnxRuntime().open({"provider": "cuda", "weights": "shared"})
