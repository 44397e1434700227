"""PyTorch at run time: a bundle's steps made anew from its checkpoint, on the CPU or on a GPU.

In: a bundle. Out: a device, as the runtime knows it. Never: imports torch before it is opened.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from tc_deploy.backends.base import BoundGraph, Buffer, BufferSpec, Capture
from tc_deploy.backends.host import check_array, check_fits
from tc_deploy.backends.in_turn import InTurn
from tc_deploy.backends.torch.solver import Step, solver_step
from tc_deploy.errors import BackendError, first_line
from tc_deploy.libraries import imported
from tc_deploy.manifest import (
    SOLVER,
    Manifest,
    read_manifest,
)
from tc_deploy.plan import load_plan

if TYPE_CHECKING:
    from torch import Tensor

    from tc_deploy.models.family import DiffusionTransformer

_LOG = logging.getLogger(__name__)


CPU, CUDA = "cpu", "cuda"
DEVICES = (CPU, CUDA)


def torch_module() -> Any:
    """``torch``.

    Raises:
        BackendError: it is not installed.
    """
    return imported("torch")


class TorchBuffer:
    """A tensor on the device, with an address that never changes.

    Args:
        tensor: the tensor.
        dtype: its type, as an array has it.
    """

    def __init__(self, tensor: Tensor, dtype: np.dtype[Any]) -> None:
        self.tensor, self.dtype = tensor, dtype
        # PyTorch and numpy do not exchange bfloat16, whose bits go as integers.
        torch = torch_module()
        self._bits = (torch.int16, np.dtype(np.int16)) if tensor.dtype == torch.bfloat16 else (tensor.dtype, dtype)

    def write(self, array: NDArray[Any]) -> None:
        """Copy ``array`` in.

        Raises:
            ValueError: it has another dtype or shape; nothing is converted or broadcast.
        """
        check_array(array, self.dtype, tuple(self.tensor.shape))
        self.tensor.copy_(torch_module().from_numpy(np.array(array).view(self._bits[1])).view(self.tensor.dtype))

    def read(self) -> NDArray[Any]:
        """A copy, once the device is done with what it was told before."""
        bits: NDArray[Any] = self.tensor.cpu().view(self._bits[0]).numpy()
        return bits.view(self.dtype).copy()

    def rows(self, start: int, stop: int) -> TorchBuffer:
        """Some of its rows."""
        return TorchBuffer(self.tensor[start:stop], self.dtype)

    def copy(self, source: Buffer) -> None:
        """Copy another one in."""
        self.tensor.copy_(cast("TorchBuffer", source).tensor)


class TorchBoundGraph:
    """A step on fixed tensors; on a GPU its first run captures it, and later ones replay."""

    def __init__(self, step: Step, inputs: Sequence[Tensor], outputs: Sequence[Tensor], device: TorchDevice) -> None:
        self._step, self._inputs, self._outputs, self._device = step, inputs, outputs, device
        self._captured: Any = None

    def run(self) -> None:
        """Run it, or queue it on a GPU.

        Raises:
            BackendError: PyTorch fails.
        """
        torch = torch_module()
        try:
            with torch.inference_mode():
                if self._device.place.type != "cuda":
                    self.compute()
                    return
                if self._captured is None:
                    self._capture(torch)
                self._captured.replay()
        except (RuntimeError, IndexError) as error:
            raise BackendError(f"PyTorch fails: {first_line(error)}") from error

    def compute(self) -> None:
        """Queue the step's kernels one by one."""
        torch = torch_module()
        if self._device.place.type != "cuda":
            self._copy_results()
            return
        # fp32 is what a bundle's graphs say: cuDNN would take its convolutions for TF32 otherwise.
        with torch.backends.cudnn.flags(
            enabled=True,
            benchmark=torch.backends.cudnn.benchmark,
            deterministic=torch.backends.cudnn.deterministic,
            allow_tf32=False,
        ):
            self._copy_results()

    def _copy_results(self) -> None:
        for output, made in zip(self._outputs, self._step(*self._inputs), strict=True):
            output.copy_(made)

    def _capture(self, torch: Any) -> None:
        # What PyTorch sets up at a first run must not become part of the graph.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.compute()
        torch.cuda.current_stream().wait_stream(side)
        self._captured = torch.cuda.CUDAGraph()
        # Graphs run one after another and leave nothing in the pool, so all of them can have the same.
        # Other threads may go on allocating: other pipelines are loaded and freed there.
        with torch.cuda.graph(self._captured, pool=self._device.pool, capture_error_mode="thread_local"):
            self.compute()


