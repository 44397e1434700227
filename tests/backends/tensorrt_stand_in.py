"""A stand-in for TensorRT's runtime on the stand-in for a GPU. It is neither and proves nothing of either.

An execution context computes with ONNX Runtime, from the addresses that it was given, whatever lies there by then. It
checks what TensorRT does not: names, 256-byte alignment, that every tensor has a shape and an address, that no output
shares memory with another tensor, that an engine has run with its shapes before it is captured, that nobody gives a
captured context other shapes, and that the shapes lie in the optimization profile that was chosen. Scratch memory is
filled with junk, so that nothing else can lie in it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import tensorrt_rtx
from backends.gpu_stand_in import ALIGNMENT, StandInCudaRuntime

from tc_deploy.backends import registry
from tc_deploy.backends.cuda import Cuda
from tc_deploy.backends.tensorrt.backend import TensorRt
from tc_deploy.backends.tensorrt.rtx import RtxExtras
from tc_deploy.backends.tensorrt.run import TrtDevice
from tc_deploy.manifest import ONNX_FOLDER, SOLVER, EngineRecord, read_engine_record, read_manifest

NAME = "tensorrt-rtx"
USER_MANAGED = tensorrt_rtx.ExecutionContextAllocationStrategy.USER_MANAGED
SCRATCH_BYTES, SOLVER_SCRATCH_BYTES = 4096, 1000
"""What engines want of it; the solver's wants less."""


class StandInRuntime:
    """In the place of ``tensorrt.Runtime``.

    Args:
        gpu: where engines run.
        engines: an engine's bytes to its name and its ONNX file; beside that one's folder lies the engine's record.
        verdict: what :meth:`get_engine_validity` gives.
    """

    engine_host_code_allowed = True
    engine_header_size = 64

    def __init__(
        self, gpu: StandInCudaRuntime, engines: dict[bytes, tuple[str, str]], verdict: tuple[Any, int] = (None, 0)
    ) -> None:
        self._gpu, self._engines, self._verdict = gpu, engines, verdict
        self.deserialised: list[str] = []
        self.addresses_set = 0
        """How often a context was given one."""
        self.kernels: list[StandInKernels] = []
        """Of every engine with a runtime configuration, in the order of loading."""
        self.strategies: list[Any] = []
        """How kernels for the shapes of an engine are to be compiled, in the order of loading."""
        self.wants_weights: set[str] = set()
        """Names of engines that do not run until they are given weights."""
        self.fails_in_capture: set[str] = set()
        """Names of engines that do what no capture allows."""
        self.scratch: set[int] = set()
        """Addresses of the scratch memory that contexts were given."""
        self.uncapturable: set[str] = set()
        """Names of TensorRT-RTX engines that say so when they are asked."""

    def get_engine_validity(self, header: bytes) -> tuple[Any, int]:
        assert len(header) == self.engine_header_size
        return self._verdict

    def refit(self, engine: StandInEngine, onnx: Any) -> bool:
        """In the place of a refitter: takes the weights of the very graph that the engine was built from."""
        self.wants_weights.discard(engine.name)
        return str(onnx) == self._files[engine.name]

    @property
    def _files(self) -> dict[str, str]:
        return dict(self._engines.values())

    def deserialize_cuda_engine(self, engine: bytes) -> StandInEngine | None:
        assert not self.engine_host_code_allowed
        if engine not in self._engines:
            return None
        name, onnx = self._engines[engine]
        self.deserialised.append(name)
        session = onnxruntime.InferenceSession(onnx, providers=["CPUExecutionProvider"])
        record = read_engine_record(Path(onnx).parents[1] / NAME / f"{name}.engine")
        return StandInEngine(self._gpu, name, session, self, record)


class StandInKernels:
    """In the place of ``tensorrt_rtx.IRuntimeCache``: says what it was given and what it would keep."""

    def __init__(self, name: str) -> None:
        self.name, self.given = name, None

    def deserialize(self, blob: bytes) -> bool:
        self.given = bytes(blob)
        return True

    def serialize(self) -> bytes:
        return f"kernels of {self.name}".encode()


