"""TensorRT's way of running, on a stand-in: none of this has run on a GPU."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tensorrt_rtx
from backends.buffers import buffer_of
from backends.gpu_stand_in import StandInCudaRuntime
from backends.tensorrt_stand_in import NAME, SCRATCH_BYTES, SOLVER_SCRATCH_BYTES, USER_MANAGED, StandInRuntime, stand_in
from bundles import Made
from gpu.captures import captured_and_launched
from tolerances import tolerance

import tc_deploy
from tc_deploy import Pipeline, Step
from tc_deploy.backends.base import BufferSpec, Device
from tc_deploy.backends.cuda import Cuda
from tc_deploy.backends.in_turn import InTurn
from tc_deploy.backends.load import load_target
from tc_deploy.backends.tensorrt.rtx import RtxExtras
from tc_deploy.backends.tensorrt.run import TrtBoundGraph, TrtCapture, TrtDevice
from tc_deploy.bench.clock import Clock, step_by_step
from tc_deploy.errors import BackendError, Cancelled, NotFiniteError
from tc_deploy.manifest import SOLVER, read_manifest
from tc_deploy.runtime.binding import read_bundle
from tc_deploy.runtime.buffers import Kind
from tc_deploy.runtime.layout import pipeline_layout, pipeline_programs
from tc_deploy.runtime.stepper import Engines
from tc_deploy.types import FloatArray
from tc_deploy.validate.trajectory import Recorder

REQUEST: dict[str, Any] = {"class_labels": [1, 2, 3], "seed": 5}
BATCH = 2
TURNS = 2
"""Three pictures in batches of two."""
PLANNED = ["full", "cached-1", "cached-1", *["full", "cached-2"] * 3, "full"]
STEPS = len(PLANNED)
REFUSED = r"^the run cannot be captured as a CUDA graph \(.*\); build again with --no-cuda-graph$"


@pytest.fixture(scope="module")
def expected(built: Made) -> dict[bool, FloatArray]:
    """What ONNX Runtime makes of the request, by whether all steps are full."""
    with tc_deploy.load(built.bundle, "onnxruntime", batch_size=BATCH) as pipeline:
        return {full: pipeline(**REQUEST, full=full).latents for full in (False, True)}


@pytest.fixture
def gpu() -> StandInCudaRuntime:
    return StandInCudaRuntime()


@pytest.fixture
def runtime(built: Made, gpu: StandInCudaRuntime, monkeypatch: pytest.MonkeyPatch) -> StandInRuntime:
    """The registry's TensorRT-RTX, on the stand-in."""
    return stand_in(built.bundle, gpu, monkeypatch)


@pytest.fixture
def pipeline(built: Made, gpu: StandInCudaRuntime, runtime: StandInRuntime) -> Iterator[Pipeline]:
    """Loaded on the stand-in; nothing of it is left behind."""
    with tc_deploy.load(built.bundle, NAME, batch_size=BATCH) as made:
        yield made
    del made
    gc.collect()


def device_on(gpu: StandInCudaRuntime) -> TrtDevice:
    return TrtDevice(NAME, StandInRuntime(gpu, {}), Cuda(gpu), [], user_managed=USER_MANAGED)


def calls_of(variants: list[str]) -> list[str]:
    return [name for variant in variants for name in (variant, SOLVER)]


def reset(gpu: StandInCudaRuntime) -> None:
    gpu.wait()
    gpu.runs.clear()
    gpu.waits = gpu.launches = gpu.allocations = 0


# ----------------------------------------------------------------------------------------------------------- whole runs


def test_the_engines_compute_what_onnx_runtime_s_do(
    pipeline: Pipeline, gpu: StandInCudaRuntime, expected: dict[bool, FloatArray]
) -> None:
    pipeline.warmup()
    pipeline(**REQUEST, full=True)
    for full, latents in expected.items():
        reset(gpu)
        found = pipeline(**REQUEST, full=full).latents
        error = np.abs(found - latents).max() / np.abs(latents).max()
        assert error <= tolerance("onnxruntime", "fp32", "trajectory_max_rel")
        assert gpu.runs == calls_of(["full"] * STEPS if full else PLANNED) * TURNS
        # One launch for a whole run; nothing but the latents at its end was waited for, and nothing allocated.
        assert (gpu.launches, gpu.waits, gpu.allocations) == (TURNS, TURNS, 0)


