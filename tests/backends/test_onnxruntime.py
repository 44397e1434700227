"""ONNX Runtime as a backend: targets that have worked. test_compiled_at_load.py holds what it shares with OpenVINO."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from bundles import Made, edit_manifest, reseal, run_cli, snapshot
from tolerances import tolerance

import tc_deploy
from tc_deploy.backends import registry
from tc_deploy.backends.build import build_target
from tc_deploy.bundle import MANIFEST, sha256_of_file
from tc_deploy.errors import BackendError, BundleError, UsageError
from tc_deploy.manifest import ONNX_FOLDER, WEIGHTS, read_manifest, read_target
from tc_deploy.samples import POLYGRAPHY

ROWS = 2


def test_its_version_is_the_library_s() -> None:
    assert registry.backend("onnxruntime").version() == onnxruntime.__version__


# --------------------------------------------------------------------------------------------------------------- build


def test_a_target_holds_what_it_was_built_with(mixed: Made, tmp_path: Path) -> None:
    bundle = mixed.copy(tmp_path / "bundle")
    told: list[str] = []
    target = build_target(bundle, "onnxruntime", {"threads": 2}, progress=lambda what, done, total: told.append(what))
    assert target == read_target(bundle, "onnxruntime")
    assert target.options == {"threads": 2}
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


def test_an_engine_that_computes_nonsense_is_refused_and_leaves_no_target(mixed: Made, tmp_path: Path) -> None:
    bundle = mixed.copy(tmp_path / "bundle")
    weights = bundle / ONNX_FOLDER / WEIGHTS
    values = np.fromfile(weights, np.float32)
    values[-100:] = np.nan
    values.tofile(weights)
    reseal(bundle)
    shutil.rmtree(bundle / "onnxruntime")
    before = snapshot(bundle)
    with pytest.raises(BackendError, match=r"\.onnx: output \S+ is not finite on a first run with zeros"):
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
        "threads": 3,
        "unfused": True,
    }
