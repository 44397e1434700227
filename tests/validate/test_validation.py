"""Clean bundles pass on every engine that is here; bad input is refused in one line."""

import itertools
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from bundles import Made, edit_manifest, reseal, run_cli, snapshot
from tolerances import tolerance
from validate import faults

from tc_deploy.backends.build import build_target
from tc_deploy.backends.load import load_target
from tc_deploy.backends.openvino.run import precisions_of
from tc_deploy.backends.registry import BACKENDS
from tc_deploy.errors import BundleError
from tc_deploy.golden import POLYGRAPHY, TRAJECTORY, read_golden
from tc_deploy.manifest import Role, read_manifest
from tc_deploy.types import Precision
from tc_deploy.validate.blame import EngineSearch, blame
from tc_deploy.validate.marking import MarkableGraph
from tc_deploy.validate.record import read_validation
from tc_deploy.validate.validation import validate_bundle

openvino = pytest.importorskip("openvino", reason="needs OpenVINO")
BF16 = "bf16" in precisions_of(openvino.Core())


@pytest.fixture(scope="module")
def bundle(mixed: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle with targets of all CPU engines."""
    folder = mixed.copy(tmp_path_factory.mktemp("validate") / "bundle")
    build_target(folder, "openvino", {"threads": 1})
    build_target(folder, "torch")
    return folder


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "torch"])
def test_a_clean_bundle_passes(bundle: Path, backend: str) -> None:
    before = snapshot(bundle)
    record = validate_bundle(bundle, backend)
    assert record.passed
    assert [variant.name for variant in record.variants] == ["full", "cached-1", "cached-2", "solver"]
    assert all(variant.outputs for variant in record.variants)
    # F c1 c1 | F c2 F c2 F c2 F
    assert {variant.name: variant.steps for variant in record.variants} == {
        "full": (0, 5, 9),
        "cached-1": (1, 2),
        "cached-2": (4, 6, 8),
        "solver": (0, 4, 8),
    }
    assert not record.wiring
    assert not record.blame
    assert [repeat.equal for repeat in record.repeats] == [True, True]
    drift = record.drift
    assert drift.algorithm[0] == 0.0
    assert max(value or 0 for value in drift.algorithm) > 100 * max(value or 0 for value in drift.total)
    assert drift.export is not None
    assert (drift.engine is None) == (backend == "onnxruntime")
    assert drift.precision is None
    assert snapshot(bundle) == before


@pytest.mark.parametrize("against", ["torch", "onnxruntime", "openvino"])
def test_every_reference(bundle: Path, against: str) -> None:
    record = validate_bundle(bundle, "onnxruntime", against=against)
    assert record.passed
    assert record.against == against


def test_every_engine_kind_has_its_tolerances() -> None:
    metrics = ("output_max_rel", "output_sqnr_db", "output_cosine", "drift_rel_l2", "image_psnr_db")
    for backend, precision, metric in itertools.product(BACKENDS, Precision, metrics):
        assert tolerance(backend, precision, metric) > 0


def test_a_solver_that_looks_back(multistep: Made) -> None:
    record = validate_bundle(multistep.bundle, against="torch")
    assert record.passed
    (solver,) = (variant for variant in record.variants if variant.name == "solver")
    assert {output.name for output in solver.outputs} == {"next_latents", "hidden_states", "guided_output"}


@pytest.mark.skipif(not BF16, reason="needs a CPU that computes in bf16")
def test_precision_has_a_column_of_its_own(bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    build_target(copy, "openvino", {"threads": 1, "precision": "bf16"})
    record = validate_bundle(copy, "openvino")
    assert record.precision == "bf16"
    drift = record.drift
    assert drift.precision is not None
    assert drift.engine is not None
    assert drift.precision[-1] > 100 * drift.engine[-1]


def test_graphs_in_half_precision(fp16: Made, tmp_path: Path) -> None:
    copy = fp16.copy(tmp_path / "bundle")
    build_target(copy, options={"threads": 1})
    record = validate_bundle(copy, against="torch")
    assert record.passed
    assert record.precision == "fp16"
    drift = record.drift
    assert drift.export is not None
    assert drift.precision is not None
    assert 0 < drift.precision[-1] < max(value or 0 for value in drift.algorithm)


def test_bf16_leaves_no_samples(bf16: Made) -> None:
    manifest = read_manifest(bf16.bundle)
    assert not any(name.startswith(POLYGRAPHY) for name in manifest.files)
    with pytest.raises(BundleError, match="no bfloat16"):
        read_golden(bf16.bundle, manifest)


def test_an_engine_that_departs_is_blamed_by_the_node(bundle: Path, tmp_path: Path) -> None:
    """A right graph on an engine that computes a block wrongly: one that loads a faulty copy of every graph."""

    class Faulty:
        def __init__(self, device: object) -> None:
            self.device = device
            self.buffers = device.buffers  # type: ignore[attr-defined]

        def load(self, path: Path) -> object:
            model = faults.ir.load(path)
            faults.gate_twice("transformer_blocks.1")(model)
            model.graph.sort()
            faults.ir.save(model, path.with_name("faulty.onnx"))
            return self.device.load(path.with_name("faulty.onnx"))  # type: ignore[attr-defined]

    manifest = read_manifest(bundle)
    device, _ = load_target(bundle, manifest, "onnxruntime")
    samples, _ = read_golden(bundle, manifest)
    graph = MarkableGraph(bundle, manifest.graphs["full"], tmp_path)
    search = EngineSearch(graph, samples["full"].inputs[1], "onnxruntime", "fp32", Faulty(device))  # type: ignore[arg-type]
    found = blame("full", 5, search)
    assert (found.origin, found.block) == ("engine", "transformer_blocks.1")
    # What reads the gated value is the first node whose result differs.
    assert [operator.split()[0] for operator in found.operators] == ["Add"]
    assert found.runs <= 2 * 3


def test_command_line(bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "validation.json"
    answer = run_cli("-q", "validate", bundle, "--backend", "openvino", "-o", output, "--json")
    assert answer.code == 0
    record = read_validation(output)
    assert json.loads(answer.out) == record.model_dump(mode="json")
    text = run_cli("validate", bundle, "--backend", "openvino").out
    for word in ("full", "cached-1", "cached-2", "solver", "algorithm", "engine", "PASSED"):
        assert word in text
    assert "FAILED" not in text


def test_failure_is_exit_code_1(mixed: Made, tmp_path: Path) -> None:
    copy = mixed.copy(tmp_path / "bundle")
    faults.swap_index_rows(copy, phase=2)
    build_target(copy, options={"threads": 1})
    answer = run_cli("validate", copy)
    assert answer.code == 1
    assert "FAILED" in answer.out
    assert "token_index_2" in answer.out
    assert "Traceback" not in answer.err


def test_without_samples(mixed: Made, tmp_path: Path) -> None:
    copy = mixed.copy(tmp_path / "bundle")
    edit_manifest(copy, lambda document: document["files"].pop(TRAJECTORY))
    build_target(copy, options={"threads": 1})
    answer = run_cli("validate", copy)
    assert answer.code == 5
    assert "no samples to validate by" in answer.error
    assert "export again" in answer.error


def test_unreadable_samples(mixed: Made, tmp_path: Path) -> None:
    copy = mixed.copy(tmp_path / "bundle")
    (copy / POLYGRAPHY / "full.inputs.json").write_text("{}", encoding="utf-8")
    assert "expected" in run_cli("validate", copy).error
    reseal(copy)
    build_target(copy, options={"threads": 1})
    assert "the samples cannot be read" in run_cli("validate", copy).error


def test_other_mistakes(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "and none is named; choose one with --backend" in run_cli("validate", bundle).error
    magic = run_cli("validate", bundle, "--backend", "onnxruntime", "--against", "magic")
    assert magic.code == 2
    assert "unknown backend 'magic'" in magic.error
    assert "build one with" in run_cli("validate", bundle, "--backend", "tensorrt").error
    elsewhere = run_cli("validate", bundle, "--backend", "onnxruntime", "--against", "torch", "--model", tmp_path)
    assert elsewhere.code == 3
    monkeypatch.setitem(sys.modules, "openvino", None)
    answer = run_cli("validate", bundle, "--backend", "onnxruntime", "--against", "openvino")
    assert answer.code == 7
    assert "openvino is not installed: pip install " in answer.error


def test_samples_are_of_the_trajectory(bundle: Path) -> None:
    """The saved inputs are real: run on them, ONNX Runtime gives the saved outputs, and each sample another."""
    manifest = read_manifest(bundle)
    samples, trajectory = read_golden(bundle, manifest)
    assert trajectory.full.shape == trajectory.cached.shape == (10, 1, 4, 8, 8)
    np.testing.assert_array_equal(trajectory.full[0], trajectory.cached[0])
    session = onnxruntime.InferenceSession(bundle / manifest.graphs["cached-2"].file)
    outputs = [session.run([Role.SAMPLE], feed)[0] for feed in samples["cached-2"].inputs]
    assert len(outputs) == 3
    assert not np.allclose(outputs[0], outputs[2], atol=1e-2)
