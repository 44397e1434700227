"""What ONNX Runtime and OpenVINO have in common: buffers in host memory, graphs compiled at load, one-line refusals."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from backends.buffers import buffer_of
from bundles import Made, snapshot
from numpy.typing import NDArray
from tolerances import tolerance

from tc_deploy.backends import registry
from tc_deploy.backends.base import Device
from tc_deploy.backends.build import build_target
from tc_deploy.backends.host import HostBuffer
from tc_deploy.errors import BackendError
from tc_deploy.manifest import ONNX_FOLDER, SOLVER, GraphRecord, read_manifest

ROWS = 2


@dataclass(frozen=True, kw_only=True)
class Engine:
    """One of the two, and how it differs from the other."""

    backend: str
    title: str
    options: str
    """How the refusal of an option begins."""
    wrong_options: tuple[Mapping[str, object], ...]
    spoil: Callable[[dict[str, HostBuffer]], object]
    """Make the next run of a bound graph fail, by the buffers of its inputs."""
    seen: Callable[[Any], NDArray[Any]]
    """The engine's own view of a buffer."""


def a_label_that_no_model_has(inputs: dict[str, HostBuffer]) -> None:
    inputs["class_labels"].write(np.full(ROWS, 99, np.int32))


def a_tensor_that_shrank(inputs: dict[str, HostBuffer]) -> None:
    inputs["timestep"].value.shape = [1]


WRONG_THREADS = ({"threads": -1}, {"threads": "2"}, {"threads": 1, "colour": "red"}, {"weights": "twice"})
ENGINES = (
    Engine(
        backend="onnxruntime",
        title="ONNX Runtime",
        options="takes the options threads.*provider.*weights.*unfused",
        wrong_options=(*WRONG_THREADS, {"unfused": 1}, {"provider": "abacus"}, {"provider": None}),
        spoil=a_label_that_no_model_has,
        seen=lambda value: value.numpy(),
    ),
    Engine(
        backend="openvino",
        title="OpenVINO",
        options="takes the options device.*threads.*precision.*weights",
        wrong_options=(*WRONG_THREADS, {"device": "GPU"}, {"precision": "f8"}, {"precision": None}),
        spoil=a_tensor_that_shrank,
        seen=lambda value: value.data,
    ),
)


@pytest.fixture(scope="module", params=ENGINES, ids=lambda engine: engine.backend)
def engine(request: pytest.FixtureRequest) -> Engine:
    """Each of the two in turn."""
    found: Engine = request.param
    return found


@pytest.fixture(scope="module")
def device(engine: Engine) -> Device:
    """The CPU with one thread, in fp32."""
    return registry.backend(engine.backend).open({"threads": 1})


def buffers_of(device: Device, record: GraphRecord) -> tuple[dict[str, HostBuffer], dict[str, HostBuffer]]:
    """Inputs and outputs of a guided graph for one sample."""
    sizes = {"batch": 1, "model_batch": ROWS}
    inputs, outputs = (
        {
            tensor.name: buffer_of(
                device, np.dtype(tensor.dtype), tuple(sizes.get(size, size) for size in tensor.shape)
            )
            for tensor in tensors
        }
        for tensors in (record.inputs, record.outputs)
    )
    return inputs, outputs


# ------------------------------------------------------------------------------------------------------------- buffers


@pytest.mark.parametrize("dtype", ["float32", "int32", "int64"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4)])
def test_a_buffer_starts_at_zero_and_keeps_a_copy_of_what_is_written(
    engine: Engine, device: Device, dtype: str, shape: tuple[int, ...]
) -> None:
    buffer = buffer_of(device, np.dtype(dtype), shape)
    assert (buffer.read() == np.zeros(shape, dtype)).all()
    values = np.arange(1, 1 + np.prod(shape), dtype=dtype).reshape(shape)
    kept = values.copy()
    buffer.write(values)
    values[...] = 0
    buffer.read()[...] = 0
    found = buffer.read()
    assert (found.dtype, found.shape) == (np.dtype(dtype), shape)
    assert np.array_equal(found, kept)
    assert np.array_equal(engine.seen(buffer.value), kept)


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
def test_nothing_is_converted_or_broadcast_into_a_buffer(device: Device, array: np.ndarray) -> None:
    buffer = buffer_of(device, np.dtype("float32"), (2, 4))
    with pytest.raises(ValueError, match=r"expected float32 \(2, 4\), found"):
        buffer.write(array)
    assert not buffer.read().any()


