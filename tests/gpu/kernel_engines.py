"""Engines for the GPU's own runtime where TensorRT is not: a bundle's steps as PyTorch's kernels.

They take the place of TensorRT's execution contexts and of nothing else: memory, stream, copies, capture and launches
are the package's own, on real CUDA. What the kernels read and write lies where the runtime put it; what they need
besides comes from one pool that is PyTorch's, which is warm when a run is captured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from gpu.parts import DEMO_MODEL

from tc_deploy.backends.base import Graph
from tc_deploy.backends.cuda import Cuda
from tc_deploy.backends.tensorrt.run import TrtDevice, TrtGraph, TrtScratch
from tc_deploy.backends.torch.solver import solver_step
from tc_deploy.manifest import SOLVER, EngineRecord, Manifest, ProfileRecord, read_manifest
from tc_deploy.models.family import DiffusionTransformer
from tc_deploy.plan import load_plan
from tc_deploy.planned.model import model_of_plan
from tc_deploy.tokencache.graphs import step_graphs

SCRATCH_BYTES = 1 << 20
JUNK = 0xFF
"""Fills scratch memory at every run: a NaN in every float, should somebody read it."""
LARGEST_BATCH = 64


class Kernels:
    """In the place of ``tensorrt.IExecutionContext``.

    Args:
        step: tensors in, tensors out.
        names: of its inputs and outputs, in order.
        dtypes: of all of them.
        pool: what it allocates from.
    """

    def __init__(
        self,
        step: Callable[..., Sequence[torch.Tensor]],
        names: tuple[Sequence[str], Sequence[str]],
        dtypes: Mapping[str, np.dtype[Any]],
        pool: Any,
    ) -> None:
        self._step, self._names, self._dtypes, self._pool = step, names, dtypes, pool
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._output_shapes: list[tuple[int, ...]] = []
        self._scratch = (0, 0)

    def set_device_memory(self, memory: int, size: int) -> None:
        self._scratch = (memory, size)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._shapes[name] = tuple(shape)
        return name in self._names[0]

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        queue = torch.cuda.ExternalStream(stream)
        with torch.cuda.stream(queue), torch.cuda.use_mem_pool(self._pool), torch.inference_mode():
            memory, size = self._scratch
            tensor_at(memory, np.dtype(np.uint8), (size,)).fill_(JUNK)
            made = self._step(*(self._tensor(name, self._shapes[name]) for name in self._names[0]))
            for name, value in zip(self._names[1], made, strict=True):
                self._tensor(name, tuple(value.shape)).copy_(value)
        return True

    def _tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        return tensor_at(self._addresses[name], self._dtypes[name], shape)


def tensor_at(address: int, dtype: np.dtype[Any], shape: tuple[int, ...]) -> torch.Tensor:
    """What lies at an address of the GPU; nothing is copied."""
    place = {"data": (address, False), "shape": shape, "typestr": dtype.str, "version": 3}
    return torch.as_tensor(SimpleNamespace(__cuda_array_interface__=place), device="cuda")


def kernel_engines(
    bundle: Path, model: DiffusionTransformer, cuda: Cuda, *, use_cuda_graph: bool = True
) -> tuple[TrtDevice, dict[str, Graph]]:
    """A device of the TensorRT backend and a bundle's graphs on it, without TensorRT.

    Args:
        bundle: in fp32.
        model: the checkpoint that it was exported from, on the GPU.
        cuda: the GPU.
        use_cuda_graph: whether runs are captured.
    """
    manifest, (plan, _) = read_manifest(bundle), load_plan(bundle)
    made = step_graphs(model, plan.cache, plan.phases_used(), one_graph=False)
    steps = {graph.stem: graph.eval() for graph in made.values()}
    runtime = SimpleNamespace(engine_host_code_allowed=True)
    device = TrtDevice("kernels", runtime, cuda, [], user_managed=None, use_cuda_graph=use_cuda_graph)
    scratch, pool = TrtScratch(cuda, SCRATCH_BYTES), torch.cuda.MemPool()

    def graph_of(name: str) -> TrtGraph:
        record = manifest.graphs[name]
        names = [tensor.name for tensor in record.inputs], [tensor.name for tensor in record.outputs]
        step = solver_step(manifest, tuple(names[0]), tuple(names[1])) if name == SOLVER else steps[name]
        dtypes = {tensor.name: tensor.numpy_dtype for tensor in (*record.inputs, *record.outputs)}

        def context() -> tuple[Kernels, TrtScratch]:
            return Kernels(step, names, dtypes, pool), scratch

        return TrtGraph(bundle / record.file, context, _record(manifest, name), cuda.stream)

    return device, {name: graph_of(name) for name in manifest.graphs}


def model_on_gpu(bundle: Path) -> DiffusionTransformer:
    """The demo's checkpoint, which a bundle of it was exported from, on the GPU."""
    plan, _ = load_plan(bundle)
    model = model_of_plan(plan, str(bundle), DEMO_MODEL)
    model.module.to("cuda")
    return model


def _record(manifest: Manifest, name: str) -> EngineRecord:
    """What a build would have written down."""
    graph = manifest.graphs[name]
    names = {size for tensor in (*graph.inputs, *graph.outputs) for size in tensor.shape if isinstance(size, str)}
    return EngineRecord(
        backend="kernels",
        backend_version=torch.__version__,
        options={},
        onnx_sha256="",
        weights_sha256="",
        profiles=(ProfileRecord(graphs=(name,), inputs=graph.inputs, outputs=graph.outputs),),
        axes=dict.fromkeys(sorted(names), (1, 1, LARGEST_BATCH)),
        layers=1,
        build_s=0.0,
        peak_memory_mib=1,
        warnings=(),
    )
