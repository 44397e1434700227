"""PyTorch: for a machine with a GPU and none of the other engines, or to compare them with.

Its engines are the bundle's steps, made anew from the checkpoint in the bundle's precision: on a CPU traced by
``torch.export`` for the batch that they run with (a saved program would be read with pickle), on a GPU captured as CUDA
graphs, one per binding. So a target holds only settings, and the checkpoint must be where the plan says, or where the
option ``model`` does. The one backend that needs torch and the compile side; both are imported when it is opened, and
not before.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from tc_deploy.backends.base import BoundGraph, Buffer, BufferSpec, Capture, Progress
from tc_deploy.backends.compiled_at_load import CompiledAtLoad
from tc_deploy.backends.host import check_array, check_fits
from tc_deploy.backends.in_turn import InTurn
from tc_deploy.errors import BackendError, first_line
from tc_deploy.libraries import imported
from tc_deploy.manifest import (
    FP32_GRAPHS,
    MODEL_OUTPUT,
    NEXT_LATENTS,
    SOLVER,
    Manifest,
    Role,
    guided_output_tensor,
    latents_tensor,
    read_manifest,
)
from tc_deploy.plan import load_plan

if TYPE_CHECKING:
    from torch import Tensor

    from tc_deploy.models.family import DiffusionTransformer

_LOG = logging.getLogger(__name__)
_Step: TypeAlias = "Callable[..., Sequence[Tensor]]"
"""Positional tensors in, tensors out, as a graph's record orders them."""


CPU, CUDA = "cpu", "cuda"
DEVICES = (CPU, CUDA)


def _torch() -> Any:
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
        torch = _torch()
        self._bits = (torch.int16, np.dtype(np.int16)) if tensor.dtype == torch.bfloat16 else (tensor.dtype, dtype)

    def write(self, array: NDArray[Any]) -> None:
        """Copy ``array`` in.

        Raises:
            ValueError: it has another dtype or shape; nothing is converted or broadcast.
        """
        check_array(array, self.dtype, tuple(self.tensor.shape))
        self.tensor.copy_(_torch().from_numpy(np.array(array).view(self._bits[1])).view(self.tensor.dtype))

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

    def __init__(self, step: _Step, inputs: Sequence[Tensor], outputs: Sequence[Tensor], device: TorchDevice) -> None:
        self._step, self._inputs, self._outputs, self._device = step, inputs, outputs, device
        self._captured: Any = None

    def run(self) -> None:
        """Run it, or queue it on a GPU.

        Raises:
            BackendError: PyTorch fails.
        """
        torch = _torch()
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
        torch = _torch()
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
        self, device: TorchDevice, path: Path, step: _Step, names: tuple[tuple[str, ...], tuple[str, ...]], traced: bool
    ) -> None:
        self._device, self._path, self._step, self._traced = device, path, step, traced
        self._input_names, self._output_names = names
        self._programs: dict[tuple[Any, ...], _Step] = {}

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

    def _program(self, example: Sequence[Tensor]) -> _Step:
        torch = _torch()
        try:
            with torch.no_grad():
                # Copies: of one tensor that stands for two inputs the exporter would make one.
                arguments = tuple(tensor.clone() for tensor in example)
                program: Any = torch.export.export(cast("Any", self._step), arguments, strict=False).module()
        except (RuntimeError, ValueError) as error:
            raise BackendError(f"{self._path}: PyTorch cannot export the graph: {first_line(error)}") from error
        return cast("_Step", torch.compile(program) if self._device.compiled else program)


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
        torch = _torch()
        self.compiled = compiled
        if device == CUDA and not torch.cuda.is_available():
            raise BackendError(
                f"PyTorch {torch.__version__} sees no GPU here, and these engines are for {CUDA}; build again with"
                f" --backend torch --device {CPU}"
            )
        self.place: Any = torch.device(device or _device_here())
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
        torch = _torch()
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

            plan, _ = load_plan(bundle)
            model = model_of_plan(plan, str(bundle), Path(self._source) if self._source else None)
            # Before it moves: the fp32 weights need no place on the device.
            cast_products(model, manifest.precision, manifest.fp32_blocks)
            model.module.to(self.place)
            self._models[bundle] = model
        return self._models[bundle]


