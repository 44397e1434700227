"""TensorRT's load and run: real engines up to the deserialiser, which needs a GPU; from there on a stand-in."""

from __future__ import annotations

import contextlib
import gc
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tensorrt_rtx
from backends.gpu_stand_in import StandInCudaRuntime
from backends.tensorrt_stand_in import NAME, USER_MANAGED, StandInRuntime, stand_in
from bundles import Made, edit_manifest, reseal, run_cli

import tc_deploy
from tc_deploy.backends import registry
from tc_deploy.backends.cuda import Cuda
from tc_deploy.backends.load import load_target
from tc_deploy.backends.tensorrt.backend import _check_gpu, _is_version_fit, _logger
from tc_deploy.backends.tensorrt.options import TensorRtOptions
from tc_deploy.backends.tensorrt.rtx import KERNELS_SUFFIX, RtxExtras
from tc_deploy.backends.tensorrt.run import TrtDevice
from tc_deploy.bundle import canonical_json
from tc_deploy.errors import BackendError, BundleError, TcDeployError
from tc_deploy.hardware import nvidia_gpus
from tc_deploy.manifest import read_manifest

SUBOPTIMAL = tensorrt_rtx.EngineValidity.SUBOPTIMAL
HOPPER = {"name": "Stand-in Hopper", "compute_capability": "9.0"}

without_gpu = pytest.mark.skipif(bool(nvidia_gpus()[0]), reason="needs a machine without an NVIDIA GPU")


# ---------------------------------------------------------------------------------------------------------------- load


@without_gpu
def test_without_a_gpu_a_sound_target_is_refused_for_that_reason_alone(built: Made, tmp_path: Path) -> None:
    words = ("--backend", NAME, "--class-label", 1, "-o", tmp_path / "x.npy")
    answer = run_cli("generate", built.bundle, *words)
    assert answer.code == BackendError.exit_code
    assert "no NVIDIA GPU to use here: no NVIDIA driver found; see: tc-deploy doctor" in answer.error


