"""OpenVINO as a backend: the same numbers as ONNX Runtime, in buffers that stay where they are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import openvino
import pytest
from backends.buffers import buffer_of
from bundles import PIXEL_BATCH, Made, MadeByCommands, edit_manifest, run_cli, snapshot
from numpy.typing import NDArray
from tolerances import tolerance

import tc_deploy
from tc_deploy.backends import registry
from tc_deploy.backends.build import build_target
from tc_deploy.backends.host import HostBuffer
from tc_deploy.backends.openvino.backend import OpenVino
from tc_deploy.backends.openvino.run import OpenVinoDevice, precisions_of
from tc_deploy.bundle import MANIFEST
from tc_deploy.errors import BackendError, BundleError, UsageError
from tc_deploy.manifest import BATCH, MODEL_BATCH, ONNX_FOLDER, SOLVER, WEIGHTS, GraphRecord, Role, read_manifest
from tc_deploy.types import FloatArray

FP32 = {"threads": 1, "precision": "f32"}
BUNDLES = ("mixed", "multistep", "pixel")
GRAPHS = ("full", "cached-1", "cached-2", SOLVER)
LABELS = [3, 9, 0, 3, 7]
SEED = 11
OFFERED = precisions_of(openvino.Core())
LACKING = [precision for precision in ("f32", "bf16", "f16") if precision not in OFFERED]


@pytest.fixture(scope="module")
def built(
    tmp_path_factory: pytest.TempPathFactory, mixed: Made, multistep: Made, pixel: MadeByCommands
) -> dict[str, Path]:
    """A copy of each bundle with engines of both kinds; the latest is built by the command line."""
    folder = tmp_path_factory.mktemp("openvino")
    copies = {name: made.copy(folder / name) for name, made in zip(BUNDLES, (mixed, multistep, pixel), strict=True)}
    build_target(copies["mixed"], "openvino", FP32)
    build_target(copies["multistep"], "openvino", FP32)
    answer = run_cli("build", copies["pixel"], "--backend", "openvino", "--threads", 1)
    assert answer.code == 0, answer.err
    assert answer.out.startswith(f"{copies['pixel'] / 'openvino'}: built with openvino {OpenVino().version()}")
    return copies


@pytest.fixture(scope="module")
def device() -> OpenVinoDevice:
    """The CPU with one thread, in fp32."""
    return OpenVino().open(FP32)


def latents(bundle: Path, backend: str, batch_size: int | None = None, *, full: bool = False) -> FloatArray:
    with tc_deploy.load(bundle, backend, batch_size=batch_size) as pipeline:
        return pipeline(class_labels=LABELS, seed=SEED, full=full).latents


def relative_error(found: FloatArray, expected: FloatArray) -> float:
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


# -------------------------------------------------------------------------------------------------------------- graphs


def input_arrays(record: GraphRecord, batch: int, *, guided: bool) -> dict[str, NDArray[np.generic]]:
    """Something for every input: normal numbers, labels, tokens in order."""
    generator = np.random.default_rng(0)
    sizes = {BATCH: batch, MODEL_BATCH: batch * (2 if guided else 1)}
    arrays: dict[str, NDArray[np.generic]] = {}
    for tensor in record.inputs:
        shape = tuple(sizes.get(str(size), size) for size in tensor.shape)
        if tensor.name == Role.TOKEN_INDEX:
            values = np.broadcast_to(np.arange(shape[1]), shape)
        elif tensor.dtype == "float32":
            values = generator.standard_normal(shape)
        else:
            values = generator.integers(0, 10, shape)
        arrays[tensor.name] = values.astype(tensor.dtype)
    return arrays


def outputs_of(backend: str, bundle: Path, name: str) -> dict[str, FloatArray]:
    """What a graph makes of :func:`input_arrays`."""
    manifest = read_manifest(bundle)
    record = manifest.graphs[name]
    device = registry.backend(backend).open({"threads": 1})
    batch = manifest.batch_size or 1
    inputs = {}
    for key, array in input_arrays(record, batch, guided=manifest.guided).items():
        inputs[key] = buffer_of(device, array.dtype, array.shape)
        inputs[key].write(array)
    sizes = {BATCH: batch, MODEL_BATCH: batch * (2 if manifest.guided else 1)}
    outputs = {
        tensor.name: buffer_of(
            device, np.dtype(tensor.dtype), tuple(sizes.get(str(size), size) for size in tensor.shape)
        )
        for tensor in record.outputs
    }
    device.load(bundle / record.file).bind(inputs, outputs).run()
    return {key: buffer.read() for key, buffer in outputs.items()}


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize("bundle", BUNDLES)
def test_a_graph_computes_what_onnx_runtime_computes(built: dict[str, Path], bundle: str, name: str) -> None:
    if name not in read_manifest(built[bundle]).graphs:
        assert (bundle, name) in {("multistep", "cached-2"), ("pixel", "cached-2")}
        return
    expected = outputs_of("onnxruntime", built[bundle], name)
    found = outputs_of("openvino", built[bundle], name)
    assert set(found) == set(expected)
    for key, values in expected.items():
        assert np.abs(found[key] - values).max() <= tolerance("openvino", "fp32", "max_abs"), key
        assert values.any(), key


@pytest.mark.parametrize("full", [False, True], ids=["cached", "full"])
@pytest.mark.parametrize("bundle", BUNDLES)
def test_a_trajectory_is_onnx_runtime_s(built: dict[str, Path], bundle: str, full: bool) -> None:
    found, expected = (latents(built[bundle], backend, full=full) for backend in ("openvino", "onnxruntime"))
    assert relative_error(found, expected) <= tolerance("openvino", "fp32", "trajectory_max_rel")
    # The comparison can tell a cached run from a full one.
    other = latents(built[bundle], "onnxruntime", full=not full)
    assert relative_error(found, other) > 100 * tolerance("openvino", "fp32", "trajectory_max_rel")


@pytest.mark.parametrize("batch_size", [2, 5])
def test_another_batch_size_gives_the_same_pictures(built: dict[str, Path], batch_size: int) -> None:
    found, expected = (latents(built["mixed"], "openvino", size) for size in (batch_size, 1))
    assert relative_error(found, expected) <= tolerance("openvino", "fp32", "trajectory_max_rel")


def addresses(buffers: Sequence[HostBuffer]) -> list[int]:
    return [buffer.value.data.ctypes.data for buffer in buffers]


def test_a_run_works_in_the_memory_of_its_buffers_and_nowhere_else(mixed: Made, device: OpenVinoDevice) -> None:
    # Two bindings of one graph that share and exchange buffers, as those of rotating caches do.
    record = read_manifest(mixed.bundle).graphs[SOLVER]
    graph = device.load(mixed.bundle / record.file)
    arrays = input_arrays(record, 1, guided=True)
    inputs = {name: buffer_of(device, array.dtype, array.shape) for name, array in arrays.items()}
    for name, array in arrays.items():
        inputs[name].write(array)
    after, scaled = (buffer_of(device, arrays[name].dtype, arrays[name].shape) for name in ("latents", "model_output"))
    before = inputs["latents"]
    scaled = buffer_of(device, np.dtype("float32"), (2, *before.read().shape[1:]))
    forth = graph.bind(inputs, {"next_latents": after, "hidden_states": scaled})
    back = graph.bind({**inputs, "latents": after}, {"next_latents": before, "hidden_states": scaled})
    every = [*inputs.values(), after, scaled]
    places = addresses(every)

    def expected(start: FloatArray) -> FloatArray:
        conditional, unconditional = arrays["model_output"][:, :4]
        guided = unconditional + arrays["guidance_scale"] * (conditional - unconditional)
        return arrays["coefficients"][0, 0] * start + arrays["coefficients"][0, 1] * guided

    for bound, source, sink in ((forth, before, after), (back, after, before), (forth, before, after)):
        start = source.read()
        sink.value.data[...] = np.nan
        bound.run()
        # Seen through the tensor itself: nothing is fetched.
        assert np.abs(sink.value.data - expected(start)).max() <= tolerance("openvino", "fp32", "max_abs")
        assert np.array_equal(source.read(), start)
        assert addresses(every) == places
    for bound, names in (
        (forth, {**inputs, "next_latents": after}),
        (back, {"latents": after, "next_latents": before}),
    ):
        for name, buffer in names.items():
            assert bound._request.get_tensor(name).data.ctypes.data == buffer.value.data.ctypes.data


def test_two_pipelines_in_two_threads_are_independent(built: dict[str, Path]) -> None:
    expected = latents(built["mixed"], "openvino", 2)
    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(lambda _: latents(built["mixed"], "openvino", 2), range(4)):
            assert np.array_equal(found, expected)


def test_buffers_that_do_not_fit_are_a_backend_error(mixed: Made, device: OpenVinoDevice) -> None:
    record = read_manifest(mixed.bundle).graphs["full"]
    arrays = input_arrays(record, 1, guided=True)
    inputs = {name: buffer_of(device, array.dtype, array.shape) for name, array in arrays.items()}
    graph = device.load(mixed.bundle / record.file)
    for wrong in (
        {**inputs, "timestep": buffer_of(device, np.dtype("float32"), (3,))},
        {**inputs, "timestep": buffer_of(device, np.dtype("int32"), (2,))},
        {**inputs, "colour": inputs["timestep"]},
    ):
        with pytest.raises(BackendError, match=r"full\.onnx: OpenVINO refuses the graph: "):
            graph.bind(wrong, {})
    graph.bind(inputs, {}).run()


# ------------------------------------------------------------------------------------------------------------- options


@pytest.mark.skipif(not LACKING, reason="needs a CPU that lacks a precision")
def test_a_precision_that_the_cpu_lacks_is_refused_and_leaves_no_target(mixed: Made, tmp_path: Path) -> None:
    bundle = mixed.copy(tmp_path / "bundle")
    before = snapshot(bundle)
    answer = run_cli("-q", "build", bundle, "--backend", "openvino", "--precision", LACKING[0])
    assert answer.code == BackendError.exit_code
    assert f"does not compute in {LACKING[0]}, only in {', '.join(OFFERED)}" in answer.error
    assert snapshot(bundle) == before


def test_a_precision_for_a_backend_that_has_none_is_refused(mixed: Made, tmp_path: Path) -> None:
    bundle = mixed.copy(tmp_path / "bundle")
    before = snapshot(bundle)
    answer = run_cli("build", bundle, "--precision", "bf16")
    assert answer.code == UsageError.exit_code
    assert "--precision is no option of onnxruntime; add --backend openvino" in answer.error
    assert snapshot(bundle) == before


@pytest.mark.skipif("bf16" not in OFFERED, reason="needs a CPU that computes in bf16")
def test_a_lower_precision_is_recorded_shown_and_used(built: dict[str, Path], tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(built["mixed"], tmp_path / "bundle"))
    assert run_cli("build", bundle, "--backend", "openvino", "--threads", 1, "--precision", "bf16").code == 0
    assert json.loads((bundle / "openvino" / MANIFEST).read_text())["options"] == {
        "device": "cpu",
        "threads": 1,
        "precision": "bf16",
    }
    shown = run_cli("inspect", bundle).out
    assert f"engines   openvino {OpenVino().version()}, bf16, device cpu, threads 1" in shown.splitlines()
    found, expected = (latents(folder, "openvino", full=True) for folder in (bundle, built["mixed"]))
    error = relative_error(found, expected)
    assert tolerance("openvino", "fp32", "trajectory_max_rel") < error
    assert error <= tolerance("openvino", "bf16", "trajectory_max_rel")


# ------------------------------------------------------------------------------------------------ targets and commands


def test_its_target_runs_from_the_command_line(built: dict[str, Path], tmp_path: Path) -> None:
    bundle = built["pixel"]
    assert [path.name for path in (bundle / "openvino").iterdir()] == [MANIFEST]
    output = tmp_path / "x.npy"
    words = [word for label in LABELS for word in ("--class-label", label)]
    answer = run_cli("generate", bundle, "--backend", "openvino", *words, "--seed", SEED, "-o", output)
    assert answer.code == 0, answer.err
    assert answer.out.endswith("s with openvino\n")
    assert np.array_equal(np.load(output, allow_pickle=False), latents(bundle, "openvino"))
    timed = json.loads(run_cli("bench", bundle, "--backend", "openvino", "--rounds", 2, "--json").out)["contenders"][0]
    assert (timed["backend"], timed["batch_size"]) == ("openvino", PIXEL_BATCH)
    assert timed["start_up"]["torch_imported"] is False


@pytest.mark.parametrize(
    "damage",
    [
        lambda bundle: (bundle / ONNX_FOLDER / WEIGHTS).write_bytes(b""),
        lambda bundle: (bundle / ONNX_FOLDER / "full.onnx").write_bytes(b"no graph"),
        lambda bundle: (bundle / "openvino" / MANIFEST).unlink(),
        lambda bundle: edit_manifest(bundle, lambda document: document.update(made_by="another day")),
    ],
    ids=["truncated weights", "altered graph", "no target", "another export"],
)
def test_a_damaged_bundle_is_refused(built: dict[str, Path], tmp_path: Path, damage: Callable[[Path], object]) -> None:
    bundle = Path(shutil.copytree(built["multistep"], tmp_path / "bundle"))
    damage(bundle)
    with pytest.raises(BundleError):
        tc_deploy.load(bundle, "openvino")