class TorchGraph:
    """One graph of a bundle.

    Args:
        device: where it runs.
        path: stands for the graph in messages.
        step: computes it.
        names: of its inputs and outputs, in order.
        traced: whether the step is to be exported where the device wants that.
    """

    def __init__(
        self, device: TorchDevice, path: Path, step: Step, names: tuple[tuple[str, ...], tuple[str, ...]], traced: bool
    ) -> None:
        self._device, self._path, self._step, self._traced = device, path, step, traced
        self._input_names, self._output_names = names
        self._programs: dict[tuple[Any, ...], Step] = {}

    def bind(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> TorchBoundGraph:
        """Fix the buffers by tensor name.

        Raises:
            BackendError: PyTorch cannot export the graph for these shapes.
        """
        given = [cast("TorchBuffer", inputs[name]).tensor for name in self._input_names]
        taken = [cast("TorchBuffer", outputs[name]).tensor for name in self._output_names]
        shapes = tuple(tensor.shape for tensor in given)
        if shapes not in self._programs:
            self._programs[shapes] = self._program(given) if self._traced and self._device.traces else self._step
        return TorchBoundGraph(self._programs[shapes], given, taken, self._device)

    def _program(self, example: Sequence[Tensor]) -> Step:
        torch = torch_module()
        try:
            with torch.no_grad():
                # Copies: of one tensor that stands for two inputs the exporter would make one.
                arguments = tuple(tensor.clone() for tensor in example)
                program: Any = torch.export.export(cast("Any", self._step), arguments, strict=False).module()
        except (RuntimeError, ValueError) as error:
            raise BackendError(f"{self._path}: PyTorch cannot export the graph: {first_line(error)}") from error
        return cast("Step", torch.compile(program) if self._device.compiled else program)


class TorchDevice:
    """The first GPU that PyTorch sees, or the CPU.

    Args:
        compiled: whether steps go through ``torch.compile``.
        model: the checkpoint; None looks where a bundle's plan says.
        device: one of ``DEVICES``; None takes the GPU where there is one.

    Raises:
        BackendError: there is no GPU.
    """

    def __init__(self, *, compiled: bool, model: str | None, device: str | None = None) -> None:
        torch = torch_module()
        self.compiled = compiled
        if device == CUDA and not torch.cuda.is_available():
            raise BackendError(
                f"PyTorch {torch.__version__} sees no GPU here, and these engines are for {CUDA}; build again with"
                f" --backend torch --device {CPU}"
            )
        self.place: Any = torch.device(device or device_here())
        _LOG.debug("torch runs on %s", self.place)
        # What is captured as a CUDA graph leaves nothing of Python in a run; to trace it, too, would take minutes.
        self.traces = compiled or self.place.type != "cuda"
        self.pool: Any = torch.cuda.graph_pool_handle() if self.place.type == "cuda" else None
        self._source, self._models = model, dict[Path, "DiffusionTransformer"]()

    def buffers(self, specs: Sequence[BufferSpec]) -> list[Buffer]:
        """Allocate, filled with zeros.

        Raises:
            OutOfMemoryError: there is not that much.
        """
        if self.place.type == "cpu":
            check_fits(specs)
        torch = torch_module()
        tensors = [torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype.name), device=self.place) for spec in specs]
        return [TorchBuffer(tensor, spec.dtype) for tensor, spec in zip(tensors, specs, strict=True)]

    def capture(self, graphs: Sequence[BoundGraph]) -> Capture:
        """Run them in turn; on a GPU every binding has a CUDA graph of its own."""
        return InTurn(graphs)

    def load(self, path: Path) -> TorchGraph:
        """Make the step that an ONNX graph of a bundle was exported from.

        Raises:
            ModelError: the checkpoint cannot be loaded.
            PlanError: it is another one than the bundle's.
        """
        bundle, name = path.parents[1], path.stem
        manifest = read_manifest(bundle)
        record = next(record for record in manifest.graphs.values() if Path(record.file).name == path.name)
        names = tuple(tensor.name for tensor in record.inputs), tuple(tensor.name for tensor in record.outputs)
        if name == SOLVER:
            return TorchGraph(self, path, solver_step(manifest, *names), names, traced=False)
        from tc_deploy.tokencache.graphs import step_graphs

        plan, _ = load_plan(bundle)
        steps = step_graphs(self._model(bundle, manifest), plan.cache, plan.phases_used(), one_graph=manifest.one_graph)
        step = next(graph for graph in steps.values() if graph.stem == name)
        return TorchGraph(self, path, step.eval(), names, traced=True)

    def _model(self, bundle: Path, manifest: Manifest) -> DiffusionTransformer:
        if bundle not in self._models:
            from tc_deploy.planned.model import model_of_plan
            from tc_deploy.tokencache.precision import cast_products

            if manifest.loras:
                raise BackendError(
                    f"{bundle}: {manifest.loras[0].file} is part of its weights, and PyTorch runs the checkpoint"
                    " without it; build for another backend"
                )
            plan, _ = load_plan(bundle)
            model = model_of_plan(plan, str(bundle), Path(self._source) if self._source else None)
            # Before it moves: the fp32 weights need no place on the device.
            cast_products(model, manifest.precision, manifest.fp32_blocks)
            model.module.to(self.place)
            self._models[bundle] = model
        return self._models[bundle]


def device_here() -> str:
    """The GPU where there is one."""
    return CUDA if torch_module().cuda.is_available() else CPU