def test_warming_up_captures_the_plan_s_run(pipeline: Pipeline, gpu: StandInCudaRuntime) -> None:
    pipeline.warmup()
    assert gpu.waits == 1
    gpu.wait()
    assert sorted(gpu.runs) == ["cached-1", "cached-2", "full", SOLVER]
    reset(gpu)
    pipeline(**REQUEST)
    assert gpu.launches == TURNS
    pipeline.warmup()
    reset(gpu)
    pipeline(**REQUEST)
    assert (gpu.launches, gpu.waits) == (TURNS, TURNS)


def test_without_warming_up_the_first_run_is_launched_one_by_one_and_captured(
    pipeline: Pipeline, gpu: StandInCudaRuntime
) -> None:
    first = pipeline(class_labels=[1], seed=5).latents
    assert (gpu.launches, gpu.runs) == (0, calls_of(PLANNED))
    assert np.array_equal(pipeline(class_labels=[1], seed=5).latents, first)
    assert gpu.launches == 1


@pytest.mark.parametrize("full", [False, True])
def test_a_replay_is_bit_for_bit_what_is_launched_one_by_one(
    built: Made, gpu: StandInCudaRuntime, monkeypatch: pytest.MonkeyPatch, full: bool
) -> None:
    made: dict[bool, list[FloatArray]] = {}
    for use_cuda_graph in (False, True):
        stand_in(built.bundle, gpu, monkeypatch, use_cuda_graph=use_cuda_graph)
        reset(gpu)
        with tc_deploy.load(built.bundle, NAME, batch_size=BATCH) as pipeline:
            made[use_cuda_graph] = runs = []
            for _ in range(3):
                runs.append(pipeline(**REQUEST, full=full).latents)
                pipeline(**REQUEST, full=full, on_step=lambda first, step, runs=runs: runs.append(step.read_latents()))
        assert (gpu.launches > 0) == use_cuda_graph
    assert len(made[True]) == 3 * (1 + TURNS * STEPS)
    assert all(map(np.array_equal, made[False], made[True]))


def test_who_looks_at_steps_or_may_cancel_gets_a_launch_per_step(pipeline: Pipeline, gpu: StandInCudaRuntime) -> None:
    ways: tuple[dict[str, Any], ...] = ({"on_step": lambda first, step: None}, {"should_cancel": lambda: False})
    whole = pipeline(**REQUEST).latents
    for way in ways:
        pipeline(**REQUEST, **way)
        reset(gpu)
        assert np.array_equal(pipeline(**REQUEST, **way).latents, whole)
        assert (gpu.launches, gpu.waits) == (TURNS * STEPS, TURNS)
        assert gpu.runs == calls_of(PLANNED) * TURNS


def test_addresses_that_change_after_a_capture_do_not_matter(
    pipeline: Pipeline, gpu: StandInCudaRuntime, expected: dict[bool, FloatArray]
) -> None:
    first = pipeline(**REQUEST).latents
    for graph in pipeline.variants().values():
        graph.run()
    pipeline(**REQUEST, full=True)
    assert np.array_equal(pipeline(**REQUEST).latents, first)


