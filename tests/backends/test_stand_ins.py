"""The stand-ins take what CUDA takes, and refuse what they are there to refuse."""

from __future__ import annotations

import inspect

import numpy as np
import onnxruntime
import pytest
from backends.gpu_stand_in import StandInCudaRuntime
from backends.tensorrt_stand_in import USER_MANAGED, StandInContext, StandInEngine, StandInRuntime
from bundles import Made
from cuda.bindings import runtime as cuda_runtime

from tc_deploy.backends.cuda import Cuda
from tc_deploy.errors import BackendError
from tc_deploy.manifest import ONNX_FOLDER, SOLVER


def test_the_stand_in_takes_what_cuda_takes() -> None:
    ours = {name: value for name, value in vars(StandInCudaRuntime).items() if name.startswith("cuda")}
    functions = {name: value for name, value in ours.items() if inspect.isfunction(value)}
    assert len(functions) > 20
    for name, function in functions.items():
        signature = (getattr(cuda_runtime, name).__doc__ or "").splitlines()[0]
        arguments = signature.partition("(")[2].partition(")")[0]
        assert len(inspect.signature(function).parameters) - 1 == len([word for word in arguments.split(",") if word])


def test_the_stand_in_refuses_what_it_is_there_to_refuse(built: Made) -> None:
    gpu = StandInCudaRuntime()
    file = built.bundle / ONNX_FOLDER / "solver.onnx"
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    cuda = Cuda(gpu)
    engine = StandInEngine(gpu, SOLVER, session, StandInRuntime(gpu, {}))
    inputs = {
        tensor.name: [{"batch": 1, "model_batch": 2}.get(size, size) for size in tensor.shape]
        for tensor in session.get_inputs()
    }
    given = {name: cuda.allocate(4 * int(np.prod(shape))) for name, shape in inputs.items()}

    scratch = cuda.allocate(4096)

    def context() -> StandInContext:
        made = engine.create_execution_context(USER_MANAGED)
        made.set_device_memory(scratch, 4096)
        for name, shape in inputs.items():
            assert made.set_input_shape(name, tuple(shape))
            assert made.set_tensor_address(name, given[name])
        return made

    with pytest.raises(AssertionError, match="less scratch memory than the engine wants"):
        engine.create_execution_context(USER_MANAGED).set_device_memory(scratch, 256)
    addresses = {"next_latents": cuda.allocate(4 * 256), "hidden_states": cuda.allocate(4 * 512)}
    unset = context()
    assert not unset.set_tensor_address("no such tensor", addresses["next_latents"])
    assert not unset.set_tensor_address("next_latents", addresses["next_latents"] + 4)
    assert not unset.execute_async_v3(cuda.stream)

    def bound(**changes: int) -> StandInContext:
        ready = context()
        for name, address in (addresses | changes).items():
            assert ready.set_tensor_address(name, address)
        return ready

    def run(stream: int = cuda.stream, **changes: int) -> None:
        assert bound(**changes).execute_async_v3(stream)
        gpu.wait()

    run()
    with pytest.raises(AssertionError, match="two outputs share memory"):
        run(hidden_states=addresses["next_latents"])
    with pytest.raises(AssertionError, match="overlaps an input"):
        run(latents=given["latents"], next_latents=given["latents"])
    both = cuda.allocate(4 * 1024)
    with pytest.raises(AssertionError, match="overlaps another tensor, or has changed its size"):
        run(next_latents=both, hidden_states=both + 256)
    with pytest.raises(AssertionError, match="overlaps another tensor, or has changed its size"):
        run(hidden_states=both)
    with pytest.raises(AssertionError, match="another stream"):
        run(stream=0)
    # An engine is captured once it has run with its shapes, which then are its shapes for good.
    fresh = bound()
    with pytest.raises(BackendError, match="previous error during capture"):
        cuda.captured(lambda: fresh.execute_async_v3(cuda.stream))
    assert fresh.execute_async_v3(cuda.stream)
    launchable = cuda.captured(lambda: fresh.execute_async_v3(cuda.stream))
    gpu.runs.clear()
    for _ in range(2):
        cuda.launch(launchable)
    cuda.discard(launchable)
    assert gpu.runs == [SOLVER] * 2
    with pytest.raises(AssertionError, match="what was captured has become invalid"):
        fresh.set_input_shape("latents", (2, 4, 8, 8))
    for forbidden in (lambda: cuda.allocate(1), cuda.wait, lambda: cuda.free(given["latents"])):
        with pytest.raises(BackendError, match="not permitted when stream is capturing"):
            cuda.captured(forbidden)
    ready = bound()
    cuda.free(addresses["next_latents"])
    assert ready.execute_async_v3(cuda.stream)
    with pytest.raises(AssertionError, match="no live memory of that size"):
        gpu.wait()