class StandInConfig:
    """In the place of ``tensorrt_rtx.IRuntimeConfig``."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.strategy: Any = None
        self.kernels: StandInKernels | None = None
        self.dynamic_shapes_kernel_specialization_strategy: Any = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> StandInKernels:
        return StandInKernels(self._name)

    def set_runtime_cache(self, kernels: StandInKernels) -> bool:
        self.kernels = kernels
        return True


class StandInEngine:
    """In the place of ``tensorrt.ICudaEngine``."""

    def __init__(
        self,
        gpu: StandInCudaRuntime,
        name: str,
        session: Any,
        runtime: StandInRuntime,
        record: EngineRecord | None = None,
    ) -> None:
        self._gpu, self.name, self._session, self._runtime, self.record = gpu, name, session, runtime, record
        self.device_memory_size_v2 = SOLVER_SCRATCH_BYTES if name == SOLVER else SCRATCH_BYTES
        self.names = sorted(tensor.name for tensor in (*session.get_inputs(), *session.get_outputs()))

    @property
    def num_io_tensors(self) -> int:
        return len(self.names)

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def create_runtime_config(self) -> StandInConfig:
        return StandInConfig(self.name)

    def create_execution_context(self, given: Any) -> StandInContext:
        assert self.name not in self._runtime.wants_weights, "an engine without weights"
        parts = (self._gpu, self, self._session, self._runtime)
        if not isinstance(given, StandInConfig):
            assert given is USER_MANAGED
            return StandInContext(*parts)
        assert given.strategy is USER_MANAGED
        self._runtime.kernels += [] if given.kernels is None else [given.kernels]
        self._runtime.strategies.append(given.dynamic_shapes_kernel_specialization_strategy)
        return StandInRtxContext(*parts)


class StandInContext:
    """In the place of ``tensorrt.IExecutionContext``."""

    def __init__(self, gpu: StandInCudaRuntime, engine: StandInEngine, session: Any, runtime: StandInRuntime) -> None:
        self._gpu, self._engine, self._name, self._session, self._runtime = gpu, engine, engine.name, session, runtime
        self._has_run = self._is_captured = False
        self._profile: int | None = None
        self._scratch = (0, 0)
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}

    def set_device_memory(self, memory: int, size: int) -> None:
        assert size >= self._engine.device_memory_size_v2, "less scratch memory than the engine wants"
        assert memory % ALIGNMENT == 0
        assert not self._is_captured, "what was captured has become invalid"
        self._scratch = (memory, size)
        self._runtime.scratch.add(memory)

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:  # noqa: ARG002 - there is one
        assert not self._is_captured, "what was captured has become invalid"
        self._profile, self._shapes = profile, {}
        return self._engine.record is not None and profile < len(self._engine.record.profiles)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if name not in {tensor.name for tensor in self._session.get_inputs()}:
            return False
        assert not self._is_captured, "what was captured has become invalid"
        self._shapes[name] = tuple(shape)
        self._has_run = False
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        known = {tensor.name for tensor in (*self._session.get_inputs(), *self._session.get_outputs())}
        if name not in known or address % ALIGNMENT:
            return False
        self._addresses[name] = address
        self._runtime.addresses_set += 1
        return True

    def execute_async_v3(self, stream: int) -> bool:
        inputs = [tensor.name for tensor in self._session.get_inputs()]
        outputs = [tensor.name for tensor in self._session.get_outputs()]
        if self._shapes.keys() != set(inputs) or self._addresses.keys() != {*inputs, *outputs}:
            return False
        self._check_profile()
        assert self._scratch[0], "no scratch memory"
        if self._gpu.is_capturing and (not self._has_run or self._name in self._runtime.fails_in_capture):
            self._gpu.spoil()
            return False
        self._has_run, self._is_captured = True, self._is_captured or self._gpu.is_capturing
        # As the launch of a kernel does, it keeps the addresses of now.
        shapes, addresses = dict(self._shapes), dict(self._addresses)
        written = [addresses[name] for name in outputs]
        assert len({*written}) == len(written), "two outputs share memory"
        assert not {*written} & {addresses[name] for name in inputs}, "an output overlaps an input"

        def run() -> None:
            self._gpu.runs.append(self._name)
            self._gpu.view(self._scratch[0], np.dtype(np.uint8), self._scratch[1:])[...] = 0xFF
            dtypes = {tensor.name: tensor.type for tensor in self._session.get_inputs()}
            feeds = {
                name: self._gpu.view(addresses[name], np.dtype(_NUMPY[dtypes[name]]), shapes[name]) for name in inputs
            }
            for name, array in zip(outputs, self._session.run(outputs, feeds), strict=True):
                self._gpu.view(addresses[name], array.dtype, array.shape)[...] = array

        self._gpu.enqueue(stream, run)
        return True

    def _check_profile(self) -> None:
        record = self._engine.record
        if record is None:
            return
        assert (self._profile is None) == (len(record.profiles) == 1), "a profile must be chosen where there are some"
        for tensor in record.profiles[self._profile or 0].inputs:
            for size, found in zip(tensor.shape, self._shapes[tensor.name], strict=True):
                least, _, largest = record.axes[size] if isinstance(size, str) else (size, size, size)
                assert least <= found <= largest, f"{tensor.name}: {self._shapes[tensor.name]} is not in the profile"


class StandInRtxContext(StandInContext):
    """In the place of ``tensorrt_rtx.IExecutionContext``, which can be asked one thing more."""

    def is_stream_capturable(self, stream: int) -> bool:  # noqa: ARG002 - there is one
        return self._name not in self._runtime.uncapturable


_NUMPY = {"tensor(float)": np.float32, "tensor(int32)": np.int32, "tensor(int64)": np.int64}


def stand_in(
    bundle: Path,
    gpu: StandInCudaRuntime,
    monkeypatch: pytest.MonkeyPatch,
    *,
    use_cuda_graph: bool = True,
    rtx: RtxExtras | None = None,
    verdict: tuple[tensorrt_rtx.EngineValidity, int] = (tensorrt_rtx.EngineValidity.VALID, 0),
) -> StandInRuntime:
    """Let the registry's TensorRT-RTX run on the stand-in."""
    engines = {
        (bundle / NAME / f"{name}.engine").read_bytes(): (name, str(bundle / ONNX_FOLDER / f"{name}.onnx"))
        for name in {Path(graph.file).stem for graph in read_manifest(bundle).graphs.values()}
    }
    runtime = StandInRuntime(gpu, engines, verdict)

    class OnStandIn(TensorRt):
        def open(self, options: object) -> TrtDevice:  # noqa: ARG002 - as the base class does
            errors = ["the stand-in knows no such engine"]
            return TrtDevice(
                self.name,
                runtime,
                self._cuda(),
                errors,
                user_managed=USER_MANAGED,
                use_cuda_graph=use_cuda_graph,
                rtx=rtx,
                refit=runtime.refit,
            )

    monkeypatch.setitem(registry.BACKENDS, NAME, OnStandIn("tensorrt_rtx", cuda=lambda: Cuda(gpu)))
    return runtime
