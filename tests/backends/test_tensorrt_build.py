"""TensorRT's build: real engines of TensorRT-RTX, which needs no GPU for them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tensorrt_rtx
from bundles import Made, MadeByCommands, reseal, run_cli, snapshot

from tc_deploy.backends.build import build_target
from tc_deploy.backends.tensorrt.build import EngineJob, PhaseTree, build_engine, configure
from tc_deploy.bundle import sha256_of_file
from tc_deploy.errors import BackendError, BundleError, TcDeployError, UsageError
from tc_deploy.manifest import (
    ONNX_FOLDER,
    SOLVER,
    WEIGHTS,
    EngineIdentity,
    ProfileRecord,
    read_engine_record,
    read_manifest,
    read_target,
)

NAME = "tensorrt-rtx"
CAPABILITIES = ["8.6", "8.9", "12.0"]
GRAPHS = ("cached-1", "cached-2", "full", "solver")
PROFILE = (1, 2, 4)


def test_a_target_says_what_its_engines_are_made_from_and_for(built: Made) -> None:
    manifest, target = read_manifest(built.bundle), read_target(built.bundle, NAME)
    assert (target.backend, target.backend_version) == (NAME, tensorrt_rtx.__version__)
    assert target.options == {"use_cuda_graph": True, "compute_capability": CAPABILITIES, "batch_profile": [1, 2, 4]}
    assert (target.precision, target.gpu) == ("fp32", None)
    assert target.plan_sha256 == sha256_of_file(built.bundle / "plan.json")
    assert sorted(target.files) == sorted(f"{name}.{kind}" for name in GRAPHS for kind in ("engine", "json", "log"))
    for name in GRAPHS:
        record = read_engine_record(built.bundle / NAME / f"{name}.engine")
        assert record.onnx_sha256 == sha256_of_file(built.bundle / ONNX_FOLDER / f"{name}.onnx")
        assert record.weights_sha256 == sha256_of_file(built.bundle / ONNX_FOLDER / WEIGHTS)
        (profile,) = record.profiles
        assert (profile.graphs, profile.inputs) == ((name,), manifest.graphs[name].inputs)
        assert profile.outputs == manifest.graphs[name].outputs
        axes = {"model_batch": (2, 4, 8)} | ({"batch": PROFILE} if name == SOLVER else {})
        assert record.axes == axes
        assert record.layers > 10
        assert record.build_s > 0
        assert record.peak_memory_mib > 50
        assert record.warnings == ()
        assert "info: Engine generation completed" in (built.bundle / NAME / f"{name}.log").read_text()


def test_a_target_is_shown(built: Made) -> None:
    out = run_cli("inspect", built.bundle).out
    assert (
        f"engines   {NAME} {tensorrt_rtx.__version__}, fp32, batch_profile 1 2 4, compute_capability 8.6 8.9 12.0,"
        " use_cuda_graph True" in out
    )
    for name in GRAPHS:
        assert f"          {name}: " in out
    engines = json.loads(run_cli("inspect", built.bundle, "--json").out)["targets"][NAME]["engines"]
    assert sorted(engines) == sorted(GRAPHS)
    assert engines["full"]["size_bytes"] == (built.bundle / NAME / "full.engine").stat().st_size


def test_only_what_has_changed_is_built_again(built: Made, tmp_path: Path) -> None:
    bundle = built.copy(tmp_path / "bundle")
    options = read_target(bundle, NAME).options
    before = snapshot(bundle)
    told: list[str] = []
    build_target(bundle, NAME, options, lambda what, done, total: told.append(what))
    assert told[1:] == [f"{name} is unchanged" for name in read_manifest(bundle).graphs]
    assert snapshot(bundle) == before
    # A comment in one graph makes it another graph.
    path = bundle / ONNX_FOLDER / "solver.onnx"
    path.write_bytes(path.read_bytes() + b"\x32\x01x")
    reseal(bundle)
    told.clear()
    build_target(bundle, NAME, options, lambda what, done, total: told.append(what))
    assert [what for what in told if "unchanged" in what] == [
        f"{name} is unchanged" for name in read_manifest(bundle).graphs if name != SOLVER
    ]
    told.clear()
    build_target(bundle, NAME, {**options, "compute_capability": ["8.9"]}, lambda what, *_: told.append(what))
    assert not [what for what in told if "unchanged" in what]


def test_a_bundle_of_a_fixed_batch_needs_no_profile(pixel: MadeByCommands, tmp_path: Path) -> None:
    bundle = pixel.copy(tmp_path / "bundle")
    build_target(bundle, NAME, {"optimization_level": 1, "workspace_mib": 64})
    for name in read_manifest(bundle).graphs:
        record = read_engine_record(bundle / NAME / f"{name}.engine")
        assert record.axes == {}
        assert record.options["optimization_level"] == 1
    with pytest.raises(UsageError, match=r"exported for a batch of exactly 2; leave --batch-profile out$"):
        build_target(bundle, NAME, {"batch_profile": (1, 1, 1)})


def refused(bundle: Path, error: type[TcDeployError], message: str, *words: object) -> None:
    """Check that a build is refused in one line and leaves the bundle as it was."""
    before = snapshot(bundle)
    answer = run_cli("build", bundle, *words)
    assert (answer.code, answer.out) == (error.exit_code, "")
    assert message in answer.error
    assert snapshot(bundle) == before
    assert not [path for path in bundle.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--threads", 2), "--threads is no option of tensorrt-rtx"),
        (("--compute-capability", "9.0"), "builds for compute capabilities 7.5, 8.0, "),
        (
            ("--compute-capability", "89"),
            "compute_capability: expected numbers such as 8.6, parted by commas, found '89'",
        ),
        (("--batch-profile", 2, 1, 4), "expected the least, the best and the largest number of samples"),
        (("--batch-profile", 0, 1, 4), "'--batch-profile': 0 is not in the range 1<=x"),
        (("--optimization-level", 6), "'--optimization-level': 6 is not in the range 0<=x<=5"),
        (("--workspace-mib", 0), "'--workspace-mib': 0 is not in the range 1<=x"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_an_option_that_does_not_fit_is_refused(mixed: Made, words: tuple[object, ...], message: str) -> None:
    refused(mixed.bundle, UsageError, message, "--backend", NAME, *words)


@pytest.mark.parametrize(
    ("name", "value", "place"),
    [
        ("batch_profile", (0, 1, 4), "batch_profile.0"),
        ("optimization_level", 6, "optimization_level"),
        ("workspace_mib", 0, "workspace_mib"),
    ],
)
def test_an_option_that_does_not_fit_is_refused_by_the_library_too(
    mixed: Made, name: str, value: object, place: str
) -> None:
    before = snapshot(mixed.bundle)
    with pytest.raises(UsageError, match=rf"{NAME}: {place}: "):
        build_target(mixed.bundle, NAME, {name: value})
    assert snapshot(mixed.bundle) == before


def test_an_option_of_tensorrt_is_not_one_of_onnxruntime(mixed: Made) -> None:
    refused(mixed.bundle, UsageError, "--workspace-mib is no option of onnxruntime", "--workspace-mib", 64)


def test_turing_takes_no_fp32_graph(mixed: Made, bf16: Made, tmp_path: Path) -> None:
    words = ("--backend", NAME, "--compute-capability", "7.5,8.9")
    for made, precision in ((mixed, "fp32"), (bf16, "bf16")):
        message = f"takes matrix products in fp16 alone, and this bundle's are in {precision}; leave 7.5 out, or"
        refused(made.bundle, UsageError, message, *words)
    # As the builder itself finds.
    full = mixed.bundle / ONNX_FOLDER / "full.onnx"
    with pytest.raises(BackendError, match=r"for Turing \(SM75\): FP32 GEMM is not supported"):
        build_engine(job(tmp_path, mixed.bundle, graph="full", onnx=str(full), compute_capabilities=("SM75",)), ignore)


@pytest.mark.parametrize(("precision", "capabilities"), [("fp16", "8.6,8.9"), ("fp16", "7.5"), ("bf16", "8.6,8.9")])
def test_half_precision_is_built(
    request: pytest.FixtureRequest, tmp_path: Path, precision: str, capabilities: str
) -> None:
    made: Made = request.getfixturevalue(precision)
    bundle = made.copy(tmp_path / "bundle")
    words = ("--compute-capability", capabilities, "--batch-profile", 1, 2, 4)
    answer = run_cli("build", bundle, "--backend", NAME, *words)
    assert answer.code == 0, answer.err
    assert read_target(bundle, NAME).precision == precision
    for name in read_manifest(bundle).graphs:
        assert read_engine_record(bundle / NAME / f"{name}.engine").warnings == ()
    kind = {"fp16": "float16", "bf16": "bfloat16"}[precision]
    inputs = read_engine_record(bundle / NAME / "cached-1.engine").profiles[0].inputs
    assert {tensor.dtype for tensor in inputs if tensor.name.startswith("cache.")} == {kind}


def test_large_weights_are_worth_a_word(built: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = built.copy(tmp_path / "bundle")
    options = read_target(bundle, NAME).options
    told: list[str] = []
    build_target(bundle, NAME, options, lambda what, *_: told.append(what))
    assert not [what for what in told if "--one-graph" in what]
    monkeypatch.setattr("tc_deploy.backends.tensorrt.backend.LARGE_WEIGHTS_MIB", 0)
    build_target(bundle, NAME, options, lambda what, *_: told.append(what))
    assert "3 engines will hold the weights; tc-deploy export --one-graph makes one of them" in told


def test_engines_that_are_not_captured_are_others(built: Made, tmp_path: Path) -> None:
    bundle = built.copy(tmp_path / "bundle")
    words = ("--compute-capability", ",".join(CAPABILITIES), "--batch-profile", *PROFILE)
    answer = run_cli("build", bundle, "--backend", NAME, *words, "--no-cuda-graph")
    assert answer.code == 0, answer.err
    assert "is unchanged" not in answer.err
    assert read_target(bundle, NAME).options["use_cuda_graph"] is False
    assert "use_cuda_graph False" in run_cli("inspect", bundle).out
    refused(bundle, UsageError, "--use-cuda-graph is no option of onnxruntime", "--no-cuda-graph")


def test_flags_reach_the_builder(mixed: Made, tmp_path: Path) -> None:
    # With the runtime left out it builds here; stripped it asks for the GPU that is not there.
    flags = ("VERSION_COMPATIBLE", "EXCLUDE_LEAN_RUNTIME")
    build_engine(job(tmp_path, mixed.bundle, flags=flags, hardware_compatibility="ampere-plus"), ignore)
    with pytest.raises(BackendError, match="libnvinfer_lean"):
        build_engine(job(tmp_path, mixed.bundle, flags=flags[:1]), ignore)


def test_fp32_products_are_not_tf32(mixed: Made, tmp_path: Path) -> None:
    config = tensorrt_rtx.Builder(tensorrt_rtx.Logger()).create_builder_config()
    assert config.get_flag(tensorrt_rtx.BuilderFlag.TF32), "what TensorRT does by itself"
    configure(tensorrt_rtx, config, job(tmp_path, mixed.bundle))
    assert not config.get_flag(tensorrt_rtx.BuilderFlag.TF32)


def test_a_graph_that_does_not_parse_is_refused(mixed: Made, tmp_path: Path) -> None:
    bundle = mixed.copy(tmp_path / "bundle")
    (bundle / ONNX_FOLDER / "cached-1.onnx").write_bytes(b"no graph")
    with pytest.raises(BackendError, match=r"cached-1\.onnx: tensorrt_rtx builds no engine: "):
        build_engine(job(tmp_path, bundle, "cached-1"), ignore)
    reseal(bundle)
    refused(bundle, BundleError, "cached-1.onnx: ", "--backend", NAME)


def ignore(done: int, total: int) -> None:
    """Progress that nobody watches."""


def job(folder: Path, bundle: Path, graph: str = SOLVER, **changes: object) -> EngineJob:
    """A job for one graph, the solver's if not told."""
    manifest = read_manifest(bundle)
    record = manifest.graphs[graph]
    identity = EngineIdentity(
        backend=NAME,
        backend_version="0",
        options={},
        onnx_sha256="0",
        weights_sha256="0",
        profiles=(ProfileRecord(graphs=(graph,), inputs=record.inputs, outputs=record.outputs),),
        axes={"batch": (1, 1, 1), "model_batch": (2, 2, 2)},
    )
    fields = {
        "module": "tensorrt_rtx",
        "onnx": str(bundle / record.file),
        "engine": str(folder / "solver.engine"),
        "timing_cache": None,
        "identity": identity,
        "compute_capabilities": (),
        "workspace_mib": None,
        "optimization_level": None,
        "hardware_compatibility": None,
        "flags": (),
    }
    return EngineJob.model_validate(fields | changes)


