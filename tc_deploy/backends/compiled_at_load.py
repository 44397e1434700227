"""The part of a backend that all engines share which are compiled when they are loaded.

Their engines are the bundle's ONNX graphs as they are, so a target holds no copy of them, only the settings and the
certainty that every graph has loaded and computed once with them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tc_deploy.backends.base import Buffer, BufferSpec, Device, Graph, Progress
from tc_deploy.errors import BackendError
from tc_deploy.manifest import ONNX_FOLDER, STEPS, WEIGHTS, GraphRecord, Manifest, TargetManifest, TensorRecord

SHARED, PACKED = "shared", "packed"
WEIGHTS_MODES = (SHARED, PACKED)
"""All graphs read one mapping of the weights file; or each keeps a copy, arranged for its matrix products."""
MOST_THREADS = 1024
"""More than any machine has cores; a system refuses to start some thousands, in the middle of a run."""
SHARED_FROM_MIB = 256
"""Weights of this size are shared if nothing else is asked for: copies of smaller ones cost little, and run faster. So
does the one copy of a graph that holds all variants."""


def are_shared(mode: str | None, graph: Path) -> bool:
    """Whether a graph reads its weights from the mapping of the weights file.

    Args:
        mode: one of :data:`WEIGHTS_MODES`; None decides by the file's size, and by whether there are other graphs with
            the same weights.
        graph: beside it lies the file; graphs without weights may have none.
    """
    if mode is not None:
        return mode == SHARED
    weights = graph.with_name(WEIGHTS)
    return graph.stem != STEPS and weights.is_file() and weights.stat().st_size >= SHARED_FROM_MIB * 2**20


class CompiledAtLoad(ABC):
    """Base of such a backend."""

    @abstractmethod
    def settled(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """As for every backend."""

    @abstractmethod
    def open(self, options: Mapping[str, Any]) -> Device:
        """As for every backend."""

    def build(
        self,
        bundle: Path,
        manifest: Manifest,
        folder: Path,  # noqa: ARG002 - nothing is written
        options: Mapping[str, Any],
        progress: Progress,
    ) -> None:
        """Run every graph once.

        Raises:
            BackendError: the engine refuses an option or a graph, or computes numbers that are not finite.
        """
        device = self.open(options)
        axes = manifest.batch_axes(manifest.batch_size or 1)
        # One file after the other, so that a build takes the memory of one.
        for file, records in manifest.graphs_by_file().items():
            graph = device.load(bundle / file)
            for name, record in records.items():
                progress(f"building {name}", 1, 1)
                _run_once(device, graph, record, axes, bundle / file)
            del graph

    def engine_file(self, record: GraphRecord) -> str:
        """The ONNX graph, which is its own engine."""
        return record.file

    def reads(self, manifest: Manifest, options: Mapping[str, Any]) -> tuple[str, ...]:  # noqa: ARG002 - the protocol's
        """The graphs, and the weights that they refer to."""
        return (*manifest.graphs_by_file(), f"{ONNX_FOLDER}/{WEIGHTS}")

    def check(self, bundle: Path, target: TargetManifest) -> None:  # noqa: B027 - not abstract: there is nothing to do
        """Nothing to compare: whatever version is here compiles the graphs anew."""


def _run_once(device: Device, graph: Graph, record: GraphRecord, axes: Mapping[str, int], path: Path) -> None:
    """Run a graph on small numbers, none of them 0: a mask of zeros alone, or the norm of them, may well be NaN."""

    def buffers(tensors: tuple[TensorRecord, ...]) -> dict[str, Buffer]:
        specs = [BufferSpec(dtype=tensor.numpy_dtype, shape=tensor.shape_at(axes)) for tensor in tensors]
        return {tensor.name: buffer for tensor, buffer in zip(tensors, device.buffers(specs), strict=True)}

    inputs, outputs = buffers(record.inputs), buffers(record.outputs)
    for tensor in record.inputs:
        # Whole numbers are labels and rows of tables, of which 0 is always one.
        if not np.issubdtype(tensor.numpy_dtype, np.integer):
            shape = tensor.shape_at(axes)
            values = np.linspace(0.1, 1, num=int(np.prod(shape)), dtype=np.float32).reshape(shape)
            inputs[tensor.name].write(values.astype(tensor.numpy_dtype))
    graph.bind(inputs, outputs).run()
    for name, buffer in outputs.items():
        if not np.isfinite(buffer.read()).all():
            raise BackendError(
                f"{path}: output {name} is not finite on a first run with numbers between 0 and 1; the engine is not"
                " usable"
            )
