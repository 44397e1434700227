"""Polygraphy's runners over what polygraphy does not know: our own backends, and a step in PyTorch.

In: a graph that is loaded on a device, or the checkpoint's step. Out: a runner for polygraphy's
Comparator. An engine under test always runs through the backend code that serves.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata

from tc_deploy.backends.base import BufferSpec, Device, Graph
from tc_deploy.golden import Feed
from tc_deploy.manifest import GraphRecord, TensorRecord


class BackendRunner(BaseRunner):  # type: ignore[misc]  # polygraphy comes without types
    """A graph on a device of one of our backends.

    Args:
        load: gives the device and the graph when the runner is activated.
        record: names the graph's tensors.
        name: what results are called by.
    """

    def __init__(self, load: Callable[[], tuple[Device, Graph]], record: GraphRecord, name: str) -> None:
        super().__init__(name=name)
        self._load, self._record = load, record

    def activate_impl(self) -> None:
        """Load the graph."""
        self._device, self._graph = self._load()

    def get_input_metadata_impl(self) -> TensorMetadata:
        """Names, types and shapes of the inputs; a batch axis is open."""
        return _metadata(self._record.inputs)

    def infer_impl(self, feed_dict: Mapping[str, Any]) -> OrderedDict[str, Any]:
        """Run it on buffers of the inputs' shapes."""
        start_s = time.perf_counter()
        outputs = OrderedDict(run_graph(self._device, self._graph, self._record, feed_dict))
        self.inference_time = time.perf_counter() - start_s
        return outputs

    def deactivate_impl(self) -> None:
        """Let the graph go."""
        del self._device, self._graph


class TorchRunner(BaseRunner):  # type: ignore[misc]  # as above
    """A step of the model in PyTorch.

    Args:
        run: gives the step's outputs for its inputs.
        record: names the exported graph's tensors.
    """

    def __init__(self, run: Callable[[Feed], Feed], record: GraphRecord) -> None:
        super().__init__(name="torch")
        self._run, self._record = run, record

    def get_input_metadata_impl(self) -> TensorMetadata:
        """Names, types and shapes of the inputs; a batch axis is open."""
        return _metadata(self._record.inputs)

    def infer_impl(self, feed_dict: Mapping[str, Any]) -> OrderedDict[str, Any]:
        """Run it."""
        start_s = time.perf_counter()
        outputs = OrderedDict(self._run(dict(feed_dict)))
        self.inference_time = time.perf_counter() - start_s
        return outputs


def run_graph(device: Device, graph: Graph, record: GraphRecord, feed: Mapping[str, Any]) -> Feed:
    """Run a loaded graph once on buffers made for it.

    Args:
        device: where it was loaded.
        graph: the graph.
        record: names its tensors.
        feed: its inputs.

    Returns:
        Its outputs by name.

    Raises:
        BackendError: the engine refuses the shapes, or fails.
    """
    axes: dict[str, int] = {}
    arrays: Feed = {}
    for tensor in record.inputs:
        # A file of samples holds bf16 as fp32.
        arrays[tensor.name] = array = np.asarray(feed[tensor.name]).astype(tensor.numpy_dtype, copy=False)
        axes |= {axis: size for axis, size in zip(tensor.shape, array.shape, strict=True) if isinstance(axis, str)}
    specs = {name: BufferSpec(dtype=array.dtype, shape=array.shape) for name, array in arrays.items()}
    for tensor in record.outputs:
        specs[tensor.name] = BufferSpec(dtype=tensor.numpy_dtype, shape=tensor.shape_at(axes))
    buffers = dict(zip(specs, device.buffers(list(specs.values())), strict=True))
    for name, array in arrays.items():
        buffers[name].write(array)
    inputs = {name: buffers[name] for name in arrays}
    outputs = {tensor.name: buffers[tensor.name] for tensor in record.outputs}
    graph.bind(inputs, outputs).run()
    return {name: buffer.read() for name, buffer in outputs.items()}


def _metadata(tensors: tuple[TensorRecord, ...]) -> TensorMetadata:
    metadata = TensorMetadata()
    for tensor in tensors:
        shape = [-1 if isinstance(size, str) else size for size in tensor.shape]
        metadata.add(tensor.name, dtype=tensor.numpy_dtype, shape=shape)
    return metadata