def alter(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def another_plan(bundle: Path) -> None:
    (bundle / "plan.json").write_bytes((bundle / "plan.json").read_bytes() + b"\n")
    reseal(bundle)


def edit_target(bundle: Path, **changes: object) -> None:
    edit_manifest(bundle / NAME, lambda document: document.update(changes))


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda bundle: alter(bundle / NAME / "full.engine"), BundleError, "the file was altered"),
        (lambda bundle: alter(bundle / NAME / "full.json"), BundleError, "the file was altered"),
        (lambda bundle: (bundle / NAME / "full.engine").write_bytes(b"x"), BundleError, "truncated or altered"),
        (lambda bundle: (bundle / NAME / "solver.engine").unlink(), BundleError, "solver.engine is missing"),
        (
            lambda bundle: edit_manifest(bundle / NAME, lambda target: target["files"].pop("full.engine")),
            BundleError,
            "no checksum for tensorrt-rtx/full.engine",
        ),
        (another_plan, BundleError, "built from another plan; build again with: tc-deploy build"),
        (
            lambda bundle: edit_manifest(bundle, lambda document: document.update(made_by="another export")),
            BundleError,
            "built from another export of this bundle; build again with: tc-deploy build",
        ),
        (
            lambda bundle: edit_target(bundle, backend_version="1.6.0"),
            BackendError,
            f"1.6.0, found {tensorrt_rtx.__version__} here; install that version or build again with: tc-deploy build",
        ),
    ],
    ids=["altered", "record", "truncated", "missing", "unnamed", "plan", "export", "version"],
)
def test_what_does_not_match_is_refused_before_a_gpu_is_looked_for(
    built: Made, tmp_path: Path, damage: Callable[[Path], object], error: type[TcDeployError], message: str
) -> None:
    bundle = built.copy(tmp_path / "bundle")
    damage(bundle)
    with pytest.raises(error) as raised:
        tc_deploy.load(bundle, NAME)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_engine_for_another_gpu_is_refused_before_it_is_read(built: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = stand_in(built.bundle, StandInCudaRuntime(**HOPPER), monkeypatch)
    with pytest.raises(BackendError) as raised:
        load_target(built.bundle, read_manifest(built.bundle), NAME)
    assert str(raised.value) == (
        f"{built.bundle / NAME}: built for compute capability 8.6, 8.9, 12.0, but this machine's Stand-in Hopper has"
        f" 9.0; build again with: tc-deploy build {built.bundle} --backend {NAME} --compute-capability 8.6,8.9,12.0,9.0"
    )
    assert runtime.deserialised == []


def test_an_engine_built_on_a_gpu_is_for_its_kind(built: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = built.copy(tmp_path / "bundle")
    edit_target(bundle, gpu=Cuda(StandInCudaRuntime()).gpu().model_dump(mode="json"), options={})
    stand_in(bundle, StandInCudaRuntime(), monkeypatch)
    load_target(bundle, read_manifest(bundle), NAME)
    stand_in(bundle, StandInCudaRuntime(**HOPPER), monkeypatch)
    with pytest.raises(BackendError, match=r"built for compute capability 8\.9, but .* has 9\.0; build again with: "):
        load_target(bundle, read_manifest(bundle), NAME)


def test_an_engine_that_the_runtime_refuses_is_a_backend_error(
    built: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = stand_in(built.bundle, StandInCudaRuntime(), monkeypatch)
    bundle = built.copy(tmp_path / "bundle")
    alter(bundle / NAME / "full.engine")
    device = registry.backend(NAME).open({})
    with pytest.raises(BackendError, match=r"full\.engine: tensorrt-rtx refuses the engine: "):
        device.load(bundle / NAME / "full.engine")
    assert runtime.engine_host_code_allowed is False
    (bundle / NAME / "full.engine").write_bytes((built.bundle / NAME / "solver.engine").read_bytes())
    with pytest.raises(BundleError, match=r"full\.engine: its tensors are not those of full\.json; build again"):
        device.load(bundle / NAME / "full.engine")


@without_gpu
def test_the_real_runtime_s_reason_is_in_the_message(built: Made) -> None:
    errors: list[str] = []
    runtime = tensorrt_rtx.Runtime(_logger(tensorrt_rtx, errors))
    device = TrtDevice(NAME, runtime, Cuda(StandInCudaRuntime()), errors, user_managed=USER_MANAGED)
    with pytest.raises(
        BackendError, match=r"solver\.engine: tensorrt-rtx refuses the engine: .*cudaError 35"
    ) as raised:
        device.load(built.bundle / NAME / "solver.engine")
    assert "\n" not in str(raised.value)
    assert runtime.engine_host_code_allowed is False


@without_gpu
def test_tensorrt_rtx_is_asked_before_an_engine_is_deserialised(built: Made) -> None:
    runtime = tensorrt_rtx.Runtime(_logger(tensorrt_rtx, []))
    device = TrtDevice(NAME, runtime, Cuda(StandInCudaRuntime()), [], user_managed=None, rtx=RtxExtras(tensorrt_rtx))
    with pytest.raises(BackendError) as raised:
        device.load(built.bundle / NAME / "solver.engine")
    assert "solver.engine: tensorrt-rtx says that the engine cannot run here: " in str(raised.value)
    assert f"build again with: tc-deploy build {built.bundle} --backend tensorrt-rtx" in str(raised.value)


def test_the_verdict_is_told_and_a_suboptimal_engine_runs(built: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = tensorrt_rtx.EngineInvalidityDiagnostics
    bad = (
        tensorrt_rtx.EngineValidity.INVALID,
        int(reasons.OLD_CUDA_DRIVER) | int(reasons.INSUFFICIENT_GPU_MEMORY),
    )
    extras = RtxExtras(tensorrt_rtx)
    runtime = stand_in(built.bundle, StandInCudaRuntime(), monkeypatch, rtx=extras, verdict=bad)
    with pytest.raises(BackendError, match=r"cannot run here: old cuda driver, insufficient gpu memory; build again"):
        load_target(built.bundle, read_manifest(built.bundle), NAME)
    assert runtime.deserialised == []
    extras.check(Path("x.engine"), StandInRuntime(StandInCudaRuntime(), {}, (SUBOPTIMAL, 1)), bytes(100))


def test_compiled_kernels_are_kept_beside_their_engine(
    built: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = built.copy(tmp_path / "bundle")
    manifest = read_manifest(bundle)
    extras = RtxExtras(tensorrt_rtx)
    kept = bundle / NAME / f"full{KERNELS_SUFFIX}"

    def given_kernels() -> dict[str, bytes | None]:
        runtime = stand_in(bundle, StandInCudaRuntime(), monkeypatch, rtx=extras)
        with tc_deploy.load(bundle, NAME):
            given = {kernels.name: kernels.given for kernels in runtime.kernels}
        gc.collect()
        return given

    assert given_kernels() == dict.fromkeys(manifest.graphs)
    assert given_kernels() == {name: f"kernels of {name}".encode() for name in manifest.graphs}
    # What was damaged, or is another engine's, is not read, and is made anew.
    alter(kept)
    (bundle / NAME / f"solver{KERNELS_SUFFIX}").write_bytes((bundle / NAME / f"cached-1{KERNELS_SUFFIX}").read_bytes())
    found = given_kernels()
    assert (found["full"], found["solver"], found["cached-2"]) == (None, None, b"kernels of cached-2")
    assert given_kernels() == {name: f"kernels of {name}".encode() for name in manifest.graphs}
    # A folder that is gone, or is not ours to write, has none.
    kept.unlink()
    kept.mkdir()
    assert given_kernels()["full"] is None
    assert run_cli("inspect", bundle).code == 0


def test_stripped_weights_come_back_from_the_bundle(
    built: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = built.copy(tmp_path / "bundle")
    engine = bundle / NAME / "solver.engine"
    record = json.loads(engine.with_suffix(".json").read_text(encoding="utf-8"))
    record["options"]["strip_weights"] = True
    engine.with_suffix(".json").write_text(canonical_json(record), encoding="utf-8")
    runtime = stand_in(bundle, StandInCudaRuntime(), monkeypatch)
    runtime.wants_weights = {"solver"}
    registry.backend(NAME).open({}).load(engine)
    assert runtime.wants_weights == set()
    device = TrtDevice(NAME, runtime, Cuda(StandInCudaRuntime()), ["no such weights"], user_managed=USER_MANAGED)
    with pytest.raises(BackendError, match=r"solver\.engine: tensorrt-rtx cannot put the weights back: it gives no"):
        device.load(engine)


@pytest.mark.parametrize(
    ("found", "built_with", "options", "fits"),
    [
        ("10.8.0.43", "10.8.0.43", {}, True),
        ("10.9.0.1", "10.8.0.43", {}, False),
        ("10.9.0.1", "10.8.0.43", {"version_compatible": True}, True),
        ("10.8.0.43", "10.9.0.1", {"version_compatible": True}, False),
        ("11.0.0.1", "10.9.0.1", {"version_compatible": True}, False),
    ],
)
def test_which_version_may_load_an_engine(found: str, built_with: str, options: dict[str, bool], fits: bool) -> None:
    assert _is_version_fit(found, built_with, TensorRtOptions.model_validate(options)) is fits


@pytest.mark.parametrize(
    ("capability", "level", "fits"),
    [("8.9", None, True), ("9.0", None, False), ("9.0", "ampere-plus", True), ("7.5", "ampere-plus", False)],
)
def test_which_gpu_may_run_an_engine(capability: str, level: str | None, fits: bool) -> None:
    built_on = Cuda(StandInCudaRuntime()).gpu()
    found = Cuda(StandInCudaRuntime(compute_capability=capability)).gpu()
    options = TensorRtOptions.model_validate({"hardware_compatibility": level})
    expected = contextlib.nullcontext() if fits else pytest.raises(BackendError, match="built for compute capability")
    with expected:
        _check_gpu(Path("x"), found, built_on, options, "tc-deploy build x")


@pytest.mark.parametrize("command", ["build", "generate"])
def test_a_machine_without_tensorrt_is_told_the_extra(built: Made, tmp_path: Path, command: str) -> None:
    bundle = built.copy(tmp_path / "bundle")
    (bundle / NAME).rename(bundle / "tensorrt")
    # It builds for its own machine's GPU, so its options name none.
    edit_manifest(bundle / "tensorrt", lambda document: document.update(backend="tensorrt", options={}))
    rest = ["--class-label", "1", "-o", str(tmp_path / "x.npy")] if command == "generate" else []
    program = "import sys; sys.modules['tensorrt'] = None; from tc_deploy.cli import main; sys.exit(main(sys.argv[1:]))"
    words = [sys.executable, "-c", program, command, str(bundle), "--backend", "tensorrt", *rest]
    answer = subprocess.run(words, capture_output=True, text=True, check=False)
    assert answer.returncode == BackendError.exit_code
    assert "error: tensorrt is not installed: pip install " in answer.stderr
