"""A built bundle as documents, and its graphs bound to buffers.

In: ``engines/NAME``, and the sizes of its batch axes. Out: calls of a program as graphs whose every tensor has its
place; a constant buffer holds its step's row of a table from the start. Never: runs a graph, or knows of requests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from tc_deploy.backends import registry
from tc_deploy.backends.base import BoundGraph, Buffer, Device, Graph
from tc_deploy.bundle import MANIFEST, check_files
from tc_deploy.errors import BundleError
from tc_deploy.manifest import FORECAST_WEIGHTS, RUNTIME_TABLES, TOKEN_INDEX, Manifest, TensorRecord, read_manifest
from tc_deploy.plan import Plan, index_row, load_plan, token_index_name
from tc_deploy.runtime.program import Call, table_row
from tc_deploy.types import FloatArray, IntArray

Watch = Callable[[str, BoundGraph, Buffer], BoundGraph]
"""Given a graph's name, the graph as bound for one step and an output of it (to read it is to wait for the device):
what runs in its place."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Bundle:
    """A bundle whose documents are read and whose own files are checked; its engines are not loaded."""

    path: Path
    backend: str
    """The target that is meant."""
    manifest: Manifest
    plan: Plan
    index_tables: Mapping[str, FloatArray | IntArray]
    """The plan's."""
    step_tables: Mapping[str, NDArray[Any]]
    """By input name, (T, ...): what every step of a kind takes, whatever its phase."""
    first_scale: np.float32
    """What the first step's input is scaled by."""

    def row(self, table: str, step: int) -> NDArray[Any]:
        """One step's row of a table, without the batch axis."""
        if table != TOKEN_INDEX:
            return np.asarray(self.step_tables[table][step])
        schedule = self.plan.tprr()
        return np.asarray(self.index_tables[token_index_name(schedule.variants[step])][index_row(schedule, step)])


def read_bundle(path: Path, backend: str | None) -> Bundle:
    """Read a bundle and check its files.

    Args:
        path: ``engines/NAME``.
        backend: which of the bundle's targets; None takes the only one, or the first by name.

    Raises:
        BundleError: nothing exported or built there, or a file is missing, truncated or altered.
        PlanError: the plan is inconsistent.
        UsageError: there is no such backend.
    """
    manifest = read_manifest(path)
    backend = _chosen_backend(path, backend)
    check_files(path, manifest.files)
    plan, index_tables = load_plan(path)
    solver = safetensors.numpy.load_file(path / RUNTIME_TABLES)
    return Bundle(
        path=path,
        backend=backend,
        manifest=manifest,
        plan=plan,
        index_tables=index_tables,
        step_tables={
            "timestep": solver["timesteps"],
            "coefficients": solver["coefficients"],
            # The solver prepares the next step's input; after the last step nobody reads it.
            "input_scale": np.append(solver["input_scale"][1:], np.float32(1)),
            FORECAST_WEIGHTS: plan.tprr().forecast_weights(plan.cache.forecast_order),
        },
        first_scale=solver["input_scale"][0],
    )


class Binder:
    """Binds calls to one set of buffers, each made at its first mention.

    Args:
        bundle: names the graphs' tensors and fills the tables.
        device: where the buffers are made.
        graphs: loaded on that device, by name.
        axes: the size of each batch axis.
        watch: sees every graph as it is bound.
    """

    def __init__(
        self,
        bundle: Bundle,
        device: Device,
        graphs: Mapping[str, Graph],
        axes: Mapping[str, int],
        watch: Watch | None = None,
    ) -> None:
        self._bundle, self._device, self._graphs, self._axes, self._watch = bundle, device, graphs, axes, watch
        self.buffers: dict[str, Buffer] = {}

    def bind(self, call: Call, step: int) -> BoundGraph:
        """Fix a call's buffers.

        Raises:
            BackendError: the engine refuses them.
        """
        record = self._bundle.manifest.graphs[call.graph]

        def buffers(names: Mapping[str, str], tensors: Sequence[TensorRecord]) -> dict[str, Buffer]:
            return {tensor.name: self._buffer(names[tensor.name], tensor, step) for tensor in tensors}

        outputs = buffers(call.outputs, record.outputs)
        bound = self._graphs[call.graph].bind(buffers(call.inputs, record.inputs), outputs)
        return bound if self._watch is None else self._watch(call.graph, bound, next(iter(outputs.values())))

    def _buffer(self, name: str, tensor: TensorRecord, step: int) -> Buffer:
        """The buffer of that name; a table's row is filled when it is made and never again."""
        if name not in self.buffers:
            shape = tuple(self._axes[size] if isinstance(size, str) else size for size in tensor.shape)
            buffer = self.buffers[name] = self._device.buffer(tensor.numpy_dtype, shape)
            if name == table_row(tensor.name, step):
                buffer.write(np.broadcast_to(self._bundle.row(tensor.name, step), shape).astype(tensor.numpy_dtype))
        return self.buffers[name]


def _chosen_backend(path: Path, backend: str | None) -> str:
    if backend is not None:
        registry.backend(backend)
    built = sorted(name for name in registry.BACKENDS if (path / name / MANIFEST).is_file())
    if backend is None and built:
        return built[0]
    if backend not in built:
        wanted = "engine" if backend is None else f"{backend} engine"
        beside = f" (built: {', '.join(built)})" if built else ""
        raise BundleError(
            f"{path}: no {wanted} built there{beside}; build one with:"
            f" tc-deploy build {path}" + ("" if backend is None else f" --backend {backend}")
        )
    return str(backend)