def _device_here() -> str:
    return CUDA if _torch().cuda.is_available() else CPU


def solver_step(manifest: Manifest, input_names: tuple[str, ...], output_names: tuple[str, ...]) -> _Step:
    """The solver's graph in PyTorch; ``export/solver_graph.py`` says what it computes."""
    from tc_deploy.tokencache.guidance import guided_output

    torch, history, latent_shape = _torch(), manifest.solver.history, manifest.latent_shape

    def step(*tensors: Tensor) -> Sequence[Tensor]:
        given = dict(zip(input_names, tensors, strict=True))
        per_sample = (-1, *[1] * len(latent_shape))
        output = given[MODEL_OUTPUT.name][:, : latent_shape[0]]
        if manifest.guided:
            conditional, unconditional = output.chunk(2)
            scale = given[Role.GUIDANCE_SCALE].reshape(per_sample)
            output = guided_output(conditional, unconditional, scale, manifest.solver.guidance_rule)
        values = [
            *(given[latents_tensor(age).name] for age in range(history + 1)),
            output,
            *(given[guided_output_tensor(age).name] for age in range(1, history + 1)),
        ]
        columns = given[Role.COEFFICIENTS].unbind(1)
        terms = [column.reshape(per_sample) * value for column, value in zip(columns, values, strict=True)]
        latents = functools.reduce(torch.add, terms)
        scaled = latents * given[Role.INPUT_SCALE].reshape(per_sample)
        states = torch.cat([scaled, scaled]) if manifest.guided else scaled
        made = {NEXT_LATENTS.name: latents, Role.HIDDEN_STATES: states, Role.GUIDED_OUTPUT: output}
        return [made[name] for name in output_names]

    return step


class Torch(CompiledAtLoad):
    """The backend."""

    name = "torch"

    def version(self) -> str:
        """PyTorch's version."""
        return str(_torch().__version__)

    def settled(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """With the device, the GPU where there is one, and whether steps are compiled."""
        return {"device": _device_here(), "compile": False, **options}

    def build(
        self, bundle: Path, manifest: Manifest, folder: Path, options: Mapping[str, Any], progress: Progress
    ) -> None:
        """Run every graph once; a decoder and text encoders, whose checkpoint no plan names, are refused."""
        kept = [name for name in FP32_GRAPHS if name in manifest.graphs]
        if kept:
            raise BackendError(
                f"{bundle}: torch runs the steps' graphs only, and this bundle has a {kept[0]}; build it with another"
                " backend, or export without --with-decoder and --with-text-encoder"
            )
        super().build(bundle, manifest, folder, options, progress)

    def reads(self, manifest: Manifest, options: Mapping[str, Any]) -> tuple[str, ...]:  # noqa: ARG002 - the protocol's
        """Nothing: its engines are made of the checkpoint, whose checksum the plan has."""
        return ()

    def open(self, options: Mapping[str, Any]) -> TorchDevice:
        """Open the GPU or the CPU; see :class:`TorchDevice` for the options."""
        compiled, model, device = options.get("compile", False), options.get("model"), options.get("device")
        unknown = sorted(options.keys() - {"compile", "model", "device"})
        wrong = not isinstance(compiled, bool) or not (model is None or isinstance(model, str))
        if unknown or wrong or device not in (None, *DEVICES):
            found = repr(unknown[0]) if unknown else f"compile {compiled!r}, model {model!r}, device {device!r}"
            raise BackendError(
                f"{self.name} takes the options compile, true or false, model, a checkpoint's path, and device,"
                f" {' or '.join(DEVICES)}; found {found}; build again"
            )
        return TorchDevice(compiled=compiled, model=model, device=device)
