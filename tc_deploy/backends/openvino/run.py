"""OpenVINO at run time: graphs on the CPU, compiled for the batch that they are bound to.

In: ONNX graphs whose files have been checked. Out: a device, as the runtime knows it. Never: reads an option.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np

from tc_deploy.backends.base import BoundGraph, Buffer, BufferSpec, Capture, Graph
from tc_deploy.backends.compiled_at_load import are_shared
from tc_deploy.backends.host import HostBuffer, check_fits
from tc_deploy.backends.in_turn import InTurn
from tc_deploy.backends.openvino.weights import WeightInputs, weights_as_inputs
from tc_deploy.errors import BackendError
from tc_deploy.libraries import imported
from tc_deploy.manifest import FP32_GRAPHS
from tc_deploy.precisions import PRECISIONS
from tc_deploy.types import Precision

if TYPE_CHECKING:
    import openvino

_Shapes: TypeAlias = tuple[tuple[str, tuple[int, ...]], ...]
"""Of a graph's inputs, by name, as it is compiled."""

DEFAULT_PRECISION = PRECISIONS[Precision.FP32].openvino
DEVICE = "CPU"
_OPEN = -1
"""Size of an axis that stays open."""
CAPABILITIES = {record.openvino: precision.upper() for precision, record in PRECISIONS.items()}
"""What OpenVINO calls a CPU's ability to compute in a precision."""


def openvino_module() -> Any:
    """``openvino``.

    Raises:
        BackendError: it is not installed.
    """
    return imported("openvino")


def precisions_of(core: openvino.Core) -> tuple[str, ...]:
    """The precisions that this CPU computes in."""
    able = set(core.get_property(DEVICE, "OPTIMIZATION_CAPABILITIES"))
    return tuple(name for name, capability in CAPABILITIES.items() if capability in able)


class OpenVinoBoundGraph:
    """An infer request with all its inputs and outputs set.

    Args:
        request: the request.
        compiled: what the request is of; kept, so that the next graph of these shapes finds it.
        weights: the memory of its weights, where they are inputs; kept, for the request only points to it.
    """

    def __init__(self, request: Any, compiled: Any, weights: WeightInputs | None) -> None:
        self._request, self._compiled, self._weights = request, compiled, weights

    def run(self) -> None:
        """Run it; the outputs are there on return.

        Raises:
            BackendError: OpenVINO fails.
        """
        try:
            # ``infer`` would do the same and then wrap every output for Python.
            self._request.start_async()
            self._request.wait()
        except RuntimeError as error:
            raise BackendError(f"OpenVINO fails: {_reason(error)}") from error


