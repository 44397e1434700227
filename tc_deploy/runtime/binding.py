"""A built bundle as documents, and its graphs bound to buffers.

In: ``engines/NAME``, and the sizes of its batch axes. Out: calls of a program as graphs whose every tensor has its
place; a constant buffer holds its step's row of a table from the start. Never: runs a graph, or knows of requests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tc_deploy.backends import registry
from tc_deploy.backends.base import BoundGraph, Device, Graph
from tc_deploy.bundle import MANIFEST
from tc_deploy.consistency import Documents, read_documents
from tc_deploy.errors import BundleError, UsageError
from tc_deploy.groups import planned_group_inputs
from tc_deploy.manifest import INDEX_ROLES, Manifest, Role, TensorName, read_manifest
from tc_deploy.plan import Plan
from tc_deploy.runtime.buffers import OWN, Kind
from tc_deploy.runtime.layout import Layout
from tc_deploy.runtime.program import EVERY_FULL_STEP, Call
from tc_deploy.schedule import FULL
from tc_deploy.signing import check_signature
from tc_deploy.tables import index_row
from tc_deploy.types import FloatArray, IntArray


@dataclass(frozen=True, kw_only=True, eq=False)
class Bundle:
    """A bundle whose documents are read and agree; its engines are not loaded, nor the files checked that they read."""

    path: Path
    backend: str
    """The target that is meant."""
    manifest: Manifest
    plan: Plan
    token_index: Mapping[int, IntArray]
    """Per phase, the plan's."""
    step_tables: Mapping[Role, NDArray[Any]]
    """By role of the input, (T, ...): what every step of a kind takes, whatever its phase."""
    own_coefficients: FloatArray
    """(T, 2(h + 1)) of the scheduler's own solver, which the plan's may not be."""
    first_scale: np.float32
    """What the first step's input is scaled by."""

    def row(self, tensor: TensorName, step: int, *, own_solver: bool = False) -> NDArray[Any]:
        """One step's row of the table that an input is read from, without the batch axis."""
        if own_solver and tensor.role is Role.COEFFICIENTS:
            return np.asarray(self.own_coefficients[step])
        if tensor.role not in INDEX_ROLES:
            return np.asarray(self.step_tables[tensor.role][step])
        schedule = self.plan.run_schedule()
        variant = FULL if step == EVERY_FULL_STEP else schedule.variants[step]
        index = None if variant == FULL else self.token_index.get(variant)
        row = None if index is None else np.asarray(index[index_row(schedule, step)], np.int32)
        if tensor.group is None:
            assert row is not None, "check_plan sees to it that a phase that prunes has an index table"
            return row
        return planned_group_inputs(self.plan, variant, row)[tensor.name]


def read_bundle(
    path: Path, backend: str | None, require_signature: Path | None = None, *, whole: bool = False
) -> Bundle:
    """Read a bundle's documents and check them.

    Args:
        path: ``engines/NAME``.
        backend: which of the bundle's targets; None takes the only one.
        require_signature: a public key in PEM whose holder must have signed the bundle and that target.
        whole: check every file of the bundle, and not those alone that say what is run.

    Raises:
        BundleError: nothing exported or built there, a file is missing, truncated or altered, or the signature that
            is required is missing, another key's, or of other files.
        PlanError: the plan is inconsistent.
        UsageError: there is no such backend, or there are several targets and none is named.
    """
    read_manifest(path)
    backend = _chosen_backend(path, backend)
    if require_signature is not None:
        check_signature(path, require_signature, [backend])
    return bundle_of(path, backend, read_documents(path, graphs=whole))


def bundle_of(path: Path, backend: str, documents: Documents) -> Bundle:
    """A bundle whose documents are at hand."""
    plan, solver = documents.plan, documents.runtime_tables
    fitted = documents.step_tables.solver_coefficients
    return Bundle(
        path=path,
        backend=backend,
        manifest=documents.manifest,
        plan=plan,
        token_index=documents.step_tables.token_index,
        step_tables={
            Role.TIMESTEP: solver["timesteps"],
            Role.COEFFICIENTS: solver["coefficients"] if fitted is None else fitted,
            # The solver prepares the next step's input; after the last step nobody reads it.
            Role.INPUT_SCALE: np.append(solver["input_scale"][1:], np.float32(1)),
            Role.FORECAST_WEIGHTS: documents.step_tables.forecast_weights,
        },
        own_coefficients=solver["coefficients"],
        first_scale=solver["input_scale"][0],
    )


class Binder:
    """Binds calls to one set of buffers, which are all made at once.

    Args:
        bundle: names the graphs' tensors and fills the tables, whose rows are written here and never again.
        device: where the buffers are made.
        graphs: loaded on that device, by name.
        layout: the buffers that the calls mention.

    Raises:
        BackendError: the device has not that much memory.
    """

    def __init__(
        self,
        bundle: Bundle,
        device: Device,
        graphs: Mapping[str, Graph],
        layout: Layout,
    ) -> None:
        self._manifest, self._graphs = bundle.manifest, graphs
        made = device.buffers([planned.spec() for planned in layout.buffers])
        self.buffers = {planned.key: buffer for planned, buffer in zip(layout.buffers, made, strict=True)}
        for planned in layout.buffers:
            key = planned.key
            if key.kind is not Kind.TABLE:
                continue
            if key.step is None:
                # Of what is run for all steps at once, a step's rows stand together.
                values = np.repeat(bundle.step_tables[key.role], planned.shape[0] // bundle.plan.schedule.steps, axis=0)
            else:
                values = np.broadcast_to(
                    bundle.row(planned.tensor, key.step, own_solver=key.place == OWN), planned.shape
                )
            self.buffers[key].write(values.astype(planned.tensor.numpy_dtype))
        for part_key, part in layout.parts.items():
            self.buffers[part_key] = self.buffers[part.whole].rows(part.start, part.stop)

    def bind(self, call: Call) -> BoundGraph:
        """Fix a call's buffers.

        Raises:
            BackendError: the engine refuses them.
        """
        record = self._manifest.graphs[call.graph]
        inputs = {tensor.name: self.buffers[call.inputs[tensor.name]] for tensor in record.inputs}
        outputs = {tensor.name: self.buffers[call.outputs[tensor.name]] for tensor in record.outputs}
        return self._graphs[call.graph].bind(inputs, outputs)


def _chosen_backend(path: Path, backend: str | None) -> str:
    if backend is not None:
        registry.backend(backend)
    built = sorted(name for name in registry.BACKENDS if (path / name / MANIFEST).is_file())
    if backend is None and len(built) > 1:
        raise UsageError(
            f"{path}: built for {' and '.join(built)}, and none is named; choose one with --backend {built[0]}, in"
            f" Python with backend={built[0]!r}"
        )
    chosen = built[0] if backend is None and built else backend
    if chosen not in built:
        wanted = "engine" if backend is None else f"{backend} engine"
        beside = f" (built: {', '.join(built)})" if built else ""
        raise BundleError(
            f"{path}: no {wanted} built there{beside}; build one with:"
            f" tc-deploy build {path}" + ("" if backend is None else f" --backend {backend}")
        )
    return str(chosen)
