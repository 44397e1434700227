"""One graph for all variants (``export --one-graph``): what it computes, and how each kind of engine holds it."""

from __future__ import annotations

import gc
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from backends.gpu_stand_in import StandInCudaRuntime
from backends.tensorrt_stand_in import NAME, stand_in
from bundles import MIXED, Made, MadeByCommands, SaveDit, build_rtx, make_plan, run_cli
from kept import Keep
from tolerances import tolerance
from validate import faults

import tc_deploy
from tc_deploy.backends.build import build_target
from tc_deploy.bundle import sha256_of_file
from tc_deploy.errors import BackendError, UsageError
from tc_deploy.export.bundle_export import export_bundle
from tc_deploy.export.options import ExportOptions
from tc_deploy.manifest import ONNX_FOLDER, SOLVER, STEPS, read_engine_record, read_manifest
from tc_deploy.runtime import binding
from tc_deploy.runtime.binding import read_bundle
from tc_deploy.runtime.stepper import Engines
from tc_deploy.types import FloatArray, Precision
from tc_deploy.validate.validation import validate_bundle

VARIANTS = ("full", "cached-1", "cached-2")
LABELS = [1, 2, 3]
SIZES = {"full": (16, 16, 16), "cached-1": (1, 16, 8), "cached-2": (8, 1, 4)}
"""Tokens of the three blocks, each a group of its own; a block that keeps none computes one for nothing."""