class OpenVinoGraph:
    """A graph that has been read; it is compiled once for each batch that it is bound to.

    Compiled for any batch it would infer every shape again at each run, which takes a cached step of the demo nearly
    twice as long. Numbers of tokens that the graph leaves open stay so: they are what variants of one graph differ in,
    and compiled for each it would be as many copies.
    """

    def __init__(self, device: OpenVinoDevice, path: Path) -> None:
        self._device, self._path = device, path
        self._model = device.core.read_model(path)
        # The batch is the first axis, where an input has one.
        self._open_axes = {
            tensor.get_any_name(): {axis for axis, size in enumerate(tensor.partial_shape) if axis and size.is_dynamic}
            for tensor in self._model.inputs
        }
        self._weights = weights_as_inputs(self._model, openvino_module()) if device.shares(path) else None
        self._compiled: weakref.WeakValueDictionary[_Shapes, Any] = weakref.WeakValueDictionary()
        self._latest: Any = None
        """Held, for one who binds, runs, lets go and binds again."""

    def bind(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> OpenVinoBoundGraph:
        """Fix the buffers by tensor name.

        Raises:
            BackendError: OpenVINO refuses the graph for buffers of these shapes.
        """
        tensors = {name: cast("HostBuffer", buffer).value for name, buffer in {**inputs, **outputs}.items()}
        shapes = tuple((name, self._compiled_shape(name, tensors[name].shape)) for name in inputs)
        try:
            compiled = self._compiled.get(shapes)
            if compiled is None:
                self._compiled[shapes] = compiled = self._compile(shapes)
            self._latest = compiled
            request = compiled.create_infer_request()
            for name, tensor in {**tensors, **(self._weights.tensors if self._weights else {})}.items():
                request.set_tensor(name, tensor)
        except RuntimeError as error:
            raise _refusal(self._path, error) from error
        return OpenVinoBoundGraph(request, compiled, self._weights)

    def _compiled_shape(self, name: str, shape: Sequence[int]) -> tuple[int, ...]:
        opened = self._open_axes.get(name, ())
        return tuple(_OPEN if axis in opened else size for axis, size in enumerate(shape))

    def _compile(self, shapes: _Shapes) -> Any:
        self._model.reshape(dict(shapes))
        settings = self._device.settings
        if self._path.stem in FP32_GRAPHS:
            settings = {**settings, "INFERENCE_PRECISION_HINT": DEFAULT_PRECISION}
        return self._device.core.compile_model(self._model, DEVICE, settings)


class OpenVinoDevice:
    """The CPU, with the threads and the precision that a target's options say.

    Args:
        threads: 0 leaves the choice to OpenVINO (the physical cores).
        precision: what matrix products and most else are computed in; inputs, outputs and caches stay as they are, and
            so do a decoder and text encoders, which half precision overflows.
        weights: whether all graphs read the mapping of the weights file (``shared``), or each keeps a copy, arranged
            and converted for its matrix products (``packed``); None decides by the size of the weights and by how
            many copies there would be.

    Raises:
        BackendError: the CPU does not compute in that precision.
    """

    def __init__(self, *, threads: int, precision: str, weights: str | None) -> None:
        self._weights = weights
        self.core: openvino.Core = openvino_module().Core()
        # A precision that the CPU lacks is no more than a hint to OpenVINO, which would take another one unasked.
        offered = precisions_of(self.core)
        if precision not in offered:
            raise BackendError(
                f"this CPU does not compute in {precision}, only in {', '.join(offered)}; build again with one of these"
            )
        self.settings = {
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": precision,
            # A pipeline runs one graph at a time: all threads belong to it.
            "NUM_STREAMS": 1,
            # Pinned, the threads of two pipelines would share the first cores and leave the others idle.
            "ENABLE_CPU_PINNING": False,
        }

    def shares(self, path: Path) -> bool:
        """Whether a graph reads the weights file that lies beside it."""
        return are_shared(self._weights, path)

    def buffers(self, specs: Sequence[BufferSpec]) -> list[Buffer]:
        """Allocate, filled with zeros.

        Raises:
            OutOfMemoryError: there is not that much.
        """
        check_fits(specs)
        return [self._buffer(spec.dtype, spec.shape) for spec in specs]

    def _buffer(self, dtype: np.dtype[Any], shape: tuple[int, ...]) -> HostBuffer:
        module = openvino_module()
        # OpenVINO knows numpy's own types only, and shows a bf16 tensor's memory as fp16.
        kind = module.Type.bf16 if dtype.name == "bfloat16" else module.Type(dtype)
        tensor = module.Tensor(kind, module.Shape(shape))
        array = tensor.data.view(dtype)
        array[...] = 0
        return HostBuffer(array, tensor, _part)

    def capture(self, graphs: Sequence[BoundGraph]) -> Capture:
        """Run them in turn."""
        return InTurn(graphs)

    def load(self, path: Path) -> Graph:
        """Read an ONNX file; its external data lies beside it."""
        try:
            return OpenVinoGraph(self, path)
        except RuntimeError as error:
            raise _refusal(path, error) from error


def _refusal(path: Path, error: Exception) -> BackendError:
    return BackendError(f"{path}: OpenVINO refuses the graph: {_reason(error)}")


def _reason(error: Exception) -> str:
    """What OpenVINO says last: before it stand the places in its source that the error passed."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[-1]
    return " ".join(line.split())


def _part(tensor: Any, array: Any, start: int, stop: int) -> Any:
    """Some rows of a tensor, in its memory."""
    module = openvino_module()
    rest = array.shape[1:]
    return module.Tensor(tensor, module.Coordinate([start, *[0] * len(rest)]), module.Coordinate([stop, *rest]))