# -------------------------------------------------------------------------------------------------------------- graphs


def test_a_bound_graph_reads_and_writes_its_buffers_at_every_run(mixed: Made, engine: Engine, device: Device) -> None:
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
        assert error <= tolerance(engine.backend, "fp32", "max_abs")
        scaled = np.stack([expected * drawn["input_scale"][0]] * 2)
        assert np.abs(outputs["hidden_states"].read() - scaled).max() <= tolerance(engine.backend, "fp32", "max_abs")


def test_a_failing_run_is_a_backend_error(mixed: Made, engine: Engine, device: Device) -> None:
    record = read_manifest(mixed.bundle).graphs["full"]
    inputs, outputs = buffers_of(device, record)
    bound = device.load(mixed.bundle / record.file).bind(inputs, outputs)
    bound.run()
    engine.spoil(inputs)
    with pytest.raises(BackendError, match=rf"^{engine.title} fails: .*") as raised:
        bound.run()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("damage", ["garbage", "no weights", "missing"])
def test_a_graph_that_cannot_be_loaded_is_a_backend_error(
    mixed: Made, engine: Engine, device: Device, tmp_path: Path, damage: str
) -> None:
    path = tmp_path / "full.onnx"
    if damage == "garbage":
        path.write_bytes(b"no graph")
    elif damage == "no weights":
        shutil.copy(mixed.bundle / ONNX_FOLDER / "full.onnx", path)
    with pytest.raises(BackendError, match=rf"full\.onnx: {engine.title} refuses the graph: ") as raised:
        device.load(path)
    assert str(path) in str(raised.value)
    assert "Exception from" not in str(raised.value)
    assert "\n" not in str(raised.value)


# ----------------------------------------------------------------------------------------- options, without the library


def test_an_option_that_it_does_not_know_is_refused(engine: Engine) -> None:
    for options in engine.wrong_options:
        with pytest.raises(BackendError, match=rf"{engine.backend} {engine.options}.*found"):
            registry.backend(engine.backend).open(options)


@pytest.mark.parametrize("command", ["build", "generate"])
@pytest.mark.parametrize(
    ("backend", "replacement", "message"),
    [
        ("onnxruntime", "None", "onnxruntime is not installed: pip install 'onnxruntime>=1.22'"),
        # What is left where the CPU and the CUDA build were installed over each other and one was removed.
        (
            "onnxruntime",
            "types.ModuleType('onnxruntime')",
            (
                "onnxruntime is installed but does not load: onnxruntime and onnxruntime-gpu were installed over"
                " each other; uninstall both, then install one (tc-deploy doctor shows it)"
            ),
        ),
        ("openvino", "None", "openvino is not installed: pip install 'ml-dtypes>=0.5' 'openvino>=2025.0'"),
    ],
    ids=["onnxruntime missing", "onnxruntime broken", "openvino missing"],
)
def test_a_machine_without_the_library_is_told_the_extra(
    mixed: Made, tmp_path: Path, command: str, backend: str, replacement: str, message: str
) -> None:
    bundle = mixed.copy(tmp_path / "bundle")
    if not (bundle / backend).exists():
        build_target(bundle, backend)
    output = tmp_path / "x.npy"
    rest = ["--class-label", "1", "-o", str(output)] if command == "generate" else []
    program = (
        f"import sys, types; sys.modules[{backend!r}] = {replacement};"
        " from tc_deploy.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    words = ["-q", command, str(bundle), "--backend", backend, *rest]
    before = snapshot(bundle)
    answer = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=False)
    assert answer.returncode == BackendError.exit_code
    assert answer.stderr == f"error: {message}\n"
    assert snapshot(bundle) == before
    assert not output.exists()