@pytest.fixture(scope="module")
def one_graph(kept: Keep, mixed: Made, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The plan of ``mixed``, whose variants skip, prune and keep blocks, as one graph; made by the command line."""

    def make(folder: Path) -> None:
        answer = run_cli("export", mixed.plan, "-o", folder / "bundle", "--one-graph")
        assert answer.code == 0, answer.err
        assert f"{folder}/bundle/onnx/steps.onnx: cached-2, 29 inputs, 11 outputs, at most " in answer.out

    entry = kept("one-graph", make, by_commands=True, file=__file__)
    bundle = Path(shutil.copytree(entry / "bundle", tmp_path_factory.mktemp("one-graph") / "bundle"))
    for backend in ("onnxruntime", "openvino", "torch"):
        build_target(bundle, backend)
    return Made(model=mixed.model, plan=mixed.plan, bundle=bundle)


@pytest.fixture(scope="module")
def expected(mixed: Made) -> dict[bool, FloatArray]:
    """The pictures of separate graphs, by whether all steps are full."""
    with tc_deploy.load(mixed.bundle, batch_size=2) as pipeline:
        return {full: pipeline(class_labels=LABELS, seed=5, full=full).latents for full in (False, True)}


# -------------------------------------------------------------------------------------------------------------- bundles


def test_the_variants_are_one_file_of_which_each_knows_its_own_sizes(one_graph: Made, mixed: Made) -> None:
    manifest = read_manifest(one_graph.bundle)
    assert manifest.one_graph
    assert not read_manifest(mixed.bundle).one_graph
    assert {path.name for path in (one_graph.bundle / ONNX_FOLDER).iterdir()} == {
        "steps.onnx",
        "solver.onnx",
        "weights.bin",
    }
    for name in VARIANTS:
        record = manifest.graphs[name]
        assert record.file == f"{ONNX_FOLDER}/{STEPS}.onnx"
        assert record.max_abs_error is not None
        shapes = {tensor.name: tensor.shape for tensor in (*record.inputs, *record.outputs)}
        for group, size in enumerate(SIZES[name]):
            assert shapes[f"token_index.{group}"] == ("model_batch", 1, size)
            assert shapes[f"cache.{group}.mlp.rows"] == ("model_batch", size, 64)
        assert shapes["cache.0.mlp.1"] == ("model_batch", 16, 64)
    weights = [(made.bundle / ONNX_FOLDER / "weights.bin").stat().st_size for made in (one_graph, mixed)]
    assert weights[0] <= 1.05 * weights[1]


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "torch"])
@pytest.mark.parametrize("full", [False, True])
def test_the_pictures_are_those_of_separate_graphs(
    one_graph: Made, expected: dict[bool, FloatArray], backend: str, full: bool
) -> None:
    with tc_deploy.load(one_graph.bundle, backend, batch_size=2) as pipeline:
        # What an earlier request left in the caches plays no part.
        pipeline(class_labels=[7, 8], seed=1, full=full)
        found = pipeline(class_labels=LABELS, seed=5, full=full).latents
    error = np.abs(found - expected[full]).max() / np.abs(expected[full]).max()
    assert error <= tolerance(backend, "fp32", "trajectory_max_rel")
    assert np.abs(expected[True] - expected[False]).max() > 0.1


def test_a_stepper_runs_it_too(one_graph: Made, mixed: Made) -> None:
    found = []
    for made in (one_graph, mixed):
        engines = Engines(read_bundle(made.bundle, "onnxruntime"))
        assert [tensor.name for tensor in engines.inputs] == ["hidden_states", "class_labels"]
        stepper = engines.stepper(2)
        generator = np.random.default_rng(0)
        found.append(
            [
                stepper.step(
                    {
                        "hidden_states": generator.standard_normal((2, 4, 8, 8), np.float32),
                        "class_labels": np.asarray([1, 2], np.int32),
                    }
                )
                for _ in range(10)
            ]
        )
    assert np.allclose(*found, atol=1e-4)


def small_plan(model: Path, folder: Path, *keep: int, **cache: str) -> Path:
    """A plan of one block, which keeps so many tokens in each phase."""
    cached = {**MIXED["cache"], "keep_counts": tuple((count,) for count in keep), **cache}
    return make_plan(model, folder / "plan", **{**MIXED, "cache": cached})


def test_a_phase_that_skips_the_model_keeps_a_graph_of_its_own(save_dit: SaveDit, tmp_path: Path) -> None:
    plan = small_plan(save_dit(tmp_path / "model", num_layers=1), tmp_path, 0, 8, skip="model")
    bundle = tmp_path / "bundle"
    manifest = export_bundle(plan, bundle, ExportOptions(one_graph=True))
    files = {name: Path(graph.file).stem for name, graph in manifest.graphs.items()}
    assert files == {"full": STEPS, "cached-1": "cached-1", "cached-2": STEPS, "solver": "solver"}
    build_target(bundle)
    assert validate_bundle(bundle).passed
    build_target(bundle, NAME)
    record = read_engine_record(bundle / NAME / "steps.engine")
    assert [profile.graphs for profile in record.profiles] == [("cached-2",), ("full",)]


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "torch"])
def test_it_passes_validation(one_graph: Made, backend: str) -> None:
    record = validate_bundle(one_graph.bundle, backend, against="torch" if backend == "openvino" else "recorded")
    assert record.passed, record.drift.exceeded
    assert {variant.name for variant in record.variants} == {*VARIANTS, SOLVER}
    rows = {output.name for variant in record.variants for output in variant.outputs}
    assert "cache.2.value.rows" in rows


def test_validation_sees_other_tokens_than_the_plan_s(one_graph: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    right = binding.planned_group_inputs

    def wrong(*given: object) -> dict[str, np.ndarray]:
        found = right(*given)  # type: ignore[arg-type]
        return found | {"token_index.2": (found["token_index.2"] + 1) % 16}

    monkeypatch.setattr(binding, "planned_group_inputs", wrong)
    record = validate_bundle(one_graph.bundle, "onnxruntime")
    assert not record.passed
    assert {fault.tensor for fault in record.wiring} == {"token_index.2"}
    assert all(variant.passed for variant in record.variants)


def test_validation_finds_the_block_of_a_fault(one_graph: Made, tmp_path: Path) -> None:
    bundle = one_graph.copy(tmp_path / "bundle")
    faults.edit_graph(bundle, STEPS, faults.gate_twice("transformer_blocks.1"))
    build_target(bundle)
    record = validate_bundle(bundle, "onnxruntime")
    # A cached step of phase 2 keeps nothing of that block; the row that it computes all the same is compared too.
    assert [blame.graph for blame in record.blame] == [*VARIANTS]
    assert {(blame.origin, blame.block) for blame in record.blame} == {("export", "transformer_blocks.1")}


def test_polygraphy_runs_it_on_each_variant_s_inputs(one_graph: Made) -> None:
    folder = one_graph.bundle / "polygraphy"
    for name in VARIANTS:
        words = ["--data-loader-script", f"{folder / 'inputs.py'}:{name.replace('-', '_')}"]
        words += ["--load-outputs", str(folder / f"{name}.outputs.json"), "--atol", "1e-4"]
        model = one_graph.bundle / ONNX_FOLDER / "steps.onnx"
        command = [str(Path(sys.executable).with_name("polygraphy")), "run", str(model), "--onnxrt", *words]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        assert answer.returncode == 0, answer.stdout + answer.stderr
        assert "Passed: " in answer.stdout


@pytest.mark.parametrize("keep_counts", [(0, 0), (16, 16)])
def test_a_plan_whose_variants_are_alike_or_skip_the_model_is_refused(
    tmp_path: Path, pixel: MadeByCommands, keep_counts: tuple[int, int]
) -> None:
    plan = tmp_path / "plan"
    made = run_cli("calibrate", pixel.model, "-o", plan, "--steps", 9, "--samples", 0, "--keep-counts", *keep_counts)
    assert made.code == 0, made.err
    answer = run_cli("export", plan, "-o", tmp_path / "bundle", "--one-graph")
    assert answer.code == UsageError.exit_code
    assert "no cached step of the plan runs the model on some of the tokens" in answer.error
    assert not (tmp_path / "bundle").exists()


def test_graphs_of_the_other_kind_are_not_taken(one_graph: Made, mixed: Made, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="or one graph where there should be several"):
        export_bundle(mixed.plan, tmp_path / "bundle", ExportOptions(graphs_from=(one_graph.bundle,)))
    manifest = export_bundle(
        mixed.plan, tmp_path / "bundle", ExportOptions(graphs_from=(one_graph.bundle,), one_graph=True)
    )
    assert manifest.graphs["full"] == read_manifest(one_graph.bundle).graphs["full"]


# ------------------------------------------------------------------------------------------------------------- TensorRT


@pytest.fixture(scope="module")
def engine(one_graph: Made, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """With a real engine of TensorRT-RTX for 1 to 4 samples."""
    return build_rtx(one_graph, tmp_path_factory.mktemp("engine"))[0]


def test_tensorrt_rtx_builds_one_engine_with_a_profile_per_variant(engine: Made, built: Made) -> None:
    manifest = read_manifest(engine.bundle)
    assert {path.name for path in (engine.bundle / NAME).glob("*.engine")} == {"steps.engine", "solver.engine"}
    record = read_engine_record(engine.bundle / NAME / "steps.engine")
    assert record.onnx_sha256 == sha256_of_file(engine.bundle / ONNX_FOLDER / "steps.onnx")
    assert [profile.graphs for profile in record.profiles] == [(name,) for name in sorted(VARIANTS)]
    for profile in record.profiles:
        (name,) = profile.graphs
        assert profile.inputs == manifest.graphs[name].inputs
        assert profile.outputs == manifest.graphs[name].outputs
    assert record.axes == {"model_batch": (2, 4, 8)}
    assert record.warnings == ()
    log = (engine.bundle / NAME / "steps.log").read_text()
    assert "info: Engine generation completed" in log
    out = run_cli("inspect", engine.bundle).out
    assert "          steps: cached-1, cached-2 and full in one, " in out


def test_it_is_built_again_only_when_something_has_changed(engine: Made, tmp_path: Path) -> None:
    bundle = engine.copy(tmp_path / "bundle")
    options = {"compute_capability": ["8.6", "8.9", "12.0"], "batch_profile": (1, 2, 4)}
    told: list[str] = []
    build_target(bundle, NAME, options, lambda what, done, total: told.append(what))
    assert told[1:] == ["steps is unchanged", "solver is unchanged"]


def test_a_bundle_of_a_fixed_batch_has_profiles_too(save_dit: SaveDit, tmp_path: Path) -> None:
    plan, bundle = small_plan(save_dit(tmp_path / "model", num_layers=1), tmp_path, 8, 4), tmp_path / "bundle"
    export_bundle(plan, bundle, ExportOptions(batch_size=1, one_graph=True, samples=False))
    build_target(bundle, NAME)
    record = read_engine_record(bundle / NAME / "steps.engine")
    assert (len(record.profiles), record.axes) == (3, {})
    shapes = {tensor.name: tensor.shape for tensor in record.profiles[0].inputs}
    assert shapes["token_index.0"] == (2, 1, 8)
    inputs = onnxruntime.InferenceSession(bundle / ONNX_FOLDER / "steps.onnx").get_inputs()
    assert {size for tensor in inputs for size in tensor.shape if isinstance(size, str)} == {"tokens_0"}


@pytest.mark.slow
@pytest.mark.parametrize("precision", [Precision.FP16, Precision.BF16])
def test_in_half_precision_it_builds_without_a_warning(fp16: Made, precision: Precision, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    manifest = export_bundle(fp16.plan, bundle, ExportOptions(precision=precision, one_graph=True))
    assert all((manifest.graphs[name].snr_to_fp32_db or 0) > 20 for name in ("full", "cached-1"))
    build_target(bundle, NAME)
    record = read_engine_record(bundle / NAME / "steps.engine")
    assert record.warnings == ()
    halves = {tensor.dtype for tensor in record.profiles[0].tensors if tensor.name.startswith("cache.")}
    assert halves == {"float16" if precision is Precision.FP16 else "bfloat16"}


def test_each_variant_runs_under_its_profile_and_all_in_the_same_scratch_memory(
    engine: Made, expected: dict[bool, FloatArray], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = StandInCudaRuntime()
    runtime = stand_in(engine.bundle, gpu, monkeypatch)
    with tc_deploy.load(engine.bundle, NAME, batch_size=2) as pipeline:
        assert sorted(runtime.deserialised) == ["solver", "steps"]
        pipeline.warmup()
        for full, latents in expected.items():
            found = pipeline(class_labels=LABELS, seed=5, full=full).latents
            error = np.abs(found - latents).max() / np.abs(latents).max()
            assert error <= tolerance("onnxruntime", "fp32", "trajectory_max_rel")
        assert len(runtime.scratch) == 1
        assert gpu.allocations == 2
    with pytest.raises(BackendError, match=r"model_batch is 10, but the engine was built for 2 to 8"):
        tc_deploy.load(engine.bundle, NAME, batch_size=5)
    del pipeline
    gc.collect()
    assert gpu.leaks == {}