def test_a_builder_that_dies_is_one_line(mixed: Made, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"no_such_module builds no engine: its process ended with code 1") as raised:
        build_engine(job(tmp_path, mixed.bundle, module="no_such_module"), lambda done, total: None)
    assert "\n" not in str(raised.value)
    assert "No module named 'no_such_module'" in str(raised.value)


def test_a_timing_cache_is_written_and_read(mixed: Made, tmp_path: Path) -> None:
    # TensorRT-RTX keeps nothing in it, but takes it and gives it back as TensorRT does.
    cache = tmp_path / "timing.cache"
    percents: list[int] = []
    for _ in range(2):
        build_engine(job(tmp_path, mixed.bundle, timing_cache=str(cache)), lambda done, total: percents.append(done))
        assert cache.stat().st_size > 0
    assert percents[-1] == 100
    assert percents[: percents.index(100)] == sorted(percents[: percents.index(100)])


def test_phases_add_up_to_a_percentage_that_never_falls() -> None:
    tree = PhaseTree()
    tree.start("build", None, 4)
    assert tree.step("build", 0) == 25
    tree.start("optimise", "build", 2)
    assert tree.step("optimise", 0) == 37
    tree.start("time", "optimise", 10)
    assert tree.step("time", 4) == 43
    tree.finish("time")
    assert tree.step("optimise", 1) == 50
    tree.finish("optimise")
    assert tree.step("build", 1) == 50
    assert tree.step("another's", 3) == 50
    assert tree.step("build", 3) == 100


@pytest.mark.parametrize("graph", GRAPHS)
def test_polygraphy_reads_the_graphs(mixed: Made, graph: str) -> None:
    program = "import sys; from polygraphy.tools import main; sys.exit(main())"
    words = [sys.executable, "-c", program, "inspect", "model", str(mixed.bundle / ONNX_FOLDER / f"{graph}.onnx")]
    answer = subprocess.run(words, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    for tensor in read_manifest(mixed.bundle).graphs[graph].inputs:
        assert f"{tensor.name} [dtype={tensor.dtype}" in answer.stdout