def test_a_context_is_given_only_the_addresses_that_differ(
    built: Made, gpu: StandInCudaRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = stand_in(built.bundle, gpu, monkeypatch, use_cuda_graph=False)
    with tc_deploy.load(built.bundle, NAME) as pipeline:
        pipeline(class_labels=[1])
        runtime.addresses_set = 0
        pipeline(class_labels=[1])
        planned, _ = pipeline_programs(pipeline.manifest, pipeline.plan)
    had: dict[tuple[str, str], str] = {}
    changes = 0
    for _ in range(2):
        changes = 0
        for call in [call for step in planned for call in (step.model, step.solver)]:
            for tensor, buffer in {**call.inputs, **call.outputs}.items():
                changes += had.get((call.graph, tensor)) != buffer
                had[call.graph, tensor] = buffer
    assert runtime.addresses_set == changes


def test_a_request_that_ends_early_leaves_no_trace(pipeline: Pipeline, gpu: StandInCudaRuntime) -> None:
    first = pipeline(**REQUEST).latents
    answers = iter([False, False, False, True])
    with pytest.raises(Cancelled):
        pipeline(**REQUEST, should_cancel=lambda: next(answers))
    # Latents that overflow on the way: what they leave in the caches is not finite.
    for step in pipeline.steps(class_labels=[7], latents=np.full((1, 4, 8, 8), 3e38, np.float32)):
        if step.index == 4:
            with pytest.raises(NotFiniteError):
                step.read_latents()
            break

    def on_step(number: int, step: Step) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        pipeline(**REQUEST, on_step=on_step)
    assert np.array_equal(pipeline(**REQUEST).latents, first)


def test_what_is_to_be_measured_on_a_gpu_measures_what_it_says(
    built: Made, gpu: StandInCudaRuntime, runtime: StandInRuntime
) -> None:
    """The numbers are the stand-in's and mean nothing; which way launches what is what a GPU will do."""
    found = captured_and_launched(built.bundle, NAME, BATCH, rounds=2)
    ways = ["launched", "graph_per_step", "one_graph"]
    assert found["equal_to_launched"] == dict.fromkeys(ways, True)
    assert list(found["latency"]) == list(found["ratio_to_launched"]) == ways
    assert found["ratio_to_launched"]["launched"]["median"] == 1
    # Beside the rounds, a second run of each.
    assert gpu.launches == 3 * (STEPS + 1)


# ------------------------------------------------------------------------------------------------ what is not captured


def test_an_error_while_capturing_ends_the_capture_and_spoils_nothing(
    pipeline: Pipeline, gpu: StandInCudaRuntime, runtime: StandInRuntime, expected: dict[bool, FloatArray]
) -> None:
    runtime.fails_in_capture = {"cached-2"}
    for use in (
        pipeline.warmup,
        lambda: pipeline(**REQUEST),
        lambda: pipeline(**REQUEST),
        lambda: pipeline(**REQUEST, on_step=lambda first, step: None),
    ):
        with pytest.raises(BackendError, match=REFUSED) as raised:
            use()
        assert "cached-2.engine: TensorRT cannot run the engine" in str(raised.value)
        assert not gpu.is_capturing
        assert gc.isenabled()
    # What does not hold the engine is captured all the same.
    pipeline(**REQUEST, full=True)
    runtime.fails_in_capture.clear()
    found = pipeline(**REQUEST).latents
    error = np.abs(found - expected[False]).max() / np.abs(expected[False]).max()
    assert error <= tolerance("onnxruntime", "fp32", "trajectory_max_rel")


def test_what_spoils_a_capture_unseen_is_found_at_its_end(
    built: Made, gpu: StandInCudaRuntime, runtime: StandInRuntime
) -> None:
    device = device_on(gpu)
    buffer = buffer_of(device, "float32", (2,))
    cuda = Cuda(gpu)

    def queue() -> None:
        buffer.write(np.zeros(2, np.float32))

    with pytest.raises(BackendError, match=r"^CUDA fails in cudaMemcpyAsync: operation not permitted when stream is"):
        cuda.captured(queue)
    with pytest.raises(BackendError, match=r"^CUDA fails in cudaStreamEndCapture: operation failed due to a previous"):
        cuda.captured(gpu.spoil)
    with pytest.raises(ZeroDivisionError):
        cuda.captured(lambda: 1 // 0)
    assert not gpu.is_capturing
    assert "graphs" not in gpu.leaks
    cuda.discard(cuda.captured(lambda: None))


def test_tensorrt_rtx_is_asked_and_told_to_compile_ahead(
    built: Made, tmp_path: Path, gpu: StandInCudaRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = built.copy(tmp_path / "bundle")  # kernels are kept there
    runtime = stand_in(bundle, gpu, monkeypatch, rtx=RtxExtras(tensorrt_rtx))
    with tc_deploy.load(bundle, NAME, batch_size=BATCH) as pipeline:
        assert runtime.strategies == [tensorrt_rtx.DynamicShapesKernelSpecializationStrategy.EAGER] * 4
        runtime.uncapturable = {"full"}
        with pytest.raises(BackendError, match=REFUSED) as raised:
            pipeline(**REQUEST)
        assert "full.engine: the engine was not built to be captured" in str(raised.value)
    runtime = stand_in(bundle, gpu, monkeypatch, rtx=RtxExtras(tensorrt_rtx), use_cuda_graph=False)
    runtime.uncapturable = {"full"}
    with tc_deploy.load(bundle, NAME, batch_size=BATCH) as pipeline:
        assert runtime.strategies == [None] * 4
        pipeline(**REQUEST)


def test_graphs_that_are_watched_are_not_captured(
    built: Made, gpu: StandInCudaRuntime, runtime: StandInRuntime
) -> None:
    """They read between the calls, which waits."""
    clock = Clock()
    with Pipeline(built.bundle, NAME, batch_size=1, watch=clock.watch) as pipeline:
        for _ in range(2):
            run = clock.timed(lambda: pipeline(class_labels=[1], on_step=step_by_step), graphs=True)
            assert {name: len(times) for name, times in run.calls_ms.items()} == {
                name: calls_of(PLANNED).count(name) for name in calls_of(PLANNED)
            }
        # But the run that is timed as a whole is the one that serves.
        pipeline(class_labels=[1])
        reset(gpu)
        assert clock.timed(lambda: pipeline(class_labels=[1]), graphs=False).calls_ms == {}
        assert gpu.launches == 1
    recorder = Recorder()
    engines = recorder.wrapped(load_target(built.bundle, read_manifest(built.bundle), NAME))
    with Pipeline(built.bundle, NAME, batch_size=1, engines=engines) as pipeline:
        for _ in range(2):
            pipeline(class_labels=[1])
    assert [call.graph for call in recorder.calls] == calls_of(PLANNED) * 2


def test_a_device_captures_its_own_graphs_if_the_target_says_so(gpu: StandInCudaRuntime) -> None:
    device = device_on(gpu)
    assert isinstance(device.capture([]), TrtCapture)
    assert isinstance(device.capture([SimpleNamespace(run=lambda: None)]), InTurn)
    device = TrtDevice(NAME, StandInRuntime(gpu, {}), Cuda(gpu), [], user_managed=USER_MANAGED, use_cuda_graph=False)
    assert isinstance(device.capture([]), InTurn)


# --------------------------------------------------------------------------------------------- engines that are shared


def test_pipelines_of_other_batch_sizes_on_the_same_engines_do_not_disturb_each_other(
    built: Made, gpu: StandInCudaRuntime, runtime: StandInRuntime, expected: dict[bool, FloatArray]
) -> None:
    """Each set of shapes has contexts of its own: other shapes would make void what was captured of one."""
    engines = load_target(built.bundle, read_manifest(built.bundle), NAME)
    one, two = (Pipeline(built.bundle, NAME, batch_size=size, engines=engines) for size in (1, BATCH))
    for _ in range(3):
        for pipeline in (one, two):
            found = pipeline(**REQUEST).latents
            error = np.abs(found - expected[False]).max() / np.abs(expected[False]).max()
            assert error <= tolerance("onnxruntime", "fp32", "trajectory_max_rel")


def test_a_stepper_replays_its_calls(built: Made, gpu: StandInCudaRuntime, runtime: StandInRuntime) -> None:
    engines = Engines(read_bundle(built.bundle, NAME))
    one, other = engines.stepper(2), engines.stepper(4)

    def trajectory(rows: int) -> list[FloatArray]:
        stepper = {2: one, 4: other}[rows]
        stepper.start()
        latents = np.random.default_rng(0).standard_normal((4, 4, 8, 8), dtype=np.float32)[:rows]
        labels = np.arange(rows, dtype=np.int32)
        return [stepper.step({"hidden_states": latents, "class_labels": labels}) for _ in range(STEPS)]

    first = trajectory(2)
    trajectory(4)
    reset(gpu)
    assert all(map(np.array_equal, trajectory(2), first))
    # The caller reads the output of every step, so it is waited for.
    assert (gpu.launches, gpu.waits) == (STEPS, STEPS)
    assert gpu.runs == PLANNED


# -------------------------------------------------------------------------------------------------------------- memory


def test_a_pipeline_s_memory_is_the_layout_in_one_piece(
    built: Made, gpu: StandInCudaRuntime, runtime: StandInRuntime
) -> None:
    with tc_deploy.load(built.bundle, NAME, batch_size=BATCH) as pipeline:
        programs = pipeline_programs(pipeline.manifest, pipeline.plan)
        layout = pipeline_layout(pipeline.manifest, programs, BATCH)
        # And one for the scratch memory of all engines.
        assert gpu.allocations == 2
        assert gpu.live_bytes == layout.size_bytes + SCRATCH_BYTES
        assert len(runtime.scratch) == 1
        buffers = {name: buffer.address for name, buffer in pipeline._buffers.items()}
        first = min(buffers.values())
        assert buffers == {planned.key: first + planned.offset_bytes for planned in layout.buffers}
        pipeline.warmup()
        pipeline(**REQUEST, on_step=lambda number, step: None)
        assert gpu.allocations == 2
        assert gpu.leaks.keys() == {"memory", "pinned", "launchables"}
    gc.collect()
    assert gpu.leaks == {}


def test_an_engine_that_wants_more_scratch_memory_than_is_there_gets_another_piece(
    built: Made, gpu: StandInCudaRuntime, runtime: StandInRuntime
) -> None:
    manifest = read_manifest(built.bundle)
    device, graphs = load_target(built.bundle, manifest, NAME, lambda name: False)
    assert not graphs

    def bound(device: Device, name: str) -> TrtBoundGraph:
        record, axes = manifest.graphs[name], manifest.batch_axes(1)
        tensors = (*record.inputs, *record.outputs)
        specs = [BufferSpec(dtype=tensor.numpy_dtype, shape=tensor.shape_at(axes)) for tensor in tensors]
        buffers = dict(zip([tensor.name for tensor in tensors], device.buffers(specs), strict=True))
        made = device.load(built.bundle / NAME / f"{name}.engine").bind(
            {tensor.name: buffers[tensor.name] for tensor in record.inputs},
            {tensor.name: buffers[tensor.name] for tensor in record.outputs},
        )
        assert isinstance(made, TrtBoundGraph)
        return made

    small, large = bound(device, SOLVER), bound(device, "full")
    assert len(runtime.scratch) == 2
    for graph in (small, large, small):
        graph.run()
    gpu.wait()
    before = gpu.live_bytes
    del small, graph
    gc.collect()
    assert gpu.live_bytes < before - SOLVER_SCRATCH_BYTES
    large.run()
    gpu.wait()
    del large, device
    gc.collect()
    assert gpu.leaks == {}


def test_a_run_that_outlives_its_pipeline_keeps_what_it_needs(
    built: Made, gpu: StandInCudaRuntime, runtime: StandInRuntime
) -> None:
    with tc_deploy.load(built.bundle, NAME) as pipeline:
        whole = pipeline(class_labels=[1]).latents
        steps = pipeline.steps(class_labels=[1])
        next(steps)
    *_, last = steps
    assert np.array_equal(last.read_latents(), whole)
    del pipeline, steps, last, _
    gc.collect()
    assert gpu.leaks == {}


@pytest.mark.parametrize("exchanged", [False, True])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4)])
def test_a_buffer_starts_at_zero_and_keeps_what_is_written(
    gpu: StandInCudaRuntime, shape: tuple[int, ...], exchanged: bool
) -> None:
    buffer = buffer_of(device_on(gpu), "int32", shape, exchanged=exchanged)
    assert (buffer.read() == np.zeros(shape)).all()
    values = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
    buffer.write(values)
    kept = values.copy()
    values[...] = -1
    found = buffer.read()
    assert np.array_equal(found, kept)
    found[...] = -1
    assert np.array_equal(buffer.read(), kept)
    for wrong in (kept.astype(np.int64), np.zeros((5, *shape), np.int32)):
        with pytest.raises(ValueError, match="expected int32"):
            buffer.write(wrong)


