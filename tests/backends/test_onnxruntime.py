"""ONNX Runtime as a backend: buffers that are what they were made, graphs bound to them, targets that have worked."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from bundles import Made, edit_manifest, reseal, run_cli, snapshot
from tolerances import tolerance

import tc_deploy
from tc_deploy.backends import registry
from tc_deploy.backends.build import build_target
from tc_deploy.backends.onnxruntime import OnnxRuntime, OrtBuffer, OrtDevice
from tc_deploy.bundle import MANIFEST, sha256_of_file
from tc_deploy.errors import BackendError, BundleError, UsageError
from tc_deploy.manifest import ONNX_FOLDER, SOLVER, WEIGHTS, GraphRecord, read_manifest, read_target

ROWS = 2


@pytest.fixture(scope="module")
def device() -> OrtDevice:
    """The CPU with one thread."""
    return OnnxRuntime().open({"threads": 1})


def buffers_of(device: OrtDevice, record: GraphRecord) -> tuple[dict[str, OrtBuffer], dict[str, OrtBuffer]]:
    """Inputs and outputs of a guided graph for one sample."""
    sizes = {"batch": 1, "model_batch": ROWS}
    inputs, outputs = (
        {
            tensor.name: device.buffer(np.dtype(tensor.dtype), tuple(sizes.get(size, size) for size in tensor.shape))
            for tensor in tensors
        }
        for tensors in (record.inputs, record.outputs)
    )
    return inputs, outputs


# ------------------------------------------------------------------------------------------------------------- buffers


@pytest.mark.parametrize("dtype", ["float32", "int32", "int64"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4)])
def test_a_buffer_starts_at_zero_and_keeps_what_is_written(
    device: OrtDevice, dtype: str, shape: tuple[int, ...]
) -> None:
    buffer = device.buffer(np.dtype(dtype), shape)
    assert (buffer.read() == np.zeros(shape, dtype)).all()
    values = np.arange(np.prod(shape), dtype=dtype).reshape(shape)
    buffer.write(values)
    found = buffer.read()
    assert (found.dtype, found.shape) == (np.dtype(dtype), shape)
    assert np.array_equal(found, values)
    assert np.array_equal(buffer.value.numpy(), values)


def test_what_is_read_is_a_copy_and_what_is_written_is_copied(device: OrtDevice) -> None:
    buffer = device.buffer(np.dtype("float32"), (4,))
    values = np.ones(4, np.float32)
    buffer.write(values)
    values[:] = 2
    buffer.read()[:] = 3
    assert buffer.read().tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize(
    "array",
    [
        np.ones((2, 4), np.float64),
        np.ones((2, 4), np.int32),
        np.ones((2, 4), ">f4"),
        np.ones((4, 2), np.float32),
        np.ones((1, 4), np.float32),
        np.ones(4, np.float32),
        np.float32(1),
        np.ones((0, 4), np.float32),
    ],
    ids=lambda array: f"{array.dtype}{array.shape}",
)
def test_nothing_is_converted_or_broadcast_into_a_buffer(device: OrtDevice, array: np.ndarray) -> None:
    buffer = device.buffer(np.dtype("float32"), (2, 4))
    with pytest.raises(ValueError, match=r"expected float32 \(2, 4\), found"):
        buffer.write(array)
    assert not buffer.read().any()


# -------------------------------------------------------------------------------------------------------------- graphs


def test_a_bound_graph_reads_and_writes_its_buffers_at_every_run(mixed: Made, device: OrtDevice) -> None:
    record = read_manifest(mixed.bundle).graphs[SOLVER]
    inputs, outputs = buffers_of(device, record)
    bound = device.load(mixed.bundle / record.file).bind(inputs, outputs)
    generator = np.random.default_rng(0)
    for scale in (1.0, 3.0):
        drawn = {
            name: generator.standard_normal(buffer.read().shape).astype(np.float32) for name, buffer in inputs.items()
        }
        drawn["guidance_scale"][:] = scale
        for name, array in drawn.items():
            inputs[name].write(array)
        bound.run()
        conditional, unconditional = drawn["model_output"][:, :4]
        guided = unconditional + scale * (conditional - unconditional)
        kept, added = drawn["coefficients"][0]
        expected = kept * drawn["latents"][0] + added * guided
        error = np.abs(outputs["next_latents"].read()[0] - expected).max()
        assert error <= tolerance("onnxruntime", "fp32", "max_abs")
        scaled = np.stack([expected * drawn["input_scale"][0]] * 2)
        assert np.abs(outputs["hidden_states"].read() - scaled).max() <= tolerance("onnxruntime", "fp32", "max_abs")


def test_a_failing_run_is_a_backend_error(mixed: Made, device: OrtDevice) -> None:
    record = read_manifest(mixed.bundle).graphs["full"]
    inputs, outputs = buffers_of(device, record)
    bound = device.load(mixed.bundle / record.file).bind(inputs, outputs)
    bound.run()
    inputs["class_labels"].write(np.full(ROWS, 99, np.int32))
    with pytest.raises(BackendError, match=r"^ONNX Runtime fails: .*") as raised:
        bound.run()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("damage", ["garbage", "no weights", "missing"])
def test_a_graph_that_cannot_be_loaded_is_a_backend_error(
    mixed: Made, device: OrtDevice, tmp_path: Path, damage: str
) -> None:
    path = tmp_path / "full.onnx"
    if damage == "garbage":
        path.write_bytes(b"no graph")
    elif damage == "no weights":
        shutil.copy(mixed.bundle / ONNX_FOLDER / "full.onnx", path)
    with pytest.raises(BackendError, match=r"full\.onnx: ONNX Runtime refuses the graph: ") as raised:
        device.load(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("options", [{"threads": -1}, {"threads": "2"}, {"threads": 1, "colour": "red"}])
def test_an_option_that_it_does_not_know_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(BackendError, match=r"onnxruntime takes the option threads.*found"):
        OnnxRuntime().open(options)


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


@pytest.mark.parametrize("threads", [0, 2])
def test_threads_change_no_picture(mixed: Made, tmp_path: Path, threads: int) -> None:
    bundle = mixed.copy(tmp_path / "bundle")
    build_target(bundle, options={"threads": threads})
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
    assert sorted(path.name for path in bundle.iterdir() if path.is_dir()) == [ONNX_FOLDER]


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


def test_a_build_from_the_command_line_records_the_threads(mixed: Made, tmp_path: Path) -> None:
    bundle = mixed.copy(tmp_path / "bundle")
    assert run_cli("build", bundle, "--threads", 3).code == 0
    assert json.loads((bundle / "onnxruntime" / MANIFEST).read_text())["options"] == {"threads": 3}


# -------------------------------------------------------------------------------------------------- without the library


def run_without_onnxruntime(replacement: str, *words: str) -> subprocess.CompletedProcess[str]:
    program = (
        f"import sys, types; sys.modules['onnxruntime'] = {replacement};"
        " from tc_deploy.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    return subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("replacement", "cure"),
    [
        ("None", "ONNX Runtime is not installed; install tc-deploy[cpu]"),
        # What is left where the CPU and the CUDA build were installed over each other and one was removed.
        ("types.ModuleType('onnxruntime')", "uninstall both, then install one"),
    ],
    ids=["missing", "broken"],
)
@pytest.mark.parametrize("command", ["build", "generate"])
def test_a_machine_without_the_library_is_told_the_extra(
    mixed: Made, tmp_path: Path, command: str, replacement: str, cure: str
) -> None:
    rest = ["--class-label", "1", "-o", str(tmp_path / "x.npy")] if command == "generate" else []
    before = snapshot(mixed.bundle)
    answer = run_without_onnxruntime(replacement, "-q", command, str(mixed.bundle), *rest)
    assert answer.returncode == BackendError.exit_code
    assert answer.stderr.startswith("error: ")
    assert len(answer.stderr.splitlines()) == 1
    assert cure in answer.stderr
    assert snapshot(mixed.bundle) == before
    assert list(tmp_path.iterdir()) == []