def test_what_is_written_twice_before_anybody_waits_is_copied_twice(gpu: StandInCudaRuntime) -> None:
    """The GPU copies from pinned memory when it gets there, so that must not be overwritten before."""
    device = device_on(gpu)
    buffer, other = device.buffers([BufferSpec(dtype=np.dtype("int32"), shape=(2,), exchanged=True)] * 2)
    seen: list[list[int]] = []
    for number in range(3):
        buffer.write(np.full(2, number, np.int32))
        other.write(np.full(2, number, np.int32))
        gpu.enqueue(1, lambda: seen.append(gpu.view(buffer.address, np.int32, (2,)).tolist()))
    assert gpu.waits == 2
    assert buffer.read().tolist() == [2, 2]
    assert seen == [[0, 0], [1, 1], [2, 2]]


@pytest.mark.parametrize("exchanged", [False, True])
def test_rows_of_a_buffer_are_its_own_memory(exchanged: bool, gpu: StandInCudaRuntime) -> None:
    device = device_on(gpu)
    spec = BufferSpec(dtype=np.dtype("int32"), shape=(4, 64), exchanged=exchanged)
    whole, other = device.buffers([spec, spec])
    whole.write(np.repeat(np.arange(4, dtype=np.int32)[:, None], 64, axis=1))
    other.write(np.zeros((4, 64), np.int32))
    other.rows(0, 2).copy(whole.rows(2, 4))
    assert other.read()[:, 0].tolist() == [2, 3, 0, 0]
    other.rows(3, 4).write(np.full((1, 64), 9, np.int32))
    assert other.rows(2, 4).read()[:, 63].tolist() == [0, 9]


def test_only_what_the_host_exchanges_is_pinned(built: Made, gpu: StandInCudaRuntime, runtime: StandInRuntime) -> None:
    with tc_deploy.load(built.bundle, NAME) as pipeline:
        pinned = {key for key, buffer in pipeline._buffers.items() if buffer._pinned is not None}
    assert {"class_labels", "guidance_scale", "hidden_states", "latents@0", "latents@1"} <= set(map(str, pinned))
    assert not any(key.kind in (Kind.CACHE, Kind.TABLE) for key in pinned)


def test_a_gpu_without_that_much_memory_says_so() -> None:
    gpu = StandInCudaRuntime(memory_bytes=1024)
    device = device_on(gpu)
    spec = BufferSpec(dtype=np.dtype("float32"), shape=(200,))
    kept = device.buffers([spec])
    with pytest.raises(BackendError, match=r"^CUDA fails in cudaMalloc: out of memory$"):
        device.buffers([spec])
    assert not kept[0].read().any()
    del kept
    device.buffers([spec])


def test_a_batch_outside_the_profile_is_refused_before_anything_runs(
    built: Made, gpu: StandInCudaRuntime, runtime: StandInRuntime
) -> None:
    with pytest.raises(
        BackendError, match=r"model_batch is 10, but the engine was built for 2 to 8; load with another batch size, or"
    ):
        tc_deploy.load(built.bundle, NAME, batch_size=5)
    gpu.wait()
    assert gpu.runs == []
